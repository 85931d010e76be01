"""One removal of a pruning step: scores, choice, masks or surgery, recalibration; and its rows of the report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from app.errors import BudgetMissed
from app.network.blocks import WEIGHTED
from app.network.cost import Cost, cost
from app.network.graph import Graph
from app.network.node import Node
from app.pruning.budget import (
    BudgetUnreachable,
    Removals,
    allowed_cost,
    choose_removals,
    choose_removals_in_blocks,
)
from app.pruning.channel_classes import Classes, channel_classes
from app.pruning.group_limits import why_kept
from app.pruning.weight_matrix import why_dense
from app.spec.low_rank import Separable
from app.spec.optimizations import Compression
from app.spec.prune import NEED_GRADIENTS, Criterion, Prune
from app.spec.quantize import Quantize
from worker.latency import Stopwatch
from worker.network import Network, assign_tensors
from worker.precision import Precision
from worker.pruning.consumer_repair import ConsumerRepair
from worker.pruning.importance import channel_scores
from worker.pruning.latency_budget import TimeCheck, check_time, removals_within_time
from worker.pruning.learned_gates import learned_gates
from worker.pruning.loss_curves import CutMonitor, Repair, loss_curves
from worker.pruning.recalibration import recalibrate_batch_norm
from worker.pruning.reconstruction import Reconstruction, products_within, reconstruct
from worker.pruning.schedules import PruningRound
from worker.pruning.surgery import kept_channels, shrink
from worker.pruning.weight_masks import joined_masks
from worker.training.losses import cross_entropy
from worker.training.masks import Masks

RECALIBRATION_IMAGES = 4096
REPAIR_IMAGES = 512  # by which the cuts of loss curves are repaired

Pairs = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RemovalContext:
    """What a removal needs besides the network: images of the training part without augmentation, seeds, the dense cost.

    `plain` gives batches of images and labels, as large as memory allows a forward pass to be, the same images in the
    same order at each call; `seed` is the job's; `dense_network` gives the trained network before the first
    compression; `images` is how many the training part has; `frozen` are the layers that keep their statistics.
    `whole` gives the same images in batches of one size, for sums over a batch, and `gradient_images` how many of one
    a backward pass can take; None: those of `plain`, and all. `monitor` is for loss curves. `look` is called
    every few hundred milliseconds of a long removal: it raises Interrupted where the user asked the job to leave.
    """

    plain: Callable[[], Pairs]
    seed: int
    precision: Precision
    baseline: Cost
    dense_network: Callable[[], Network]
    images: int
    frozen: frozenset[str] = frozenset()
    whole: Callable[[], Pairs] | None = None
    gradient_images: Callable[[], int] | None = None
    monitor: CutMonitor | None = None
    look: Callable[[], None] = lambda: None

    def scores(self, network: Network, classes: Classes, criterion: Criterion) -> dict[int, float]:
        """The importance of every class of the network's channels."""
        by_gradients = criterion in NEED_GRADIENTS
        return channel_scores(
            network,
            classes,
            criterion,
            seed=self.seed,
            batches=self.whole() if by_gradients and self.whole is not None else self.plain(),
            loss=cross_entropy,
            precision=self.precision,
            images_at_a_time=None if self.gradient_images is None else self.gradient_images(),
        )


class Removed(NamedTuple):
    """What a removal has left behind, for the repair.

    The network as it was before; the numbers of the channels that are left, by node, where one has lost any; the layers that
    products have replaced: they are new, even where the old ones were frozen.
    """

    target: Network
    kept: Mapping[str, Tensor]
    replaced: frozenset[str] = frozenset()


class Narrowed(NamedTuple):
    """A network without some channels; `kept` are the numbers of those that it has, by node, where it lost any."""

    network: Network
    kept: dict[str, Tensor]


def cut_weights(
    network: Network,
    step: Prune,
    stage: PruningRound,
    previous: Masks | None,
    context: RemovalContext,
    rewind: dict[str, Tensor] | None,
) -> Masks:
    """The masks after this removal; the network's pruned weights are zero.

    `rewind` are the weights of an earlier epoch: they replace the trained ones after the choice, which is made on the trained ones.

    Raises:
        LayerEmptied: a threshold leaves nothing of a layer.
        Diverged: a weight is not finite.
    """
    masks = joined_masks(network, step, stage.sparsity(step.sparsity), previous, seed=context.seed)
    if rewind is not None:
        assign_tensors(network, rewind)
    masks.apply(network)
    return masks


def cut_channels(
    network: Network, step: Prune, stage: PruningRound, context: RemovalContext, *, start: Graph
) -> Narrowed:
    """The smaller network, placed as the larger one was, and what is left of its channels.

    `start` is the graph before the step's first removal.

    Raises:
        BudgetMissed: the budget is below what the floors allow, or what this machine can reach.
        What the monitor of the context raises, between two cuts; the network is as it was.
    """
    fraction = stage.fraction
    classes = channel_classes(network.graph, start)
    scores = context.scores(network, classes, step.criterion)
    losses = None
    if step.scope == "sensitivity":
        losses = loss_curves(
            network,
            classes,
            step,
            scores,
            context.plain(),
            context.precision,
            images=context.images,
            frozen=context.frozen,
            repair=_repair_of_cuts(network, classes, context) if step.reconstruct else None,
            monitor=context.monitor,
        )

    def choose(counted: Prune, prices: Mapping[str, int] | None) -> Removals:
        return choose_removals(
            network.graph,
            classes,
            scores,
            counted,
            start=start,
            baseline=context.baseline,
            losses=losses,
            prices=prices,
        )

    try:
        if step.scope == "learned":
            scores = _gates(network, classes, step, scores, fraction, context, start)
        if step.budget is not None and step.budget.latency_ms is not None:
            stopwatch = Stopwatch(context.dense_network())
            removals = removals_within_time(network, classes, step, choose, stopwatch, start=start, fraction=fraction)
        else:
            removals = choose_removals_in_blocks(
                network.graph,
                classes,
                scores,
                step,
                start=start,
                baseline=context.baseline,
                fraction=fraction,
                losses=losses,
            )
    except BudgetUnreachable as exc:
        raise BudgetMissed(str(exc)) from exc
    smaller = shrink(network, classes, removals.dropped)
    context.precision.to_device(smaller)
    return Narrowed(smaller, kept_channels(classes, removals.dropped))


