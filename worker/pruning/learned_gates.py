"""Which channels a network can spare together: a gate on every class, learned while the weights stand still.

How scope `learned` shares the budget of a prune step, after AutoBot (Castells & Yeom, arXiv 2111.09635): each class of
channels that may leave has a gate in [0, 1], the loss on training images is minimised over the gates alone, within the
budget, and the gates are driven to 0 or 1. What is removed is then chosen by `app/pruning/budget.py`, with the gates as
scores. Loss curves cut one group at a time; gates close in all groups at once, so that what the layers lose together counts.

Differences from the paper. Ties cost nothing: a gate belongs to a class, wherever it appears. The cost is no penalty
with a weight to tune but a bound that holds at every step: before each forward pass one number is subtracted from all
logits, with which the exact cost of the gated network is what that step allows (`_shift`), and the gates move along
this surface, so that the loss that a unit of cost is worth is an outcome (`_along_the_surface`).

Where a gate acts. A network without a class is the network in which the slices of its consumers are zero: every way
from a channel that may leave to the logits passes a weight that multiplies it (an axis of role "in"; channels for which
this is not so are pinned). So the gate scales these slices and nothing else: it acts once on every such way, whatever
norms, activations, joins and depthwise convolutions lie before, and at 0 and 1 the network is exactly the masked one.

Axes: N batch, C channel classes by their numbers, x spatial, K classes of images. Logits, gates and the cost are float64
on the CPU, where thirty costs in a row are cheap; gates follow the network to its device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from app.errors import Diverged
from app.network.cost import FLOAT_BYTES, CostMeasure, cost
from app.network.graph import Graph
from app.pruning.budget import Removals, choose_removals
from app.pruning.channel_classes import Classes
from app.pruning.group_limits import group_limits
from app.pruning.incremental_cost import PLACES, IncrementalCost
from app.spec.budget import Budget
from app.spec.prune import Prune
from worker.network import Network
from worker.precision import Precision
from worker.pruning.eval_mode import eval_mode
from worker.pruning.importance import LabelledBatches
from worker.training.losses import cross_entropy

STEPS = 200
SMALLEST_BATCH = 16
LARGEST_BATCH = 64
RATE = 0.1  # of Adam, on logits whose spread within a group is 1 at the start
MOMENTA = (0.9, 0.99)
SMALLEST = 1e-20  # of a derivative that counts: a network that knows its training images has very small ones
RAMP = 0.5  # part of the steps in which the cost falls from the whole network's to the budget
WARM, COLD = 1.0, 0.1  # what logits are divided by, first and last
HALVINGS = 30
FURTHEST = 60.0  # of the shift, in temperatures: beyond it all gates are 0 or 1 in float64


class GatedCost:
    """The cost of a network whose classes are there in part, as a differentiable function of their gates.

    With gates of 0 and 1 it is the integer that `IncrementalCost` counts, `bytes` without the header of the file.
    """

    def __init__(self, graph: Graph, classes: Classes, measure: CostMeasure) -> None:
        model = IncrementalCost(graph, classes)
        self._count = len(model.slots)
        self._ids = torch.from_numpy(np.concatenate([each.ids for each in model.slots]))
        self._of = torch.tensor([number for number, each in enumerate(model.slots) for _ in each.ids])
        repeats = [each.repeat for each in model.slots for _ in each.ids]
        self._repeats = torch.tensor(repeats, dtype=torch.float64)
        place, unit = PLACES[measure], FLOAT_BYTES if measure == "bytes" else 1
        counted = {pair: unit * counts[place] for pair, counts in model.terms.items() if counts[place]}
        self._widths = torch.tensor(list(counted), dtype=torch.int64).reshape(len(counted), 2)
        self._factors = torch.tensor([float(count) for count in counted.values()], dtype=torch.float64)

    def __call__(self, gates_C: Tensor) -> Tensor:
        """The cost with these gates, by class number, float64: a scalar."""
        widths = torch.zeros(self._count, dtype=torch.float64)
        widths = widths.index_add(0, self._of, gates_C[self._ids] * self._repeats)
        widths = torch.cat([widths, widths.new_ones(1)])  # the last stands for no width
        return (widths[self._widths].prod(dim=1) * self._factors).sum()


class GatedNetwork:
    """A network with its weights, and gates that scale what its consumers read of each class."""

    def __init__(self, network: Network, classes: Classes) -> None:
        self._network = network
        parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
        self._axes: dict[str, list[tuple[Tensor, tuple[int, ...]]]] = {}
        for axis in classes.axes:
            if axis.role == "in":
                weight = parameters[f"{axis.layer}.{axis.tensor}"]
                shape = [1] * weight.dim()
                shape[axis.axis] = -1
                ids = torch.from_numpy(axis.slots.runs(1))
                self._axes.setdefault(f"{axis.layer}.{axis.tensor}", []).append((ids, tuple(shape)))
        self._parameters = parameters

    def __call__(self, images_NCx: Tensor, gates_C: Tensor) -> Tensor:
        """The logits `N x K`; differentiable by the gates alone."""
        scaled = dict(self._parameters)
        for name, axes in self._axes.items():
            for ids, shape in axes:
                scaled[name] = scaled[name] * gates_C[ids].to(scaled[name]).view(shape)
        logits_NK: Tensor = functional_call(self._network, scaled, (images_NCx,))
        return logits_NK


@dataclass(frozen=True)
class _Openings:
    """Which gates are learned (`free`), and where the others stand: at 1 where a class stays, at 0 where it must go.

    Both are by class number. `floors` has for each group that may shrink its classes and how many of them stay at least.
    """

    free: Tensor
    standing: Tensor
    floors: tuple[tuple[Tensor, int], ...]

    def gates(self, logits_C: Tensor, temperature: float) -> Tensor:
        """The gates of all classes. The strongest of each group, as many as its floor, stand open."""
        gates_C = torch.where(self.free, torch.sigmoid(logits_C / temperature), self.standing)
        strongest = [ids[logits_C[ids].topk(least).indices] for ids, least in self.floors if least]
        return gates_C if not strongest else gates_C.index_fill(0, torch.cat(strongest), 1.0)


def learned_gates(
    network: Network,
    classes: Classes,
    step: Prune,
    scores: Mapping[int, float],
    plain: Callable[[], LabelledBatches],
    precision: Precision,
    *,
    allowed: int,
    images: int,
    start: Graph,
    fraction: float = 1.0,
    look: Callable[[], None] = lambda: None,
) -> dict[int, float]:
    """The gate of every class, in [0, 1]: the score with which `choose_removals` removes classes in scope `learned`.

    Nothing is drawn: the same network, images and scores give the same gates. It costs as much as one epoch of training
    at most.

    Args:
        network: Left as it is; on the device of `precision`.
        classes: Of its graph, with the ties of `start`.
        step: A prune step of channels with a budget that can be counted; its floors and overrides hold.
        scores: By class: the order within a group at the start.
        plain: Batches of training images and labels, without augmentation.
        precision: Where the network is evaluated.
        allowed: The cost that may be left, in the measure of the budget.
        images: How many training images there are.
        start: The graph before the first stage of the step: floors refer to its widths.
        fraction: How far this stage goes, in (0, 1]: of what overrides take, it takes this part.
        look: Called before every step; may raise to leave.

    Raises:
        BudgetUnreachable: The floors do not let the cost fall that far.
        Diverged: The loss of the gated network is not finite.
    """
    measure = step.budget.cost_measure if step.budget is not None else None
    assert measure is not None, "gates are learned within a budget that can be counted"
    step = step.model_copy(update={"round_to": step.round_to or 1, "scope": "layer"})  # whatever blocks will leave
    openings = _openings(network.graph, classes, step, scores, start, {measure: allowed}, fraction)
    gated, cost_of = GatedNetwork(network, classes), GatedCost(network.graph, classes, measure)
    whole = float(cost_of(openings.standing))
    logits_C = _first_logits(openings, scores, classes.slot_count).requires_grad_()
    optimizer = torch.optim.Adam([logits_C], lr=RATE, betas=MOMENTA, eps=SMALLEST)
    size = min(LARGEST_BATCH, max(SMALLEST_BATCH, images // STEPS))
    steps = min(STEPS, max(1, images // size))
    with eval_mode(network):
        for number, (images_NCx, labels_N) in enumerate(itertools.islice(_small_batches(plain, size), steps), start=1):
            look()
            part = number / steps
            temperature = WARM * (COLD / WARM) ** part
            target = whole * min(1.0, allowed / whole) ** min(1.0, part / RAMP)
            _shift(logits_C, openings, cost_of, target, temperature)
            gates_C = openings.gates(logits_C, temperature)
            # float16 would lose small derivatives
            with nullcontext() if precision.scales_gradients else precision.autocast():
                logits_NK = gated(images_NCx, gates_C)
            loss = cross_entropy(logits_NK.float(), labels_N)
            if not bool(torch.isfinite(loss)):
                raise Diverged("the loss of the network behind learned gates is not finite")
            logits_C.grad = _along_the_surface(loss, cost_of(gates_C), logits_C)
            optimizer.step()
    _shift(logits_C, openings, cost_of, allowed, COLD)
    found = openings.gates(logits_C.detach(), COLD).numpy()
    return {c: float(found[c]) for c in classes.all().tolist()}


def _openings(
    graph: Graph,
    classes: Classes,
    step: Prune,
    scores: Mapping[int, float],
    start: Graph,
    allowed: Mapping[CostMeasure, int],
    fraction: float,
) -> _Openings:
    """Which gates are free, and where the others stand: what overrides take is closed. Raises BudgetUnreachable."""
    ((measure, most),) = allowed.items()

    def within(amount: float) -> Removals:
        wanted = step.model_copy(update={"budget": Budget.model_validate({measure: amount})})
        return choose_removals(graph, classes, scores, wanted, start=start, baseline=cost(graph), fraction=fraction)

    smallest, forced = within(max(2, most)).floor_dropped, within(1.0).dropped
    free, standing = np.zeros(classes.slot_count, dtype=np.bool_), np.ones(classes.slot_count)
    standing[list(forced)] = 0.0
    floors = []
    for each in group_limits(graph, classes, step, start):
        if each.held is None and each.sparsity is None:
            ids = each.group.classes
            free[ids] = True
            floors.append((torch.from_numpy(ids), len(ids) - len(smallest.intersection(ids.tolist()))))
    return _Openings(torch.from_numpy(free), torch.from_numpy(standing), tuple(floors))


def _first_logits(openings: _Openings, scores: Mapping[int, float], count: int) -> Tensor:
    """By class number: the scores of each group with mean 0 and standard deviation 1, so that all groups start alike."""
    logits_C = torch.zeros(count, dtype=torch.float64)
    for ids, _ in openings.floors:
        values = torch.tensor([scores[c] for c in ids.tolist()], dtype=torch.float64)
        spread = float(values.std(correction=0))
        logits_C[ids] = (values - values.mean()) / (spread or 1.0)
    return logits_C


def _small_batches(plain: Callable[[], LabelledBatches], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `size` images; what is left of a larger one is left out. From the first one again where they end."""
    while True:
        seen = 0
        for images_NCx, labels_N in plain():
            seen += len(labels_N)
            for first in range(0, max(1, len(labels_N) - size + 1), size):
                yield images_NCx[first : first + size], labels_N[first : first + size]
        if seen == 0:
            return


