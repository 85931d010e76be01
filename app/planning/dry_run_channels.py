"""What pruning of channels will do: the width of each layer, round by round as the worker removes channels.

Widths are exact where they depend on no scores: scope `layer`, and few enough channels to work out every round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from app.errors import Fault, InvalidSpec
from app.network.blocks import WEIGHTED
from app.network.cost import Cost, cost
from app.network.graph import Graph
from app.network.node import Node
from app.planning.named_layers import listed_reasons
from app.planning.planned_network import LayerPlan, PlannedNetwork, PlannedStep, weighted_layers
from app.planning.unreached_budget import unreachable_fault, why_within
from app.pruning.budget import BudgetUnreachable, Removals, choose_block, choose_removals, choose_removals_in_blocks
from app.pruning.channel_classes import Classes, TooManyChannels, channel_classes, shrink_graph
from app.pruning.group_limits import prunable_groups, why_kept
from app.spec.budget import Budget
from app.spec.prune import Prune
from app.spec.sensitivity import Sensitivity

MOST_SIMULATED = 30_000  # channels over the rounds of an iterative schedule; with more only the last is worked out


def count_channels(graph: Graph) -> int:
    """Channels of the outputs of all layers; a flattened one has those of its input."""
    return sum(node.shape[0] if node.type != "flatten" else node.input_shapes[0][0] for node in graph.nodes)


def plan_channels(network: PlannedNetwork, step: Prune, pointer: str) -> PlannedStep:
    """The network without the channels that `step` removes, and a row for each convolution and linear layer.

    Raises InvalidSpec if nothing may be removed, or the budget is out of reach.
    """
    before = network.graph
    classes = _classes(before, pointer)
    measured = step.budget is not None and step.budget.cost_measure is None
    warnings = []
    if measured:
        step, warning = _counted_step(network, step, classes, pointer)
        warnings.append(warning)
    try:
        block, final = choose_block(before, classes, step, baseline=network.baseline)
    except BudgetUnreachable as exc:
        raise InvalidSpec([unreachable_fault(step, exc, pointer)]) from exc
    removals, after = _removed_by_rounds(network, step, classes, final)
    if not removals.dropped and not measured:
        warnings.append(Fault(pointer, f"removes nothing: {_why_nothing(network, step)}"))
    exact = step.scope == "layer" and _is_simulated(before, step) and not measured
    # what may remain at the end of the job is what may remain after its last step
    done = replace(network, graph=after, floor=removals.floor)
    if not exact:
        names = {node.name for node in network.weighted}
        done = replace(done, estimates_widths=True, estimated=network.estimated | names)
    reasons = why_kept(before, classes, step, block)
    rows = tuple(_row(node, after[node.name], step, exact, reasons, before, pointer) for node in network.weighted)
    return PlannedStep(done, rows, (*warnings, *_channel_warnings(before, step, pointer)))


def plan_sensitivity(network: PlannedNetwork, options: Sensitivity, pointer: str) -> PlannedStep:
    """The network as it is, and a row for each convolution and linear layer: measured, or why not.

    Raises InvalidSpec if no group of channels may be cut.
    """
    step = options.step(options.kept[-1])
    classes = _classes(network.graph, pointer)
    reasons = why_kept(network.graph, classes, step)
    if not prunable_groups(network.graph, classes, step):
        held = listed_reasons(reasons, "; ", most=None)
        raise InvalidSpec([Fault(pointer, f"no group of channels may be cut: {held}")])
    rows = [
        LayerPlan(node.name, "keep", node.shape[0], node.shape[0], True, reasons.get(node.name, "measured"), pointer)
        for node in network.weighted
    ]
    return PlannedStep(network, tuple(rows))


def _classes(graph: Graph, pointer: str) -> Classes:
    try:
        return channel_classes(graph)
    except TooManyChannels as exc:
        raise InvalidSpec([Fault(pointer, str(exc), limit=exc.limit)]) from exc


def _counted_step(network: PlannedNetwork, step: Prune, classes: Classes, pointer: str) -> tuple[Prune, Fault]:
    """`step` with a budget of MACs instead of one of latency, which only the worker can measure; a warning that says so.

    A fraction of the time is planned as the same fraction of the MACs, milliseconds as no removal.
    """
    budget, dense = step.budget, network.baseline.macs
    assert budget is not None
    whole = step.model_copy(update={"budget": Budget(macs=dense), "round_to": step.round_to or 1})
    try:
        smallest = choose_removals(network.graph, classes, None, whole, baseline=network.baseline)
    except BudgetUnreachable as exc:
        raise InvalidSpec([Fault(pointer, str(exc))]) from exc
    if not smallest.floor_dropped:
        reasons = listed_reasons(why_kept(network.graph, classes, step), "; ", most=None)
        raise InvalidSpec([Fault(f"{pointer}/budget/latency_ms", f"no channel may be removed: {reasons}")])
    macs, shown = _macs_for_latency(budget, cost(network.graph), network.baseline, smallest.floor)
    message = f"a latency is measured on the worker, in ONNX Runtime: {shown}"
    warning = Fault(f"{pointer}/budget/latency_ms", message)
    return step.model_copy(update={"budget": Budget(macs=max(2, macs))}), warning


def _macs_for_latency(budget: Budget, now: Cost, baseline: Cost, floor: Cost) -> tuple[int, str]:
    """(MACs that a plan shows for a budget of latency, what it shows as words)."""
    share = budget.allowed_ms(1.0)
    if budget.absolute or share > 1:
        return now.macs, "the plan shows the network before it instead"
    macs = int(share * baseline.macs)
    if macs >= floor.macs:
        return macs, f"the plan shows {share:g} of the MACs instead"
    part = floor.macs / max(1, baseline.macs)
    shown = (
        f"the plan shows the smallest network that may remain, with {part:.3g} of the MACs: the budget may be missed"
    )
    return floor.macs, shown


def _removed_by_rounds(
    network: PlannedNetwork, step: Prune, classes: Classes, final: Removals
) -> tuple[Removals, Graph]:
    """What is removed, and the graph without it: round by round, as the worker does it, where the rounds are few.

    `final` is what a single round removes: it says that the budget can be reached.
    """
    start = graph = network.graph
    if step.rounds == 1 or not _is_simulated(start, step):
        return final, shrink_graph(start, final.dropped, classes)
    dropped: frozenset[int] = frozenset()
    for number in range(1, step.rounds + 1):
        now = channel_classes(graph)
        removed = choose_removals_in_blocks(
            graph, now, None, step, start=start, baseline=network.baseline, fraction=number / step.rounds
        )
        graph, dropped = shrink_graph(graph, removed.dropped, now), dropped | removed.dropped
    reached = cost(graph)
    return Removals(dropped, reached, final.floor, final.floor_dropped, reached), graph


def _is_simulated(graph: Graph, step: Prune) -> bool:
    """Whether every round is worked out; a single one is, whatever the size."""
    return step.rounds == 1 or step.rounds * count_channels(graph) <= MOST_SIMULATED


def _row(
    node: Node,
    after: Node,
    step: Prune,
    exact: bool,
    reasons: Mapping[str, str],
    graph: Graph,
    pointer: str,
) -> LayerPlan:
    """What happens to one layer of `graph`; `reasons` say why layers keep their width."""
    before_width, after_width = node.shape[0], after.shape[0]
    if after_width != before_width:
        rounded = "" if step.round_to is None else f", round_to {step.round_to}"
        reason = f"{step.scope} {step.criterion}{rounded}" + ("" if exact else "; estimate")
        return LayerPlan(node.name, "narrow", before_width, after_width, exact, reason, pointer)
    inputs_before, inputs_after = node.input_shapes[0][0], after.input_shapes[0][0]
    kept = reasons.get(node.name, "within the budget as it is")
    if inputs_after != inputs_before:
        source = _source(graph, node)
        reason = f"inputs follow {source}; width {before_width} stays: {kept}" if source else f"width stays: {kept}"
        return LayerPlan(node.name, "follow", inputs_before, inputs_after, exact, reason, pointer)
    return LayerPlan(node.name, "keep", before_width, before_width, True, kept, pointer)


def _source(graph: Graph, node: Node) -> str | None:
    """The nearest layer with weights, or join, that `node` reads."""
    name = node.inputs[0]
    while name in graph:
        source = graph[name]
        if source.type in WEIGHTED or len(source.inputs) > 1:
            return name
        name = source.inputs[0]
    return None


def _why_nothing(network: PlannedNetwork, step: Prune) -> str:
    if step.budget is None:
        return f"sparsity {step.sparsity} is less than half of the smallest removal in every group (see round_to)"
    return why_within(step.budget, cost(network.graph), network.baseline)


def _channel_warnings(graph: Graph, step: Prune, pointer: str) -> Iterator[Fault]:
    if step.criterion == "bn_scale" and not any(node.type == "batch_norm" for node in graph.nodes):
        yield Fault(f"{pointer}/criterion", "there is no batch norm to score by: every layer is ranked by l2")
    if step.budget is None or step.budget.macs is None:
        return
    owners = [node for node in weighted_layers(graph) if node.shares is None]
    macs_of = {node.name: sum(place.macs for place in graph.places(node.name)) for node in owners}
    heaviest = max(owners, key=lambda node: macs_of[node.name])
    of_macs = macs_of[heaviest.name] / max(1, sum(macs_of.values()))
    of_params = heaviest.params / max(1, sum(node.params for node in owners))
    if of_macs - of_params > 0.5:
        message = (
            f"{heaviest.name} has {of_macs:.0%} of the MACs but {of_params:.0%} "
            "of the parameters: MACs and bytes will not fall together"
        )
        yield Fault(pointer, message)