def _repair_of_cuts(network: Network, classes: Classes, context: RemovalContext) -> Repair:
    """What is done to every cut of a loss curve, so that it costs what it will cost after the reconstruction."""
    fits = ConsumerRepair(network, _first_images(context, REPAIR_IMAGES), frozen=context.frozen, seed=context.seed)

    def fit(cut: Network, dropped: Collection[int]) -> None:
        fits.apply(cut, classes, dropped)

    return fit


def _first_images(context: RemovalContext, count: int) -> Iterator[Tensor]:
    for images_NCx, _ in context.plain():
        yield images_NCx
        count -= len(images_NCx)
        if count <= 0:
            return


def _gates(
    network: Network,
    classes: Classes,
    step: Prune,
    scores: Mapping[int, float],
    fraction: float,
    context: RemovalContext,
    start: Graph,
) -> dict[int, float]:
    """What scope `learned` ranks by, instead of the scores of the step's criterion, from which it starts."""
    return learned_gates(
        network,
        classes,
        step,
        scores,
        context.plain,
        context.precision,
        allowed=allowed_cost(step, context.baseline, fraction, cost(start)),
        images=context.images,
        start=start,
        fraction=fraction,
        look=context.look,
    )


def recalibrate(network: Network, context: RemovalContext) -> bool:
    """Count batch norm's statistics again on training images; False if the network has none."""

    images = _first_images(context, RECALIBRATION_IMAGES)
    return recalibrate_batch_norm(network, images, frozen=context.frozen, precision=context.precision) > 0


def repair(
    network: Network, removed: Removed, masks: Masks | None, context: RemovalContext, look: Callable[[], None]
) -> Reconstruction:
    """Fit the layers behind a removal to what the network computed before it (`worker/pruning/reconstruction.py`).

    All fits together may take what an epoch of training the network before takes. `look` is called every few hundred
    milliseconds.
    """
    return reconstruct(
        network,
        removed.target,
        (images_NCx for images_NCx, _ in context.plain()),
        kept=removed.kept,
        masks=masks,
        frozen=context.frozen - removed.replaced,
        seed=context.seed,
        products=products_within(removed.target.graph, context.images),
        look=look,
    )


def check_budget(network: Network, step: Compression, context: RemovalContext) -> TimeCheck | None:
    """Check that the network is within the step's budget; the measurement of a latency, which is never exact.

    Raises:
        BudgetMissed: a counted cost is not; the message has both numbers.
    """
    if isinstance(step, Separable) or step.budget is None:
        return None
    measure = step.budget.cost_measure
    if measure is None:
        return check_time(network, step.budget, Stopwatch(context.dense_network()))
    reached, allowed = cost(network.graph).of(measure), step.budget.allowed(context.baseline.of(measure))
    if reached > allowed:
        raise BudgetMissed(f"the pruned network has {reached} {measure}, the budget allows {allowed}")
    return None


@torch.no_grad()
def layer_rows(network: Network, before: Graph, step: Compression | Quantize) -> list[dict[str, Any]]:
    """The report's `layers` of a step: each convolution and linear layer before and after, or why it was left alone.

    A layer that shares its weights has none of its own: `shares` says whose they are, and the numbers are there.
    """
    kept = why_kept(before, channel_classes(before), step) if isinstance(step, Prune) and not step.zeros else None
    parameters = dict(network.named_parameters())
    rows = []
    for node in network.graph.nodes:
        if node.type not in WEIGHTED:
            continue
        weight = parameters[f"{node.home}.weight"]
        count, nonzero = (weight.numel(), int(torch.count_nonzero(weight))) if node.shares is None else (0, 0)
        was = before[node.name]
        row: dict[str, Any] = {
            "name": node.name,
            "type": node.type,
            "channels_before": was.shape[0],
            "channels_after": node.shape[0],
            "weights": count,
            "nonzero": nonzero,
            "sparsity": 1 - nonzero / count if count else 0.0,
        }
        if node.shares is not None:
            row["shares"] = node.shares
        reason = _why_untouched(was, node, nonzero, step, kept) if isinstance(step, Prune) else None
        rows.append(row if reason is None else row | {"reason": reason})
    return rows


def _why_untouched(before: Node, after: Node, nonzero: int, step: Prune, kept: Mapping[str, str] | None) -> str | None:
    """Why this step left the layer as it was; None if it did not. `kept` has the layers that no removal can narrow."""
    if kept is None and after.shares is not None:
        return f"uses the weights of {after.shares}"
    if kept is None:
        what = "block" if step.structure == "blocks" else "weight"
        untouched = nonzero == before.tensors["weight"].elements
        return why_dense(before, step) or (f"no {what} of it was among the weakest" if untouched else None)
    if before.shape[0] != after.shape[0]:
        return None
    if before.name in kept:
        return kept[before.name]
    if before.input_shapes[0][0] != after.input_shapes[0][0]:
        return "only its inputs follow"
    return "the budget was met without it, or the layers it is tied to hold it"
