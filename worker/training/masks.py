"""Masks: which weights are zero, and how they stay zero while the network is trained.

    masks = weight_masks(network, step, sparsity, seed=seed, previous=masks)   # exact counts, stable ties
    masks.apply(network); masks.mask_optimizer(optimizer, network)             # when (re)pruned
    ... loss.backward()
    masks.mask_gradients(network)            # before clipping: dead weights must not count in the norm
    ... optimizer.step()
    masks.apply(network)                     # +0.0, bit for bit
    ... ema.update()
    masks.mask_tensors(ema)

All four are needed: a masked gradient alone does not hold a weight at zero, because momentum, Adam's averages and the
average of the weights remember. Masking the weight alone does not either: its momentum stays alive, and it jumps when
the mask opens.

`sparsity` is the part of the *whole* tensor (or of all prunable weights together) that is zero, so pruning twice at
0.5 is 0.5. Prunable are the weights of convolutions and linear layers; never biases, normalisation and `prelu`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

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

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating]


class Remembering(Protocol):
    """An optimizer: torch's, or one that keeps what it remembers in the same place."""

    @property
    def state(self) -> Mapping[Tensor, Mapping[str, Any]]:
        """Parameter -> key -> what is remembered."""


class Masks:
    """For some parameters of a network, by name, a float32 tensor of their shape: 1 where a weight lives, else 0."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)
        # The parameter objects of the network seen last: walking its modules at every step would cost as much as the
        # masking itself.
        self._seen: weakref.ref[Network] | None = None
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([], [])

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __len__(self) -> int:
        return len(self._masks)

    def zeros(self) -> int:
        """How many weights are pruned."""
        return sum(mask.numel() - int(torch.count_nonzero(mask)) for mask in self._masks.values())

    def sizes(self) -> int:
        """How many weights the masks cover."""
        return sum(mask.numel() for mask in self._masks.values())

    @torch.no_grad()
    def apply(self, network: Network) -> None:
        """Set every pruned weight to +0.0. A weight that is not finite stays visible: zero times NaN is NaN."""
        parameters, masks = self._bound(network)
        if parameters:
            torch._foreach_mul_(parameters, masks)
            torch._foreach_add_(parameters, 0.0)  # -0.0 + 0.0 = +0.0: the same bytes whatever sign the weight had

    @torch.no_grad()
    def mask_gradients(self, network: Network) -> None:
        """Set the gradients of pruned weights to zero. To be called before clipping."""
        parameters, masks = self._bound(network)
        pairs = [(p.grad, mask) for p, mask in zip(parameters, masks, strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [mask for _, mask in pairs])

    @torch.no_grad()
    def mask_optimizer(self, optimizer: Remembering, network: Network) -> None:
        """Set the optimizer's memory of pruned weights (momentum, averages of gradients and squares) to zero."""
        for parameter, mask in zip(*self._bound(network), strict=True):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.copy_(torch.where(mask.to(value.device) != 0, value, torch.zeros_like(value)))

    @torch.no_grad()
    def mask_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Set pruned weights to +0.0, in place, in tensors that carry the parameters' names, such as an average."""
        for name, mask in self._masks.items():
            if name in tensors:
                value = tensors[name]
                value.copy_(torch.where(mask.to(value.device) != 0, value, torch.zeros_like(value)))

    def state(self) -> dict[str, Tensor]:
        """The masks as bool tensors on the CPU, by parameter name: one byte a weight in a checkpoint."""
        return {name: (mask != 0).cpu() for name, mask in self._masks.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Self:
        """The masks that `state()` wrote, on `device`."""
        return cls({name: mask.to(device=device, dtype=torch.float32) for name, mask in state.items()})

    def _bound(self, network: Network) -> tuple[list[Tensor], list[Tensor]]:
        if self._seen is None or self._seen() is not network:
            parameters = dict(network.named_parameters())
            self._pairs = ([parameters[name] for name in self._masks], list(self._masks.values()))
            self._seen = weakref.ref(network)
        return self._pairs


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
