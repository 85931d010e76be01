"""What a step that sets weights to zero will do to each layer, as far as that is known before training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from app.network.node import Node
from app.pruning.sparsity_allocation import equal_blocks_to_remove, erk_kept
from app.pruning.weight_matrix import WeightMatrix, erk_axes, pattern_of, weight_matrix, why_dense
from app.spec.prune import Prune, PruneOverride

_NO_OVERRIDE = PruneOverride.model_construct()


class LayerZeros(NamedTuple):
    """Zeros of one layer's weight after a step (None: the trained weights decide), whether the count is exact, why."""

    zeros: int | None
    exact: bool
    reason: str


def dense_layers(nodes: Sequence[Node], step: Prune) -> dict[str, str]:
    """Those of the layers that the step leaves as they are -> the reason."""
    reasons = {node.name: why_dense(node, step) for node in nodes}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def planned_zeros(
    nodes: Sequence[Node], step: Prune, already: Mapping[str, int], guessed: Collection[str]
) -> dict[str, LayerZeros]:
    """The zeros of each of `nodes` after the step.

    Args:
        nodes: The layers that it prunes: without those of `dense_layers`.
        step: With structure weights, n:m or blocks.
        already: Layer -> zeros before the step.
        guessed: Layers whose size, or number of zeros before, is an estimate: what is planned for them is one too.
    """
    found: dict[str, LayerZeros] = {}
    shared: list[Node] = []
    for node in nodes:
        override = step.overrides.get(node.name, _NO_OVERRIDE)
        if step.structure == "n:m":
            found[node.name] = _of_pattern(node, step, already.get(node.name, 0))
        elif override.threshold is not None:
            reason = f"threshold {override.threshold} of its own: depends on the trained weights"
            found[node.name] = LayerZeros(None, False, reason)
        elif override.sparsity is not None:
            reason = f"sparsity {override.sparsity} of its own"
            found[node.name] = _of_sparsity(node, step, override.sparsity, already.get(node.name, 0), reason)
        elif step.sparsity is None:
            reason = f"threshold {step.threshold}: depends on the trained weights"
            found[node.name] = LayerZeros(None, False, reason)
        elif step.scope == "layer" and step.criterion != "erk":
            reason = f"{_what(step)}, sparsity {step.sparsity} of each layer"
            found[node.name] = _of_sparsity(node, step, step.sparsity, already.get(node.name, 0), reason)
        else:
            shared.append(node)
    if shared and step.sparsity is not None:
        found |= (_of_erk if step.criterion == "erk" else _of_ranking)(shared, step, step.sparsity, already)
    unsure = set(guessed)
    if step.criterion == "erk" and unsure.intersection(node.name for node in shared):
        unsure.update(node.name for node in shared)  # what one layer keeps is taken from the others
    return {
        node.name: found[node.name]._replace(exact=found[node.name].exact and node.name not in unsure) for node in nodes
    }


def _what(step: Prune) -> str:
    if step.structure == "blocks":
        return f"{step.criterion} of blocks of {' x '.join(map(str, step.block_shape))}"
    return step.criterion


def _of_pattern(node: Node, step: Prune, already: int) -> LayerZeros:
    kept, of = pattern_of(step, node.name)
    zeros = weight_matrix(node).elements // of * (of - kept)
    reason = f"{step.criterion}, {kept} of {of} inputs in a row stay"
    # zeros that were there before may stand where the pattern would have kept a weight
    return LayerZeros(max(zeros, already), already == 0, reason)


def _of_sparsity(node: Node, step: Prune, sparsity: float, already: int, reason: str) -> LayerZeros:
    matrix = weight_matrix(node)
    wanted = round(sparsity * matrix.elements)
    if step.structure != "blocks":
        return LayerZeros(min(max(already, wanted), matrix.elements - 1), True, reason)
    size = matrix.equal_blocks(*step.block_shape)
    if size is None or already:
        return LayerZeros(max(already, wanted), False, f"{reason}; as near as whole blocks come")
    count = equal_blocks_to_remove(_blocks(matrix, step) - 1, size, wanted)
    return LayerZeros(count * size, True, f"{reason}: {count} of {_blocks(matrix, step)} blocks")


def _blocks(matrix: WeightMatrix, step: Prune) -> int:
    high, wide = matrix.blocks(*step.block_shape)
    return matrix.groups * high * wide


def _of_ranking(
    nodes: Sequence[Node], step: Prune, sparsity: float, already: Mapping[str, int]
) -> dict[str, LayerZeros]:
    """Of a ranking over all layers only the sum is known; each layer is given its share."""
    sizes = {node.name: weight_matrix(node).elements for node in nodes}
    total = sum(sizes.values())
    wanted = rest = max(round(sparsity * total), sum(already.get(name, 0) for name in sizes))
    reason = f"global {_what(step)}, sparsity {sparsity} over all layers; each layer's part is an estimate"
    found = {}
    for position, (name, size) in enumerate(sizes.items()):
        part = rest if position == len(sizes) - 1 else min(rest, wanted * size // total)
        found[name] = LayerZeros(part, False, reason)
        rest -= part
    return found


def _of_erk(nodes: Sequence[Node], step: Prune, sparsity: float, already: Mapping[str, int]) -> dict[str, LayerZeros]:
    sizes = {node.name: weight_matrix(node).elements for node in nodes}
    kept = erk_kept(
        {node.name: erk_axes(node) for node in nodes},
        {name: max(1, size - already.get(name, 0)) for name, size in sizes.items()},
        sum(sizes.values()) - round(sparsity * sum(sizes.values())),
    )
    return {
        name: LayerZeros(
            size - kept[name],
            True,
            f"erk, sparsity {sparsity} over all layers: {kept[name] / size:.4f} of this one stay",
        )
        for name, size in sizes.items()
    }
