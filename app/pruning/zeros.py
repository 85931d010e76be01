"""What a step that sets weights to zero will do to each layer, as far as that is known before training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, assert_never

from app.network.node import Node
from app.pruning.sparsity_allocation import equal_blocks_to_remove, erk_kept
from app.pruning.weight_amounts import ByPattern, BySparsity, ByThreshold, Shared, weight_amounts
from app.pruning.weight_matrix import WeightMatrix, erk_axes, weight_matrix, why_dense
from app.spec.prune import Prune


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
    by_name = {node.name: node for node in nodes}
    found: dict[str, LayerZeros] = {}
    unsure = set(guessed)
    for amount in weight_amounts(by_name, step):
        match amount:
            case ByPattern(layer, kept, of):
                reason = f"{step.criterion}, {kept} of {of} inputs in a row stay"
                found[layer] = _zeros_of_pattern(by_name[layer], kept, of, already.get(layer, 0), reason)
            case ByThreshold(layer, threshold, own):
                reason = f"threshold {threshold}{' of its own' if own else ''}: depends on the trained weights"
                found[layer] = LayerZeros(None, False, reason)
            case BySparsity(layer, sparsity, own):
                reason = f"sparsity {sparsity} of its own"
                if not own:
                    reason = f"{_what(step)}, sparsity {sparsity} of each layer"
                found[layer] = _zeros_of_sparsity(by_name[layer], step, sparsity, already.get(layer, 0), reason)
            case Shared(layers, sparsity):
                count = _zeros_of_erk if step.criterion == "erk" else _zeros_of_ranking
                found |= count([by_name[layer] for layer in layers], step, sparsity, already)
                if step.criterion == "erk" and not unsure.isdisjoint(layers):
                    unsure.update(layers)  # what one layer keeps is taken from the others
            case _:
                assert_never(amount)
    return {name: found[name]._replace(exact=found[name].exact and name not in unsure) for name in by_name}


def _what(step: Prune) -> str:
    if step.structure == "blocks":
        return f"{step.criterion} of blocks of {' x '.join(map(str, step.block_shape))}"
    return step.criterion


def _zeros_of_pattern(node: Node, kept: int, of: int, already: int, reason: str) -> LayerZeros:
    zeros = weight_matrix(node).elements // of * (of - kept)
    # zeros that were there before may stand where the pattern would have kept a weight
    return LayerZeros(max(zeros, already), already == 0, reason)


def _zeros_of_sparsity(node: Node, step: Prune, sparsity: float, already: int, reason: str) -> LayerZeros:
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


def _zeros_of_ranking(
    nodes: Sequence[Node], step: Prune, sparsity: float, already: Mapping[str, int]
) -> dict[str, LayerZeros]:
    """Each layer's share of the sum: of a ranking over all layers no more is known."""
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


def _zeros_of_erk(
    nodes: Sequence[Node], step: Prune, sparsity: float, already: Mapping[str, int]
) -> dict[str, LayerZeros]:
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
