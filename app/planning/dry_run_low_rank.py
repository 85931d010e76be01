"""What low rank and separable convolutions will do: which layers become products, of which ranks as far as is known.

Ranks that depend on trained weights are those of singular values whose squares fall along a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from app.compression.replacement import (
    Replacement,
    possible_parts,
    replace_layers,
    why_irreplaceable,
    written_product,
)
from app.errors import Fault, InvalidSpec
from app.network.cost import cost
from app.planning.named_layers import exclusion_faults, listed_reasons, why_unfit
from app.planning.planned_network import LayerPlan, PlannedNetwork, PlannedStep
from app.planning.unreached_budget import unreachable_fault, why_within
from app.pruning.budget import BudgetUnreachable
from app.spec.low_rank import LowRank, Separable
from app.validation.faults import MOST_FAULTS


def replacement_faults(network: PlannedNetwork, step: LowRank | Separable, pointer: str) -> Iterator[Fault]:
    """Layers that are named and are not there, or cannot be replaced; those that are estimated may be other layers yet."""
    reasons = why_irreplaceable(network.graph, step)
    yield from exclusion_faults(network.graph, step.exclude, f"{pointer}/exclude", done="replaced")
    for position, name in enumerate(step.layers or ()):
        reason = why_unfit(network.graph, name, done="replaced")
        if reason is None and name in step.exclude:
            reason = f"{name} is excluded: it cannot be named too"
        if reason is None and name in reasons and name not in network.estimated:
            reason = f"{name} stays as it is: {reasons[name]}"
        if reason:
            yield Fault(f"{pointer}/layers/{position}", reason, value=name)


def plan_replacement(network: PlannedNetwork, step: LowRank | Separable, pointer: str) -> PlannedStep:
    """The network with layers replaced by products, and a row for each convolution and linear layer.

    Raises InvalidSpec if nothing can be replaced, or the budget is out of reach.
    """
    try:
        done = replace_layers(network.graph, step, baseline=network.baseline)
    except BudgetUnreachable as exc:
        assert isinstance(step, LowRank)
        raise InvalidSpec([unreachable_fault(step, exc, pointer)]) from exc
    faults = [*islice(_useless_faults(step, done, pointer), MOST_FAULTS)]
    if faults and not network.estimated:
        raise InvalidSpec(faults)
    warnings = [Fault(at.pointer, f"as estimated, {at.message}", value=at.value) for at in faults]
    if not done.products and not faults:
        assert isinstance(step, LowRank), "separable convolutions depend on no weights"
        warnings.append(Fault(pointer, f"replaces nothing: {_why_nothing(network, step)}"))
    exact = _is_exact(step, done)
    after = replace(network, graph=done.graph, floor=done.floor)
    if not exact:
        parts = possible_parts(network.graph, done.layers)
        places = {place.name for layer in done.layers.values() for place in layer.places}
        after = replace(
            after,
            possible=network.possible | parts,
            estimated=network.estimated | parts | places,
            estimates_widths=True,
        )
    rows = _rows(network, done, f"by {step.type}" if exact else f"by {step.type}; estimate", exact, pointer)
    return PlannedStep(after, tuple(rows), tuple(warnings))


def _rows(network: PlannedNetwork, done: Replacement, by: str, exact: bool, pointer: str) -> Iterator[LayerPlan]:
    for node in network.weighted:
        home, width = node.home, node.shape[0]
        if home not in done.products:
            known = exact or home not in done.layers
            yield LayerPlan(node.name, "keep", width, width, known, done.kept[node.name], pointer)
        else:
            how = f"{written_product(done.layers[home], done.products[home])}, {by}"
            yield LayerPlan(node.name, "replace", width, width, exact, how, pointer)
    for node in done.graph.nodes:
        if node.name not in network.graph:
            yield LayerPlan(node.name, "insert", None, node.shape[0], exact, f"{node.type}, {by}", pointer)


def _useless_faults(step: LowRank | Separable, done: Replacement, pointer: str) -> Iterator[Fault]:
    """Where no layer at all is replaced, whatever the weights are, or one that is named is not."""
    exact = _is_exact(step, done)
    if not done.layers or (exact and not done.products and not _has_budget(step)):
        at = f"{pointer}/rank" if done.layers else pointer
        yield Fault(at, f"no layer can be replaced: {listed_reasons(done.kept) or 'none has weights'}")
    elif _has_rank(step):
        for position, name in enumerate(step.layers or ()):
            if name not in done.products:
                yield Fault(f"{pointer}/layers/{position}", f"{name}: {done.kept[name]}", value=name)


def _is_exact(step: LowRank | Separable, done: Replacement) -> bool:
    """Whether the worker will do just this, whatever the trained weights are."""
    if isinstance(step, Separable) or _has_rank(step):
        return True
    return _has_budget(step) and not done.products


def _has_rank(step: LowRank | Separable) -> bool:
    return isinstance(step, LowRank) and step.rank is not None


def _has_budget(step: LowRank | Separable) -> bool:
    return isinstance(step, LowRank) and step.budget is not None


def _why_nothing(network: PlannedNetwork, step: LowRank) -> str:
    if step.budget is None:
        return "estimated ranks cost no less than the layers; those of the trained weights may be smaller"
    return why_within(step.budget, cost(network.graph), network.baseline)