@torch.no_grad()
def _shift(logits_C: Tensor, openings: _Openings, cost_of: GatedCost, target: float, temperature: float) -> None:
    """Subtract from all logits the number with which the gates cost `target`, or come as near as they can: by bisection."""
    logits_C = logits_C.detach()
    far = FURTHEST * temperature
    low, high = float(logits_C.min()) - far, float(logits_C.max()) + far  # all open, all closed
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if float(cost_of(openings.gates(logits_C - middle, temperature))) > target:
            low = middle
        else:
            high = middle
    logits_C -= high


def _along_the_surface(loss: Tensor, spent: Tensor, logits_C: Tensor) -> Tensor:
    """The derivative of the loss by the logits where a common shift holds the cost: no part of it is a common shift.

    With a shift s(a) that holds cost(a - s): dloss/da - price * dcost/da, price = (sum of dloss/da) / (sum of dcost/da).
    Where the loss would fall with a smaller network too the bound does not bind, and the price is 0: what costs and does
    nothing must not open.
    """
    (of_cost_C,) = torch.autograd.grad(spent, logits_C, retain_graph=True)
    (of_loss_C,) = torch.autograd.grad(loss, logits_C)
    total = of_cost_C.sum()
    price = torch.where(total > 0, of_loss_C.sum() / total, torch.zeros_like(total)).clamp(max=0.0)
    return of_loss_C - price * of_cost_C
