"""How much a channel or a weight matters: one number each, float64 on the CPU, higher is kept longer.

    scores = channel_scores(network, classes, "l2", seed=seed)                        # class -> score
    scores = channel_scores(network, classes, "taylor", seed=seed, batches=batches)   # needs data
    scores = weight_scores("conv1.weight", weight, "l1", seed=seed)                   # one a weight

A class of channels owns slices of several tensors: P, the producers (output side of convolutions and linear layers),
Q, the consumers (input side), and B, the batch norms between them; n is the number of tensors that contribute.

| criterion | score of a class | source |
|---|---|---|
| `l1` | (1/n) sum over P, Q of the absolute weights | Li et al., arXiv 1608.08710 (P only) |
| `l2` | (1/n) sum over P, Q, B of the squares, no root | Fang et al., arXiv 2301.12900 |
| `bn_scale` | (1/n) sum over B of the absolute scale; `l2` without any | Liu et al., arXiv 1708.06519 |
| `fpgm` | sum of the distances of its P slices to those of every class of its group | He et al., arXiv 1811.00250 |
| `taylor` | mean over batches of (sum over P of output * gradient)^2 | Molchanov et al., arXiv 1906.10771 |
| `lamp` | its `l2` score / the sum of those of its group that are not weaker | after Lee et al., arXiv 2010.07611 |
| `activation` | (1/n) sum over P of the mean absolute output | Molchanov et al., arXiv 1611.06440 |
| `random` | uniform, from the seed and the group | the baseline |

An output is taken after the normalisation and the activation that alone read it.

The names stand in `app/spec/prune.py`; `CHANNEL_SCORES` and `WEIGHT_SCORES` have the function of each.

Sums are taken in float64 by one thread, so that neither the number of threads nor the machine decides a near-tie. Only
fpgm's are products of matrices: they agree to 14 digits, and equal filters tie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from app.errors import Diverged
from app.network.blocks import WEIGHTED
from app.pruning.channel_classes import Classes, Group
from app.pruning.channel_rules import FloatArray, IntArray, OwnedAxis, Role
from app.spec.prune import Criterion
from worker.network import Network
from worker.precision import Precision
from worker.pruning.activations import mean_activations
from worker.pruning.eval_mode import eval_mode
from worker.training.micro_batches import split_batch

DISTANCE_ROWS = 128  # of fpgm's distance matrix at a time
NEAR = 1e-2  # of |a|^2 + |b|^2: a squared distance below it has lost two of its sixteen digits

LabelledBatches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def prunable_weights(network: Network) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers by parameter name, in the order of the graph."""
    parameters = dict(network.named_parameters())
    return {
        f"{node.name}.weight": parameters[f"{node.name}.weight"].detach()
        for node in network.graph.nodes
        if node.type in WEIGHTED and node.shares is None
    }


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise Diverged where a tensor holds NaN (`NaN < t` is false, and it sorts last) or an infinity."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise Diverged(f"{name} holds a value that is not finite, so the network cannot be pruned")


def weight_scores(name: str, weight: Tensor, criterion: Criterion, *, seed: int) -> npt.NDArray[Any]:
    """The importance of each weight, flat in row-major order, at least 0.

    Its absolute value (`l1`, `l2`, and `erk`, which only says how many of each layer stay) in the weight's own type, so
    that equal weights are ties; uniform, from the seed and the name (`random`); the square divided by the sum of the
    squares that are not smaller, of equal weights those from itself on (`lamp`: Lee et al., arXiv 2010.07611), so that
    the last of the largest has exactly 1.
    """
    return WEIGHT_SCORES[criterion](name, weight, seed)


@dataclass(frozen=True)
class _Channels:
    """What the scores of channels are computed from; all below `seed` only where a criterion needs data."""

    network: Network
    classes: Classes
    seed: int
    batches: LabelledBatches | None
    loss: Loss
    precision: Precision | None
    images_at_a_time: int | None

    def autocast(self) -> AbstractContextManager[Any]:
        """The job's number format, but float16: without a scale gradients below 6e-8 are zero in it."""
        if self.precision is None or self.precision.scales_gradients:
            return nullcontext()
        return self.precision.autocast()

    @property
    def data(self) -> LabelledBatches:
        """The batches of a criterion that needs them."""
        assert self.batches is not None, "this criterion needs batches"
        return self.batches


