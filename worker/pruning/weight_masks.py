"""Which weights are set to zero: masks with exact counts and stable ties.

`sparsity` is the part of the *whole* tensor (or of all prunable weights together) that is zero, so pruning twice at
0.5 is 0.5. Prunable are the weights of convolutions and linear layers; never biases, normalisation and `prelu`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, assert_never

import numpy as np
import torch
from torch import Tensor

from app.errors import LayerEmptied
from app.network.node import Node
from app.pruning.channel_rules import BoolArray
from app.pruning.sparsity_allocation import erk_kept, sparsity_after
from app.pruning.weight_amounts import ByPattern, BySparsity, ByThreshold, Shared, weight_amounts
from app.pruning.weight_matrix import erk_axes, weight_matrix, why_dense
from app.spec.prune import Prune
from worker.network import Network
from worker.pruning.importance import check_finite, prunable_weights, weight_scores
from worker.pruning.semi_structured import BlockScores, WeightScores, blocks_keep, pattern_keep
from worker.training.masks import Masks


class _Layer(NamedTuple):
    """A layer whose weights may be removed; `dead` are those that were before, flat, or None."""

    node: Node
    weight: Tensor
    dead: BoolArray | None


def joined_masks(network: Network, step: Prune, sparsity: float | None, previous: Masks | None, *, seed: int) -> Masks:
    """The masks of `step` at this sparsity (`weight_masks`), and those of earlier steps for layers that it leaves alone."""
    new = weight_masks(network, step, sparsity, seed=seed, previous=previous)
    if previous is None:
        return new
    names = [name for name, _ in network.named_parameters()]
    held = {name: previous[name] for name in names if name in previous and name not in new}
    return Masks(held | {name: new[name] for name in names if name in new})


def weight_masks(
    network: Network, step: Prune, sparsity: float | None, *, seed: int, previous: Masks | None = None
) -> Masks:
    """The masks that make `sparsity` (0 to 1) of the prunable weights zero; None: by `step.threshold` or a pattern.

    Exactly `round(sparsity * n)` zeros (half to even), of each layer or of all together as `step.scope` says; weakest
    first, equal scores in the order of the layers and of their elements; `erk` gives each layer its share of them. With
    blocks the count is the nearest that whole blocks allow (`semi_structured.py`). What `previous` pruned stays pruned.
    Excluded layers, and those that a pattern or blocks do not fit, have no mask and are not part of `n`. Layers with an
    override count on their own; where `sparsity` is on its way to `step.sparsity`, their own is as far. Every layer keeps
    its strongest weight, or block, however sparse.

    Raises:
        Diverged: A weight is not finite.
        LayerEmptied: A threshold leaves nothing of a layer.
    """
    layers = _prunable_layers(network, step, previous)
    check_finite({f"{name}.weight": layer.weight for name, layer in layers.items()})
    keep: dict[str, BoolArray] = {}
    for amount in weight_amounts(layers, step):
        match amount:
            case ByPattern(name, kept, of):
                scores = _scores(name, layers[name], step, seed)
                keep[name] = pattern_keep(scores, weight_matrix(layers[name].node), kept, of, layers[name].dead)
            case ByThreshold(name, threshold):
                keep[name] = _keep_above_threshold(name, layers[name], threshold)
            case BySparsity(name, target, own):
                part = _on_the_way(target, sparsity, step.sparsity) if own else _stated(sparsity)
                keep |= _keep_strongest({name: layers[name]}, part, step, seed)
            case Shared(names):
                keep |= _keep_strongest({name: layers[name] for name in names}, _stated(sparsity), step, seed)
            case _:
                assert_never(amount)
    return Masks({f"{name}.weight": _mask(keep[name], layer.weight) for name, layer in layers.items()})


def pruned_part(network: Network, step: Prune, masks: Masks | None) -> float:
    """The part (0 to 1) that is pruned already of the weights to which the sparsity of `step` applies."""
    zeros = weights = 0
    for name, layer in _prunable_layers(network, step, masks).items():
        override = step.overrides.get(name)
        if override is None or (override.sparsity is None and override.threshold is None):
            weights += layer.weight.numel()
            zeros += 0 if layer.dead is None else int(np.count_nonzero(layer.dead))
    return zeros / max(1, weights)


def _prunable_layers(network: Network, step: Prune, previous: Masks | None) -> dict[str, _Layer]:
    """The layers whose weights the step removes, by name, in the order of the graph."""
    layers = {}
    for key, weight in prunable_weights(network).items():
        node = network.graph[key.removesuffix(".weight")]
        if why_dense(node, step) is None:
            pruned = previous is not None and key in previous
            dead = (previous[key] == 0).cpu().numpy().ravel() if previous is not None and pruned else None
            layers[node.name] = _Layer(node, weight, dead)
    return layers


def _on_the_way(own: float, sparsity: float | None, target: float | None) -> float:
    """A layer's own sparsity when the others are at `sparsity` of `target`: the same part of the way, by density."""
    if sparsity is None or target is None or sparsity == target:
        return own
    return sparsity_after(own, math.log1p(-sparsity) / math.log1p(-target))


