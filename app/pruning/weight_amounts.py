"""How much of each layer's weights a step sets to zero: by a pattern, by a threshold, by a sparsity, by its share of one.

    for amount in weight_amounts(names, step):
        match amount: ...                       # the four cases; `assert_never` for another

The dry run (`zeros.py`) counts what these come to, the worker (`worker/pruning/weight_masks.py`) chooses the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from app.pruning.weight_matrix import pattern_of
from app.spec.prune import Prune, PruneOverride

_NO_OVERRIDE = PruneOverride.model_construct()


@dataclass(frozen=True)
class ByPattern:
    """At most `kept` of `of` weights in a row along the inputs of the layer stay."""

    layer: str
    kept: int
    of: int


@dataclass(frozen=True)
class ByThreshold:
    """The layer's weights whose absolute value is below `threshold` are removed; `own`: an override states it."""

    layer: str
    threshold: float
    own: bool


@dataclass(frozen=True)
class BySparsity:
    """The part `sparsity` (0 to 1) of the layer's weights is removed; `own`: an override states it."""

    layer: str
    sparsity: float
    own: bool


@dataclass(frozen=True)
class Shared:
    """The part `sparsity` (0 to 1) of the weights of all these layers: one ranking of all, or by shares (`erk`)."""

    layers: tuple[str, ...]
    sparsity: float


Amount = ByPattern | ByThreshold | BySparsity | Shared


def weight_amounts(layers: Iterable[str], step: Prune) -> list[Amount]:
    """The layers divided by what says how many of their weights the step removes; in order, `Shared` last.

    Args:
        layers: Names of those that the step prunes: without what `why_dense` gives a reason for.
        step: With structure weights, n:m or blocks.
    """
    amounts: list[Amount] = []
    shared: list[str] = []
    for layer in layers:
        own = _amount_of(layer, step)
        if own is None:
            shared.append(layer)
        else:
            amounts.append(own)
    if shared:
        assert step.sparsity is not None
        amounts.append(Shared(tuple(shared), step.sparsity))
    return amounts


def _amount_of(layer: str, step: Prune) -> ByPattern | ByThreshold | BySparsity | None:
    """What the layer is pruned by where it counts alone; None where it shares a sparsity with others."""
    override = step.overrides.get(layer, _NO_OVERRIDE)
    if step.structure == "n:m":
        return ByPattern(layer, *pattern_of(step, layer))
    if override.threshold is not None:
        return ByThreshold(layer, override.threshold, own=True)
    if override.sparsity is not None:
        return BySparsity(layer, override.sparsity, own=True)
    if step.threshold is not None:
        return ByThreshold(layer, step.threshold, own=False)
    assert step.sparsity is not None, "a prune step of weights has a sparsity or a threshold"
    if step.scope == "layer" and step.criterion != "erk":
        return BySparsity(layer, step.sparsity, own=False)
    return None
