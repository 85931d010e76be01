"""The recipe of a training that states none: optimizer and batch by the number of steps there will be.

Found by the grid of `benchmarks/recipes.py`; the figures are in docs/benchmarks.md.
"""

from __future__ import annotations

from typing import Any

from app.spec.job import JobSpec, retraining
from app.spec.model import JobModel
from app.spec.optimizations import Compression

USUAL_BATCH = 128
SMALL_BATCH = 64
FEW_STEPS = 3000  # of the usual batch, over all epochs of the longest training: below it smaller batches win


def with_recipe(spec: JobSpec, images: int) -> JobSpec:
    """`spec` with the batch size and the optimizer that its training did not state; `images` are trained on.

    A few thousand images in batches of 128 are few steps, and then half the batch and Muon are several points better
    than SGD, in the same time on a CPU. A network that comes trained keeps SGD, whose steps are as small as its
    gradients. A batch is never larger than the training part.
    """
    training = spec.training
    update: dict[str, Any] = {}
    if "batch_size" not in training.model_fields_set and images >= 1:
        update["batch_size"] = min(images, _usual_batch(spec, images))
    if "name" not in training.optimizer.model_fields_set and not _comes_trained(spec):
        update["optimizer"] = training.optimizer.model_copy(update={"name": "muon"})
    return spec.model_copy(update={"training": training.model_copy(update=update)}) if update else spec


def _usual_batch(spec: JobSpec, images: int) -> int:
    retrainings = [step for step in spec.optimizations if isinstance(step, Compression)]
    longest = max([spec.training.epochs, *(retraining(step, spec.training).epochs or 0 for step in retrainings), 1])
    return SMALL_BATCH if longest * images / USUAL_BATCH < FEW_STEPS else USUAL_BATCH


def _comes_trained(spec: JobSpec) -> bool:
    return isinstance(spec.model, JobModel) or spec.model.weights is not None