def _stated(sparsity: float | None) -> float:
    assert sparsity is not None, "a step without a sparsity has a threshold or a pattern"
    return sparsity


def _keep_strongest(layers: Mapping[str, _Layer], sparsity: float, step: Prune, seed: int) -> dict[str, BoolArray]:
    """Which weights stay without `sparsity` of those of these layers: one ranking over all, or by their shares (`erk`)."""
    if step.structure == "blocks":
        blocks = {}
        for name, layer in layers.items():
            values, matrix = _scores(name, layer, step, seed), weight_matrix(layer.node)
            blocks[name] = BlockScores.of(values, matrix, step.block_shape, step.criterion, layer.dead)
        return blocks_keep(blocks, sparsity)
    scores = {name: _scores(name, layer, step, seed) for name, layer in layers.items()}
    for name, values in scores.items():
        if (gone := layers[name].dead) is not None:
            values[gone] = -1.0  # below every score, which is at least 0: pruned first
    sizes = {name: values.size for name, values in scores.items()}
    zeros = round(sparsity * sum(sizes.values()))
    if step.criterion != "erk":
        return _strongest(scores, zeros)
    alive = {name: int(np.count_nonzero(values >= 0)) for name, values in scores.items()}
    axes = {name: erk_axes(layer.node) for name, layer in layers.items()}
    kept = erk_kept(axes, alive, sum(sizes.values()) - zeros)
    return {name: _strongest({name: scores[name]}, sizes[name] - kept[name])[name] for name in scores}


def _scores(name: str, layer: _Layer, step: Prune, seed: int) -> WeightScores:
    return weight_scores(f"{name}.weight", layer.weight, step.criterion, seed=seed)


def _mask(keep: BoolArray, weight: Tensor) -> Tensor:
    mask = torch.empty_like(weight, dtype=torch.float32)  # the weight's memory layout: foreach kernels want them alike
    return mask.copy_(torch.from_numpy(keep).reshape(weight.shape))


def _keep_above_threshold(name: str, layer: _Layer, threshold: float) -> BoolArray:
    """Which weights are not below the threshold, compared in the weight's own type: 0.7 is 0.69999999 in float32."""
    weight = layer.weight
    limit = torch.tensor(threshold, dtype=weight.dtype, device=weight.device)
    keep: BoolArray = (~(weight.abs() < limit)).cpu().numpy().ravel()
    if layer.dead is not None:
        keep &= ~layer.dead
    if not keep.any():
        largest = float(weight.abs().max())
        raise LayerEmptied(
            f"threshold {threshold} leaves no weight of layer {name}, whose largest is {largest:.4g}",
            hint=f"lower the threshold below {largest:.4g}, or exclude the layer",
        )
    return keep


def _strongest(scores: Mapping[str, WeightScores], zeros: int) -> dict[str, BoolArray]:
    """Which weights stay when the weakest `zeros` of all of them are removed.

    Selection, not sorting: everything below the k-th score is removed, of the weights that equal it the first ones.
    """
    flat = np.concatenate(list(scores.values()))
    start = 0
    for values in scores.values():  # the last of the strongest weights of each layer always stays
        start += values.size
        flat[start - 1 - int(values[::-1].argmax())] = math.inf
    already = int(np.count_nonzero(flat < 0))
    count = min(max(zeros, already), flat.size - len(scores))
    keep = np.ones(flat.size, dtype=np.bool_)
    if count > 0:
        limit = np.partition(flat, count - 1)[count - 1]
        keep[flat < limit] = False
        ties = np.flatnonzero(flat == limit)
        keep[ties[: count - int(np.count_nonzero(~keep))]] = False
    parts = np.split(keep, np.cumsum([values.size for values in scores.values()])[:-1])
    return dict(zip(scores, parts, strict=True))