def channel_scores(
    network: Network,
    classes: Classes,
    criterion: Criterion,
    *,
    seed: int,
    batches: LabelledBatches | None = None,
    loss: Loss = torch.nn.functional.cross_entropy,
    precision: Precision | None = None,
    images_at_a_time: int | None = None,
) -> dict[int, float]:
    """The importance of every class of the network's graph.

    Args:
        network: Left as it is: weights, gradients and mode.
        classes: Of `network.graph`.
        criterion: See the table above.
        seed: For `random`.
        batches: For `taylor` and `activation`: (images, labels) on the network's device.
        loss: For `taylor`: (logits, labels) -> scalar, a mean over the images.
        precision: What `taylor` computes in; None: float32.
        images_at_a_time: `taylor` computes so many of a batch and sums their gradients before it squares; None: all.

    Raises:
        Diverged: A weight, or a gradient, is not finite.
    """
    check_finite(dict(network.named_parameters()))
    of = _Channels(network, classes, seed, batches, loss, precision, images_at_a_time)
    scores = CHANNEL_SCORES[criterion](of)
    return {c: float(scores[c]) for c in classes.all().tolist()}


def _numpy(tensor: Tensor) -> FloatArray:
    return tensor.detach().cpu().double().numpy()


def _generator(seed: int, *names: str) -> np.random.Generator:
    digest = hashlib.sha256("\n".join([str(seed), *names]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _per_class(values: FloatArray, axis: OwnedAxis, classes: Classes) -> FloatArray:
    """Sums per class (by class number) of one value for each position of an axis."""
    sums = np.zeros(classes.slot_count)
    np.add.at(sums, axis.slots.ids, values.reshape(-1, axis.slots.repeat).sum(axis=1))
    return sums


def _rows(tensor: FloatArray, axis: int) -> FloatArray:
    """The tensor as a matrix: one row for each position of `axis`."""
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def _mean_over_tensors(
    network: Network, classes: Classes, roles: tuple[Role, ...], measure: Callable[[FloatArray], FloatArray]
) -> tuple[FloatArray, IntArray]:
    """(mean over the contributing tensors of the summed measure, number of them), both by class number."""
    parameters = dict(network.named_parameters())
    sums, contributions = np.zeros(classes.slot_count), np.zeros(classes.slot_count, dtype=np.int64)
    for axis in classes.axes:
        if axis.role in roles and axis.tensor == "weight":
            values = measure(_numpy(parameters[f"{axis.layer}.weight"]))
            sums += _per_class(_rows(values, axis.axis).sum(axis=1), axis, classes)
            contributions[np.unique(axis.slots.ids)] += 1
    return sums / np.maximum(contributions, 1), contributions


def _l1(of: _Channels) -> FloatArray:
    return _mean_over_tensors(of.network, of.classes, ("out", "in"), np.abs)[0]


def _l2(of: _Channels) -> FloatArray:
    return _mean_over_tensors(of.network, of.classes, ("out", "in", "norm"), np.square)[0]


def _bn_scale(of: _Channels) -> FloatArray:
    scores, contributions = _mean_over_tensors(of.network, of.classes, ("norm",), np.abs)
    without = contributions == 0  # classes of groups without normalisation
    scores[without] = _mean_over_tensors(of.network, of.classes, ("out", "in"), np.square)[0][without]
    return scores


def _activation(of: _Channels) -> FloatArray:
    return mean_activations(of.network, of.classes, of.data)


def _random(of: _Channels) -> FloatArray:
    scores = np.zeros(of.classes.slot_count)
    for group in of.classes.groups:
        key = sorted(f"{layer}.{tensor}.{axis}" for layer, tensor, axis in of.classes.key(group))
        scores[group.classes] = _generator(of.seed, *key).random(len(group.classes))
    return scores


def _fpgm(of: _Channels) -> FloatArray:
    classes, parameters = of.classes, dict(of.network.named_parameters())
    scores = np.zeros(classes.slot_count)
    for group in classes.groups:
        producers = [classes.axes[i] for i in group.axes if classes.axes[i].role == "out"]
        slices = [
            _slices(_rows(_numpy(parameters[f"{axis.layer}.weight"]), axis.axis), axis, group) for axis in producers
        ]
        if slices and int(group.classes[0]) not in classes.pins:
            scores[group.classes] = distance_sums(np.concatenate(slices, axis=1))
    return scores


def distance_sums(rows: FloatArray) -> FloatArray:
    """For each row the sum of its distances to all rows, float64; equal rows are at distance 0 and have equal sums.

    |a - b|^2 = |a|^2 + |b|^2 - 2 ab by products of matrices, around the mean of all rows. That loses the digits that a
    and b have in common: pairs that are near are computed again, by their difference.
    """
    rows = rows + 0.0  # no row differs from another by the sign of a zero
    numbers: dict[bytes, int] = {}
    row_of: IntArray = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows])
    _, firsts, counts = np.unique(row_of, return_index=True, return_counts=True)
    distinct = rows[firsts]
    centred = distinct - distinct.mean(axis=0)
    squares, sums = np.square(centred).sum(axis=1), np.zeros(len(distinct))
    for start in range(0, len(distinct), DISTANCE_ROWS):
        stop = min(start + DISTANCE_ROWS, len(distinct))
        both = squares[start:stop, None] + squares[start:]
        distances = both - 2 * _products(centred[start:stop], centred[start:])
        near = np.nonzero(distances <= NEAR * both)
        np.sqrt(distances, out=distances, where=distances > 0)
        distances[near] = _differences(distinct, near[0] + start, near[1] + start)
        sums[start:stop] += distances @ counts[start:]
        sums[stop:] += counts[start:stop] @ distances[:, stop - start :]
    return sums[row_of]


