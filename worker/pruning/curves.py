"""How much accuracy each group of channels costs when it alone is cut: what scope `sensitivity` shares a budget out by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from torch import Tensor

from app.spec.budget import Curve, choose_removals, prunable_groups
from app.spec.channels import Classes
from app.spec.pruning import Prune
from worker.evaluation import evaluate
from worker.network import Network
from worker.precision import Precision
from worker.pruning.recalibration import recalibrate_batch_norm
from worker.pruning.surgery import shrink

PARTS_KEPT = (0.75, 0.5, 0.25)  # and the floor of the step
BATCHES = 4  # of training images: about a thousand

Pairs = Iterable[tuple[Tensor, Tensor]]


def loss_curves(
    network: Network, classes: Classes, step: Prune, scores: Mapping[int, float], plain: Pairs, precision: Precision
) -> dict[int, Curve]:
    """For each group that `step` may cut, by its index: (part kept, accuracy lost on training images), recalibrated.

    Li et al., arXiv 1608.08710, section 3.2. The test part has no say: it is what the result is measured on.

    Args:
        network: Left as it is.
        classes: Of its graph.
        step: A prune step of channels; its floors end the curves.
        scores: By class: the weakest leave first.
        plain: Batches of training images and labels, without augmentation; a few are looked at.
        precision: Where the network is evaluated.
    """
    batches = list(islice(plain, BATCHES))
    whole = evaluate(network, batches, precision).accuracy
    curves = {}
    for group in prunable_groups(network.graph, classes, step):
        points: list[tuple[float, float]] = []
        for kept in (*PARTS_KEPT, 1 - step.max_sparsity):
            amount = {"budget": None, "sparsity": min(1 - kept, step.max_sparsity), "scope": "layer"}
            wanted = step.model_copy(update=amount)
            removals = choose_removals(network.graph, classes, scores, wanted, only=group.index)
            left = 1 - len(removals.dropped) / len(group.classes)
            if left >= (points[-1][0] if points else 1.0):
                continue
            smaller = shrink(network, classes, removals.dropped)
            precision.place(smaller)
            recalibrate_batch_norm(smaller, _images(batches))
            points.append((left, max(0.0, whole - evaluate(smaller, batches, precision).accuracy)))
        curves[group.index] = Curve(tuple(points))
    return curves


def _images(batches: Pairs) -> Iterator[Tensor]:
    return (images_NCx for images_NCx, _ in batches)
