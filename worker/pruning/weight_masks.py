"""Which weights are set to zero: masks with exact counts and stable ties.

`sparsity` is the part of the *whole* tensor (or of all prunable weights together) that is zero, so pruning twice at
0.5 is 0.5. Prunable are the weights of convolutions and linear layers; never biases, normalisation and `prelu`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from app.errors import LayerEmptied
from app.network.node import Node
from app.pruning.sparsity_allocation import erk_kept
from app.pruning.weight_matrix import erk_axes, pattern_of, weight_matrix, why_dense
from app.spec.prune import Criterion, Prune, PruneOverride
from worker.network import Network
from worker.pruning.importance import check_finite, prunable_weights, weight_scores
from worker.pruning.semi_structured import BlockScores, blocks_keep, pattern_keep
from worker.training.masks import Masks

BoolArray = npt.NDArray[np.bool_]


FloatArray = npt.NDArray[np.floating]


def weight_masks(
    network: Network, step: Prune, sparsity: float | None, *, seed: int, previous: Masks | None = None
) -> Masks:
    """The masks that make `sparsity` (0 to 1) of the prunable weights zero; None: by `step.threshold` or a pattern.

    Exactly `round(sparsity * n)` zeros (half to even), of each layer or of all together as `step.scope` says; weakest
    first, equal scores in the order of the layers and of their elements; `erk` gives each layer its share of them. With
    blocks the count is the nearest that whole blocks allow (`semi_structured.py`). What `previous` pruned stays pruned.
    Excluded layers, and those that a pattern or blocks do not fit, have no mask and leave `n`. Layers with an override
    count on their own; where `sparsity` is on its way to `step.sparsity`, their own is as far. Every layer keeps its
    strongest weight, or block, however sparse.

    Raises `Diverged` where a weight is not finite, `LayerEmptied` where a threshold leaves nothing of a layer.
    """
    weights = prunable_weights(network)
    nodes = {name: network.graph[_layer(name)] for name in weights}
    weights = {name: weight for name, weight in weights.items() if why_dense(nodes[name], step) is None}
    check_finite(weights)
    dead = {
        name: (previous[name] == 0).cpu().numpy().ravel() if previous is not None and name in previous else None
        for name in weights
    }
    keep: dict[str, BoolArray] = {}
    shared: dict[str, Tensor] = {}
    for name, weight in weights.items():
        override = step.overrides.get(_layer(name), _NO_OVERRIDE)
        threshold = override.threshold if override.sparsity is None else None
        if threshold is None and override.sparsity is None and sparsity is None:
            threshold = step.threshold
        if step.structure == "n:m":
            scores = weight_scores(name, weight, step.criterion, seed=seed)
            kept, of = pattern_of(step, _layer(name))
            keep[name] = pattern_keep(scores, weight_matrix(nodes[name]), kept, of, dead[name])
        elif threshold is not None:
            keep[name] = _above(name, weight, threshold, dead[name])
        elif override.sparsity is not None:
            own = _on_the_way(override.sparsity, sparsity, step.sparsity)
            keep |= _weakest_gone({name: weight}, own, step, nodes, dead, seed)
        else:
            shared[name] = weight
    if shared and sparsity is not None:
        together = [shared] if step.scope == "global" or step.criterion == "erk" else [{n: shared[n]} for n in shared]
        for part in together:
            keep |= _weakest_gone(part, sparsity, step, nodes, dead, seed)
    return Masks({name: _mask(keep[name], weight) for name, weight in weights.items() if name in keep})


def pruned_part(network: Network, step: Prune, masks: Masks | None) -> float:
    """The part (0 to 1) that is pruned already of the weights to which the sparsity of `step` applies."""
    zeros = weights = 0
    for name, weight in prunable_weights(network).items():
        override = step.overrides.get(_layer(name), _NO_OVERRIDE)
        own = override.sparsity is not None or override.threshold is not None
        if own or why_dense(network.graph[_layer(name)], step) is not None:
            continue
        weights += weight.numel()
        zeros += 0 if masks is None or name not in masks else int(torch.count_nonzero(masks[name] == 0))
    return zeros / max(1, weights)


def _weakest_gone(
    weights: Mapping[str, Tensor],
    sparsity: float,
    step: Prune,
    nodes: Mapping[str, Node],
    dead: Mapping[str, BoolArray | None],
    seed: int,
) -> dict[str, BoolArray]:
    """Which weights stay when `sparsity` of these layers go: one ranking over them all, or by their shares (`erk`)."""
    if step.structure == "blocks":
        blocks = {}
        for name, weight in weights.items():
            values, matrix = weight_scores(name, weight, step.criterion, seed=seed), weight_matrix(nodes[name])
            blocks[name] = BlockScores.of(values, matrix, step.block_shape, step.criterion, dead[name])
        return blocks_keep(blocks, sparsity)
    by_size: Criterion = "l2" if step.criterion == "erk" else step.criterion
    scores = {name: weight_scores(name, weight, by_size, seed=seed) for name, weight in weights.items()}
    for name, values in scores.items():
        if (gone := dead[name]) is not None:
            values[gone] = -1.0  # below every score, which is at least 0: pruned first
    sizes = {name: values.size for name, values in scores.items()}
    zeros = round(sparsity * sum(sizes.values()))
    if step.criterion != "erk":
        return _strongest(scores, zeros)
    alive = {name: int(np.count_nonzero(values >= 0)) for name, values in scores.items()}
    kept = erk_kept({name: erk_axes(nodes[name]) for name in scores}, alive, sum(sizes.values()) - zeros)
    return {name: _strongest({name: scores[name]}, sizes[name] - kept[name])[name] for name in scores}


_NO_OVERRIDE = PruneOverride.model_construct()


def _on_the_way(own: float, sparsity: float | None, target: float | None) -> float:
    """A layer's own sparsity when the others are at `sparsity` of `target`: the same part of the way, by density."""
    if sparsity is None or target is None or sparsity == target:
        return own
    return float(1 - (1 - own) ** (math.log1p(-sparsity) / math.log1p(-target)))


def _layer(parameter: str) -> str:
    return parameter.rsplit(".", 1)[0]


def _mask(keep: BoolArray, weight: Tensor) -> Tensor:
    mask = torch.empty_like(weight, dtype=torch.float32)  # the weight's memory layout: foreach kernels want them alike
    return mask.copy_(torch.from_numpy(keep).reshape(weight.shape))


def _above(name: str, weight: Tensor, threshold: float, dead: BoolArray | None) -> BoolArray:
    """Which weights are not below the threshold, compared in the weight's own type: 0.7 is 0.69999999 in float32."""
    limit = torch.tensor(threshold, dtype=weight.dtype, device=weight.device)
    keep: BoolArray = (~(weight.abs() < limit)).cpu().numpy().ravel()
    if dead is not None:
        keep &= ~dead
    if not keep.any():
        largest = float(weight.abs().max())
        raise LayerEmptied(
            f"threshold {threshold} leaves no weight of layer {_layer(name)}, whose largest is {largest:.4g}",
            hint=f"lower the threshold below {largest:.4g}, or exclude the layer",
        )
    return keep


def _strongest(scores: Mapping[str, FloatArray], zeros: int) -> dict[str, BoolArray]:
    """Which of the weights survive when the weakest `zeros` of all of them go.

    Selection, not sorting: everything below the k-th score goes, of the weights that equal it the first ones.
    """
    flat = np.concatenate(list(scores.values()))
    start = 0
    for values in scores.values():  # the last of the strongest weights of each layer never goes
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
