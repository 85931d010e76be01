"""Which channels a network can spare together: a gate on every class, learned while the weights stand still.

How scope `learned` shares the budget of a prune step, after AutoBot (Castells & Yeom, arXiv 2111.09635): each class of
channels that may leave has a gate in [0, 1], the loss on training images is minimised over the gates alone, within the
budget, and the gates are driven to 0 or 1. What is removed is then chosen by `app/pruning/budget.py`, with the gates as
scores. Loss curves cut one group at a time; gates close in all groups at once, so that what the layers lose together counts.

Differences from the paper. Ties cost nothing: a gate belongs to a class, wherever it appears. The cost is no penalty
with a weight to tune but a bound that holds at every step (`_shift`): before each forward pass one number is subtracted
from all logits, so that the exact cost of the gated network is what is allowed at that step. The derivative of the loss follows along
this surface, which makes the multiplier of the constraint, loss per cost saved, an outcome.

Where a gate acts. A network without a class is the network in which the slices of its consumers are zero: every way
from a channel that may leave to the logits passes a weight that multiplies it (an axis of role "in"; channels for which
this is not so are pinned). So the gate scales these slices and nothing else: it acts once on every such way, whatever
norms, activations, joins and depthwise convolutions lie before, and at 0 and 1 the network is exactly the masked one.

Axes: N batch, C classes, K classes of images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from app.errors import Diverged
from app.network.cost import FLOAT_BYTES, CostMeasure, cost
from app.network.graph import Graph
from app.pruning.budget import choose_removals
from app.pruning.channel_classes import Classes
from app.pruning.group_limits import prunable_groups
from app.pruning.incremental_cost import IncrementalCost
from app.spec.prune import Budget, Prune
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
RAMP = 0.5  # part of the steps in which the cost falls from the whole network's to the budget
WARM, COLD = 1.0, 0.1  # what logits are divided by, first and last
HALVINGS = 30
FURTHEST = 60.0  # of the shift, in temperatures: beyond it a gate is 0 or 1 in float64


class GatedCost:
    """The cost of a network whose classes are there in part, as a differentiable function of their gates.

    With gates of 0 and 1 it is the integer that `IncrementalCost` counts, `bytes` without the header of the file.
    """

    def __init__(self, graph: Graph, classes: Classes, measure: CostMeasure, device: torch.device) -> None:
        model = IncrementalCost(graph, classes)
        slots = model.slots_of_widths()
        self._count = len(slots)
        self._ids = _indices([i for each in slots for i in each.ids.tolist()], device)
        self._of = _indices([number for number, each in enumerate(slots) for _ in each.ids], device)
        repeats = [each.repeat for each in slots for _ in each.ids]
        self._repeats = torch.tensor(repeats, dtype=torch.float64, device=device)
        factor = {"macs": "macs", "params": "params", "bytes": "stored"}[measure]
        products = [product for product in model.products() if getattr(product, factor)]
        most = max(len(product.widths) for product in products)
        padded = [[*product.widths, *[self._count] * (most - len(product.widths))] for product in products]
        self._widths = torch.tensor(padded, dtype=torch.int64, device=device).reshape(len(products), most)
        unit = FLOAT_BYTES if measure == "bytes" else 1
        self._factors = torch.tensor(
            [float(unit * getattr(product, factor)) for product in products], dtype=torch.float64, device=device
        )

    def __call__(self, gates_C: Tensor) -> Tensor:
        """The cost with these gates, by class number, float64: a scalar."""
        widths = torch.zeros(self._count, dtype=torch.float64, device=gates_C.device)
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
                ids = torch.from_numpy(axis.slots.runs(1)).to(weight.device)
                self._axes.setdefault(f"{axis.layer}.{axis.tensor}", []).append((ids, tuple(shape)))
        self._parameters = parameters

    def __call__(self, images_NCx: Tensor, gates_C: Tensor) -> Tensor:
        """The logits `N x K`; differentiable by the gates alone."""
        scaled = dict(self._parameters)
        for name, axes in self._axes.items():
            for ids, shape in axes:
                scaled[name] = scaled[name] * gates_C[ids].to(scaled[name].dtype).view(shape)
        logits_NK: Tensor = functional_call(self._network, scaled, (images_NCx,))
        return logits_NK


@dataclass(frozen=True)
class _Openings:
    """Which gates are learned, by class number, and which stand: `whole_C` is 1 where a class stays, else 0.

    `floors` has for each group that may shrink its classes and how many of them stay at least.
    """

    free: Tensor
    whole_C: Tensor
    floors: tuple[tuple[Tensor, int], ...]

    def gates(self, logits_C: Tensor, temperature: float) -> Tensor:
        """The gates of all classes. The strongest of each group, as many as its floor, stand open."""
        gates_C = torch.where(self.free, torch.sigmoid(logits_C / temperature), self.whole_C)
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
        look: Called before every step; may raise to leave.

    Raises:
        BudgetUnreachable: The floors do not let the cost fall that far.
        Diverged: The loss of the gated network is not finite.
    """
    assert step.budget is not None
    assert step.budget.cost_measure is not None
    device = precision.device
    gated, cost_of = GatedNetwork(network, classes), GatedCost(network.graph, classes, step.budget.cost_measure, device)
    openings = _openings(network.graph, classes, step, scores, start, allowed, device)
    logits_C = _first_logits(network.graph, classes, step, scores, device).requires_grad_()
    optimizer = torch.optim.Adam([logits_C], lr=RATE, betas=MOMENTA)
    size = min(LARGEST_BATCH, max(SMALLEST_BATCH, images // STEPS))
    steps = min(STEPS, max(1, images // size))
    whole = float(cost_of(openings.whole_C))
    with eval_mode(network):
        for number, (images_NCx, labels_N) in enumerate(itertools.islice(_small_batches(plain, size), steps), start=1):
            look()
            part = number / steps
            temperature = WARM * (COLD / WARM) ** part
            target = whole * min(1.0, allowed / whole) ** min(1.0, part / RAMP)
            _shift(logits_C, openings, cost_of, target, temperature)
            gates_C = openings.gates(logits_C, temperature)
            with precision.autocast():
                logits_NK = gated(images_NCx, gates_C)
            loss = cross_entropy(logits_NK.float(), labels_N)
            if not bool(torch.isfinite(loss)):
                raise Diverged("the loss of the network behind learned gates is not finite")
            logits_C.grad = _along_the_surface(loss, cost_of(gates_C), logits_C)
            optimizer.step()
        _shift(logits_C, openings, cost_of, allowed, COLD)
    found = openings.gates(logits_C.detach(), COLD).cpu().numpy()
    return {c: float(found[c]) for c in classes.all().tolist()}


def _openings(
    graph: Graph,
    classes: Classes,
    step: Prune,
    scores: Mapping[int, float],
    start: Graph,
    allowed: int,
    device: torch.device,
) -> _Openings:
    """Which gates are free, and which stand. Raises BudgetUnreachable."""
    assert step.budget is not None
    measure = step.budget.measure
    finest = {"round_to": step.round_to or 1, "scope": "layer"}  # whatever blocks the removal will have
    wanted = step.model_copy(update=finest | {"budget": Budget.model_validate({measure: max(2, allowed)})})
    smallest = choose_removals(graph, classes, scores, wanted, start=start).floor_dropped
    most = step.model_copy(update=finest | {"budget": Budget.model_validate({measure: 1.0})})
    forced = choose_removals(graph, classes, scores, most, start=start, baseline=cost(graph)).dropped
    whole = np.ones(classes.slot_count)
    whole[list(forced)] = 0.0
    free = np.zeros(classes.slot_count, dtype=np.bool_)
    floors = []
    for group in prunable_groups(graph, classes, wanted, shared=True):
        free[group.classes] = True
        least = len(group.classes) - len(smallest.intersection(group.classes.tolist()))
        floors.append((torch.from_numpy(group.classes).to(device), least))
    return _Openings(torch.from_numpy(free).to(device), torch.from_numpy(whole).to(device), tuple(floors))


def _first_logits(
    graph: Graph, classes: Classes, step: Prune, scores: Mapping[int, float], device: torch.device
) -> Tensor:
    """By class number: the scores of each group with mean 0 and standard deviation 1, so that all groups start alike."""
    logits_C = np.zeros(classes.slot_count)
    for group in prunable_groups(graph, classes, step.model_copy(update={"round_to": step.round_to or 1}), shared=True):
        values = np.array([scores[c] for c in group.classes.tolist()], dtype=np.float64)
        logits_C[group.classes] = (values - values.mean()) / max(float(values.std()), np.finfo(np.float64).tiny)
    return torch.from_numpy(logits_C).to(device)


def _small_batches(plain: Callable[[], LabelledBatches], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `size` images, the last of each larger one smaller; from the first one again where they end."""
    while True:
        seen = 0
        for images_NCx, labels_N in plain():
            seen += len(labels_N)
            yield from zip(images_NCx.split(size), labels_N.split(size), strict=True)
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


def _indices(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