def _products(left: FloatArray, right: FloatArray) -> FloatArray:
    """left @ right.T by torch, which keeps to the job's number of threads."""
    products: FloatArray = (torch.from_numpy(left) @ torch.from_numpy(right).T).numpy()
    return products


def _differences(rows: FloatArray, left: IntArray, right: IntArray) -> FloatArray:
    """The distance of each row of `left` to that of `right` at the same place."""
    distances = np.zeros(len(left))
    for start in range(0, len(left), DISTANCE_ROWS):
        some = slice(start, start + DISTANCE_ROWS)
        distances[some] = np.sqrt(np.square(rows[left[some]] - rows[right[some]]).sum(axis=1))
    return distances


def _slices(rows: FloatArray, axis: OwnedAxis, group: Group) -> FloatArray:
    """For each class of the group its rows, joined; classes with fewer rows than others end in zeros."""
    ids = axis.slots.runs(1)
    order = np.argsort(ids, kind="stable")
    order = order[np.isin(ids[order], group.classes)]
    place = np.searchsorted(group.classes, ids[order])
    rank = np.arange(len(order)) - np.searchsorted(ids[order], ids[order])
    table = np.zeros((len(group.classes), int(rank.max()) + 1, rows.shape[1]))
    table[place, rank] = rows[order]
    return table.reshape(len(group.classes), -1)


def _lamp(of: _Channels) -> FloatArray:
    """Each `l2` score relative to those of its group."""
    scores = _l2(of)
    relative = np.zeros_like(scores)
    for group in of.classes.groups:
        relative[group.classes] = _relative(scores[group.classes])
    return relative


def _relative(squares: FloatArray) -> FloatArray:
    """Each number divided by the sum of those that are not smaller, in a stable order: the largest gives exactly 1.

    Summed from the large end, in float64: total - prefix would cancel.
    """
    order = np.argsort(squares, kind="stable")
    rest = np.cumsum(squares[order][::-1])[::-1]
    relative = np.zeros_like(squares)
    relative[order] = np.divide(squares[order], rest, out=np.zeros_like(rest), where=rest > 0)
    return relative


