"""What each group of channels costs when it alone is cut: how scope `sensitivity` shares the budget of a prune step.

The curves are measured inside the removal, with the step's own scores and floors, and go into `app/pruning/budget.py`.
The job of kind sensitivity, which measures a table for its user and removes nothing, is `worker/run/sensitivity.py`.

No network is built for a cut: the classes are set to zero in place, which is the same function (`surgery.py`), and
afterwards every tensor is put back.

The cost is the rise of the cross-entropy on training images. Accuracy would need more images: it moves in steps, and
small cuts do not move it at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from app.pruning.budget import Curve
from app.pruning.channel_classes import Classes
from app.pruning.group_limits import GroupLimits, free_limits
from app.spec.prune import Prune
from worker.evaluation import evaluate
from worker.network import Network
from worker.precision import Precision
from worker.pruning.eval_mode import eval_mode
from worker.pruning.importance import LabelledBatches
from worker.pruning.recalibration import recalibrate_batch_norm
from worker.pruning.surgery import masked_in_place

CURVE_PARTS = ((0.75, 0.5, 0.25), (0.5, 0.25), (0.5,))  # and the floor of the step; the first that is affordable
MOST_IMAGES = 512  # more did not change what is removed
ENOUGH_IMAGES = 64  # before points are left out: what these remove was within noise of what 512 do
FEWEST_IMAGES = 32
FORWARDS = 2  # of each image and cut: to recalibrate, and to evaluate
EPOCH_FORWARDS = 3  # what a training epoch costs for each image; a backward pass is two forward passes
SMALL_EPOCH = 2000  # images: a smaller epoch takes no time, and its curves would be noise
EVALUATIONS = 100  # of MOST_IMAGES, for up to as many groups; then one for each

Repair = Callable[[Network, Collection[int]], None]
"""(the network with these classes at zero, the classes): changes weights that are left, before the cut is evaluated."""


class CutMonitor(Protocol):
    """What the measuring of curves calls, so that it can be left after every cut and gone on with in another process."""

    def rises(self) -> Mapping[tuple[int, float], float]:
        """What an earlier attempt has measured: (index of a group, part kept) -> rise of the loss."""

    def cut_measured(self, group: int, kept: float, rise: float, *, share: float) -> None:
        """Note one more; `share` (0 to 1) of all cuts is done. The network is whole: raise to leave it there."""


class Unmonitored:
    """A monitor that notes nothing."""

    def rises(self) -> Mapping[tuple[int, float], float]:
        """No cut is known."""
        return {}

    def cut_measured(self, group: int, kept: float, rise: float, *, share: float) -> None:
        """Go on."""


@dataclass(frozen=True)
class CurveEffort:
    """How curves are measured: the parts of a group that are kept, besides the floor, and the images of each cut."""

    parts: tuple[float, ...]
    images: int

    def forwards(self, groups: int) -> int:
        """How many images go through the network for so many groups."""
        return self.images * (1 + FORWARDS * groups * (len(self.parts) + 1))


def curve_effort(groups: int, images: int) -> CurveEffort:
    """The effort for so many groups and training images.

    All cuts together cost one epoch of training at most, and 100 evaluations of 512 images (of more groups one each).
    To stay below, cuts get fewer images, then curves fewer points. At the end each group is cut to half and to its floor,
    with 32 images, whatever that costs: the floor alone says too little.
    """
    sample = min(MOST_IMAGES, images)
    affordable = min(EPOCH_FORWARDS * max(images, SMALL_EPOCH), max(EVALUATIONS, groups) * MOST_IMAGES)
    for parts in CURVE_PARTS:
        most = affordable // (FORWARDS * max(1, groups) * (len(parts) + 1))
        if most >= min(ENOUGH_IMAGES, sample):
            return CurveEffort(parts, min(sample, most))
    return CurveEffort(CURVE_PARTS[-1], min(sample, max(FEWEST_IMAGES, most)))


def loss_curves(
    network: Network,
    classes: Classes,
    step: Prune,
    scores: Mapping[int, float],
    plain: LabelledBatches,
    precision: Precision,
    *,
    images: int,
    frozen: Collection[str] = (),
    repair: Repair | None = None,
    monitor: CutMonitor | None = None,
) -> dict[int, Curve]:
    """For each group that shares the budget of `step`, by its index: (part kept, rise of the loss in nats), recalibrated.

    After Li et al., arXiv 1608.08710, section 3.2. Never on the test part: the result is measured on it; nor on the
    validation part, which may be empty, and which chooses the epoch. For the cost see `curve_effort`.

    Args:
        network: Left as it is, bit for bit.
        classes: Of its graph.
        step: A prune step of channels; its floors end the curves.
        scores: By class: the weakest are removed first.
        plain: Batches of training images and labels, without augmentation; only the first few are read.
        precision: Where the network is evaluated.
        images: How many training images there are.
        frozen: Layers that keep their statistics.
        repair: What is done to a cut network before its statistics are counted again.
        monitor: Told of every cut, and asked what is known.

    Raises:
        What `monitor` raises.
    """
    step = step.model_copy(update={"round_to": step.round_to or 1})  # whatever blocks the removal will have
    limits = free_limits(network.graph, classes, step, shared=True)
    effort = curve_effort(len(limits), images)
    cuts = [(each, *cut) for each in limits for cut in _cuts_of(each, step, scores, effort.parts)]
    sample = _equal_batches(plain, effort.images)
    monitor = monitor or Unmonitored()
    rises = dict(monitor.rises())

    def loss_without(dropped: Collection[int]) -> float:
        with masked_in_place(network, classes, dropped):
            if repair is not None:
                repair(network, dropped)
            recalibrate_batch_norm(network, (images_NCx for images_NCx, _ in sample), frozen=frozen)
            return evaluate(network, sample, precision).loss

    with eval_mode(network):
        whole = evaluate(network, sample, precision).loss
        for done, (each, kept, dropped) in enumerate(cuts, start=1):
            key = each.group.index, kept
            if key not in rises:
                rises[key] = max(0.0, loss_without(dropped) - whole)
                monitor.cut_measured(*key, rises[key], share=done / len(cuts))
    points: dict[int, list[tuple[float, float]]] = {each.group.index: [] for each in limits}
    for each, kept, _ in cuts:
        points[each.group.index].append((kept, rises[each.group.index, kept]))
    return {index: Curve(tuple(found)) for index, found in points.items()}


def _cuts_of(
    limits: GroupLimits, step: Prune, scores: Mapping[int, float], parts: Sequence[float]
) -> Iterator[tuple[float, list[int]]]:
    """(part of the group that is kept, classes without which it is), by smaller and smaller parts."""
    smallest = 1.0
    floor = limits.least / len(limits.group.classes)  # an override may let it go further than the step
    for kept in (*parts, min(floor, 1 - step.max_sparsity)):
        dropped = limits.weakest(scores, 1 - max(kept, floor))
        left = 1 - len(dropped) / len(limits.group.classes)
        if left < smallest:
            smallest = left
            yield left, dropped


def _equal_batches(plain: LabelledBatches, count: int) -> list[tuple[Tensor, Tensor]]:
    """The first `count` images and labels in batches no larger than those of `plain`, equal but for one image.

    Statistics are means over batches: a rest of a few images would count as much as a whole batch.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for batch in plain:
        found.append(batch)
        if sum(len(labels_N) for _, labels_N in found) >= count:
            break
    images_NCx, labels_N = (torch.cat(tensors)[:count] for tensors in zip(*found, strict=True))
    return list(zip(images_NCx.tensor_split(len(found)), labels_N.tensor_split(len(found)), strict=True))