def _taylor(of: _Channels) -> FloatArray:
    """The mean over batches of the squared derivative of the loss by a gate on the producers' outputs.

    The derivative is read off the parameters, without hooks: after a batch norm it is scale * its gradient + bias *
    its gradient, elsewhere the sum of weight * gradient plus bias * gradient. Eval mode: a removal is judged by what
    the finished network does.
    """
    gates = _gates(of.network, of.classes)
    squares, count = np.zeros(of.classes.slot_count), 0
    with eval_mode(of.network):
        for images_NCx, labels_N in of.data:
            gate = np.zeros(of.classes.slot_count)
            for images_part, labels_part in _pieces(images_NCx, labels_N, of.images_at_a_time):
                gate += _derivatives(of, gates, images_part, labels_part) * (len(labels_part) / len(labels_N))
            squares += gate**2
            count += 1
    if not np.isfinite(squares).all():
        raise Diverged("a gradient is not finite, so taylor cannot rank the channels")
    return squares / max(count, 1)


def _pieces(images_NCx: Tensor, labels_N: Tensor, most: int | None) -> list[tuple[Tensor, Tensor]]:
    return split_batch(images_NCx, labels_N, 1 if most is None else -(-len(labels_N) // most))


def _derivatives(of: _Channels, gates: list[OwnedAxis], images_NCx: Tensor, labels_N: Tensor) -> FloatArray:
    """By class number: the derivative of the mean loss of some images by a gate on the producers' outputs."""
    wanted = {f"{axis.layer}.{axis.tensor}" for axis in gates}
    parameters = {name: p for name, p in of.network.named_parameters() if name in wanted}
    with torch.enable_grad():
        with of.autocast():
            logits_NK = of.network(images_NCx)
        gradients = torch.autograd.grad(of.loss(logits_NK, labels_N), list(parameters.values()))
    products = {
        name: _numpy(p) * _numpy(gradient) for (name, p), gradient in zip(parameters.items(), gradients, strict=True)
    }
    found = np.zeros(of.classes.slot_count)
    for axis in gates:
        sums = _rows(products[f"{axis.layer}.{axis.tensor}"], axis.axis).sum(axis=1)
        found += _per_class(sums, axis, of.classes)
    return found


def _gates(network: Network, classes: Classes) -> list[OwnedAxis]:
    """The axes whose parameters carry the derivative of a gate on each producer's output.

    Of a producer at several places it is the sum over these: after the batch norm of each, or after the layer itself
    where one of them has none.
    """
    graph = network.graph
    gates = []
    for name in dict.fromkeys(axis.layer for axis in classes.axes if axis.role == "out"):  # one order in every process
        readers = [graph.consumers(place.name) for place in graph.places(name)]
        if all(len(following) == 1 and following[0].type == "batch_norm" for following in readers):
            norms = {following[0].name for following in readers}
            gates += [a for a in classes.axes if a.layer in norms and a.tensor in ("weight", "bias")]
        else:
            gates += [a for a in classes.axes if a.layer == name and (a.role == "out" or a.tensor == "bias")]
    return gates


def _absolute(name: str, weight: Tensor, seed: int) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = weight.detach().abs().cpu().numpy().ravel()
    return values


def _relative_squares(name: str, weight: Tensor, seed: int) -> npt.NDArray[Any]:
    return _relative(np.square(_absolute(name, weight, seed), dtype=np.float64))


def _random_weights(name: str, weight: Tensor, seed: int) -> npt.NDArray[Any]:
    return _generator(seed, name).random(weight.numel())


CHANNEL_SCORES: Mapping[Criterion, Callable[[_Channels], FloatArray]] = {
    "l1": _l1,
    "l2": _l2,
    "taylor": _taylor,
    "bn_scale": _bn_scale,
    "fpgm": _fpgm,
    "lamp": _lamp,
    "activation": _activation,
    "random": _random,
}
"""By class number; what stands at the numbers of no class has no meaning."""
WEIGHT_SCORES: Mapping[Criterion, Callable[[str, Tensor, int], npt.NDArray[Any]]] = {
    "l1": _absolute,
    "l2": _absolute,
    "lamp": _relative_squares,
    "erk": _absolute,
    "random": _random_weights,
}
"""(name of the parameter, weight, seed) -> one a weight."""
