"""What pruning will do, before anything is trained: widths, zeros and cost at the budgets, and the least possible."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

from app.compression.int8 import float_layers, integer_layers
from app.compression.replacement import (
    Replacement,
    possible_parts,
    replace_layers,
    why_irreplaceable,
    written_product,
)
from app.errors import Fault, InvalidSpec, JsonValue
from app.network.blocks import WEIGHTED, last_layers
from app.network.cost import Cost, cost
from app.network.graph import Graph
from app.network.node import Node
from app.pruning.budget import BudgetUnreachable, Removals, choose_block, choose_removals
from app.pruning.channel_classes import Classes, TooManyChannels, channel_classes, shrink_graph
from app.pruning.group_limits import prunable_groups, why_kept
from app.pruning.zeros import dense_layers, planned_zeros
from app.spec.low_rank import LowRank, Separable
from app.spec.optimizations import Optimization
from app.spec.prune import Budget, Prune, PruneOverride, Structure
from app.spec.quantize import Quantize
from app.spec.sensitivity import Sensitivity
from app.validation.faults import MOST_FAULTS
from app.validation.faults import pointer as pointer_to

Action = Literal["narrow", "follow", "keep", "mask", "insert", "replace"]

# Choosing channels takes about 6 us of a core for each channel of each layer's output: a second for ResNet-152.
MOST_CHOICES = 1_500_000  # channels over all steps of a job: nobody waits longer than this for a plan
MOST_SIMULATED = 30_000  # channels over the rounds of an iterative schedule; with more only its end is worked out
_CHANNEL_FIELDS = ("max_sparsity", "min_channels", "round_to")
_FOREIGN_FIELDS: dict[Structure, tuple[str, ...]] = {  # of overrides
    "weights": (*_CHANNEL_FIELDS, "pattern"),
    "blocks": (*_CHANNEL_FIELDS, "pattern", "threshold"),
    "n:m": (*_CHANNEL_FIELDS, "sparsity", "threshold"),
    "channels": ("threshold", "pattern"),
}
MOST_NAMED = 20  # layers that one message lists
_SIMILAR_AMONG = 200  # looking for a similar name among more takes longer than everything else


@dataclass(frozen=True)
class LayerPlan:
    """What one optimization does to one layer.

    `before` and `after` are widths (output channels or features); for `mask` non-zero weights; for `follow` input
    widths. None: not known before training, no layer on that side, or no weights of its own. `exact` is False where it
    depends on trained weights.
    """

    layer: str
    action: Action
    before: int | None
    after: int | None
    exact: bool
    reason: str
    optimization: str | None = None

    def document(self) -> dict[str, JsonValue]:
        """The row as it stands in an answer."""
        return {
            "layer": self.layer,
            "action": self.action,
            "before": self.before,
            "after": self.after,
            "exact": self.exact,
            "reason": self.reason,
            "optimization": self.optimization,
        }


@dataclass
class DryRun:
    """The network while its prune steps are gone through: the graph, the zeros of each layer's weights, the plan."""

    graph: Graph
    baseline: Cost
    zeros: dict[str, int] = field(default_factory=dict)
    rows: list[LayerPlan] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
    floor: Cost | None = None
    guessed: set[str] = field(default_factory=set)
    """Layers whose width, or number of zeros, is an estimate."""
    unsure: set[str] = field(default_factory=set)
    """Names of layers that come beside others or do not, as the trained weights decide."""
    estimated: bool = False
    """Whether widths are estimates."""
    choices: int = 0
    """Channels of the layers' outputs, summed over the steps that choose among them."""

    @property
    def cost(self) -> Cost:
        """The cost of the network as planned so far; zeros that depend on trained weights are not counted."""
        whole = cost(self.graph)
        return Cost(whole.params, whole.params - sum(self.zeros.values()), whole.macs, whole.bytes)

    def follow(self, step: Optimization, pointer: str) -> None:
        """Goes through one optimization, which stands at `pointer`; those before the first compression change nothing.

        Raises InvalidSpec as `prune` does.
        """
        if faults := [*islice(_unsure_faults(self.unsure, step, pointer), MOST_FAULTS)]:
            raise InvalidSpec(faults)
        if isinstance(step, Prune):
            self.prune(step, pointer)
        elif isinstance(step, Quantize):
            self._quantize(step, pointer)
        elif isinstance(step, LowRank | Separable):
            self._replace(step, pointer)

    def look(self, options: Sensitivity, pointer: str) -> None:
        """Checks that a table of sensitivities has something to look at, and says what stays whole.

        Raises InvalidSpec if a named layer is unknown, or no group of channels may be cut.
        """
        self._check_weighted(pointer)
        step = options.step(options.kept[-1])
        faults = _named_faults(self.graph, step, pointer)
        if faults:
            raise InvalidSpec(faults)
        self._count_choices(pointer)
        classes = self._classes(pointer)
        reasons = why_kept(self.graph, classes, step)
        if not prunable_groups(self.graph, classes, step):
            held = "; ".join(f"{layer} ({why})" for layer, why in reasons.items())
            raise InvalidSpec([Fault(pointer, f"no group of channels may be cut: {held}")])
        for node in _weighted(self.graph):
            why = reasons.get(node.name, "looked at")
            self.rows.append(LayerPlan(node.name, "keep", node.shape[0], node.shape[0], True, why, pointer))

    def prune(self, step: Prune, pointer: str) -> None:
        """Goes through one step of pruning, which stands at `pointer`.

        Raises InvalidSpec if a named layer is unknown or unfit, nothing may be removed, or the budget is out of reach.
        """
        self._check_weighted(pointer)
        faults = [*_named_faults(self.graph, step, pointer)]
        if faults:
            raise InvalidSpec(faults)
        if step.zeros:
            self._mask(step, pointer)
        else:
            self._narrow(step, pointer)

    def _check_weighted(self, pointer: str) -> None:
        if not _weighted(self.graph):
            raise InvalidSpec(
                [Fault(pointer, "the network has no convolution and no linear layer: nothing can be removed")]
            )

    def _quantize(self, step: Quantize, pointer: str) -> None:
        """Note which layers stay in float32, and where the file is right. The network, and so its cost, stays as it is."""
        unfit = (
            (position, name, _unfit(self.graph, name, done="quantized")) for position, name in enumerate(step.exclude)
        )
        faults = (Fault(f"{pointer}/exclude/{at}", reason, value=name) for at, name, reason in unfit if reason)
        if found := [*islice(faults, MOST_FAULTS)]:
            raise InvalidSpec(found)
        left = float_layers(self.graph, step.exclude)
        if not integer_layers(self.graph, step.exclude):
            at = f"{pointer}/exclude" if integer_layers(self.graph) else pointer
            held = "; ".join(f"{name} ({reason})" for name, reason in islice(left.items(), MOST_NAMED))
            raise InvalidSpec([Fault(at, f"no layer can be computed in 8 bits: {held or 'none has weights'}")])
        for name, reason in left.items():
            width = self.graph[name].shape[0]
            self.rows.append(LayerPlan(name, "keep", width, width, True, f"stays in float32: {reason}", pointer))
        if step.scheme == "int8_vnni":
            message = (
                "the 8-bit file will be right only on processors with VNNI or AMX, and on ARM, and be delivered only by "
                "a worker that has one; int8_static is right on every processor"
            )
            self.warnings.append(Fault(f"{pointer}/scheme", message, value=step.scheme))

    def _replace(self, step: LowRank | Separable, pointer: str) -> None:
        """Goes through one step that replaces layers by several smaller ones.

        Ranks that depend on trained weights are those of singular values whose squares fall along a line.
        """
        if faults := [*islice(_replacement_faults(self.graph, step, pointer, self.guessed), MOST_FAULTS)]:
            raise InvalidSpec(faults)
        self._count_choices(pointer)
        before = self.graph
        try:
            done = replace_layers(before, step, baseline=self.baseline)
        except BudgetUnreachable as exc:
            assert isinstance(step, LowRank)
            raise InvalidSpec([_unreachable(step, exc, pointer)]) from exc
        faults = [*islice(_useless_faults(step, done, pointer), MOST_FAULTS)]
        if faults and not self.guessed:
            raise InvalidSpec(faults)
        self.warnings += [Fault(at.pointer, f"as estimated, {at.message}", value=at.value) for at in faults]
        exact = _is_exact(step, done)
        by = f"by {step.type}" if exact else f"by {step.type}; estimate"
        for node in _weighted(before):
            home, width = node.home, node.shape[0]
            if home not in done.products:
                settled = exact or home not in done.layers
                self.rows.append(LayerPlan(node.name, "keep", width, width, settled, done.kept[node.name], pointer))
                continue
            how = f"{written_product(done.layers[home], done.products[home])}, {by}"
            self.rows.append(LayerPlan(node.name, "replace", width, width, exact, how, pointer))
        brought = [node for node in done.graph.nodes if node.name not in before]
        self.rows += [
            LayerPlan(node.name, "insert", None, node.shape[0], exact, f"{node.type}, {by}", pointer)
            for node in brought
        ]
        if not done.products and not faults:
            assert isinstance(step, LowRank)
            self.warnings.append(Fault(pointer, f"replaces nothing: {_why_nothing(step, cost(before), self.baseline)}"))
        if not exact:
            parts = possible_parts(before, done.layers)
            self.unsure |= parts
            self.estimated = True
            self.guessed |= parts | {place.name for layer in done.layers.values() for place in layer.places}
        self.graph, self.floor = done.graph, done.floor

    def _mask(self, step: Prune, pointer: str) -> None:
        nodes = [node for node in _weighted(self.graph) if node.shares is None]
        dense = dense_layers(nodes, step)
        faults = [_misfit(step, name, dense[name], pointer) for name in step.overrides if name in dense]
        if len(dense) == len(nodes):
            faults.append(_nothing_to_mask(step, dense, pointer))
        if faults and (not self.estimated or set(dense.values()) == {"excluded"}):
            raise InvalidSpec(faults[:MOST_FAULTS])
        # with the widths that the trained weights will decide it may be otherwise
        self.warnings += [replace(fault, message=f"as estimated, {fault.message}") for fault in faults[:MOST_NAMED]]
        self.warnings += _unused_fields(step, pointer)
        found = planned_zeros([node for node in nodes if node.name not in dense], step, self.zeros, self.guessed)
        if found and all(plan.exact and plan.zeros == self.zeros.get(name, 0) for name, plan in found.items()):
            message = "removes nothing: what would go is zero already, or less than one weight or block"
            self.warnings.append(Fault(pointer, message))
        for node in nodes:
            count = node.tensors["weight"].elements
            before = count - self.zeros.get(node.name, 0)
            if node.name in dense:
                exact = node.name not in self.guessed
                self.rows.append(LayerPlan(node.name, "keep", before, before, exact, dense[node.name], pointer))
                continue
            zeros, exact, reason = found[node.name]
            after = None if zeros is None else count - zeros
            self.rows.append(LayerPlan(node.name, "mask", before, after, exact, reason, pointer))
            if zeros is not None:
                self.zeros[node.name] = zeros
            if not exact:
                self.guessed.add(node.name)
        for node in _weighted(self.graph):
            if node.shares is not None:
                reason = f"uses the weights of {node.shares}"
                self.rows.append(LayerPlan(node.name, "follow", None, None, True, reason, pointer))

    def _narrow(self, step: Prune, pointer: str) -> None:
        before = self.graph
        self._count_choices(pointer)
        classes = self._classes(pointer)
        budget = step.budget
        measured = budget is not None and budget.latency_ms is not None
        if budget is not None and measured:
            step = self._stand_in(step, budget, classes, pointer)
        try:
            block, final = choose_block(before, classes, step, baseline=self.baseline)
        except BudgetUnreachable as exc:
            raise InvalidSpec([_unreachable(step, exc, pointer)]) from exc
        removals, after = self._removals(step, classes, final, block)
        self.graph = after
        # what may be left at the end of the job is what may be left after its last step
        self.floor = removals.floor
        exact = step.scope == "layer" and _is_simulated(before, step) and not measured
        if not exact:
            self.estimated = True
            self.guessed.update(node.name for node in _weighted(before))
        reasons = why_kept(before, classes, step, block)
        self.rows += [
            _narrowed(node, after[node.name], step, exact, reasons, before, pointer) for node in _weighted(before)
        ]
        if not removals.dropped and not measured:
            self.warnings.append(Fault(pointer, f"removes nothing: {_why_nothing(step, cost(before), self.baseline)}"))
        self.warnings += _channel_warnings(before, step, pointer)

    def _stand_in(self, step: Prune, budget: Budget, classes: Classes, pointer: str) -> Prune:
        """A step with a budget of MACs in the place of one of latency, which only the worker can measure.

        A fraction of the time is planned as the same fraction of the MACs, milliseconds as no removal.
        """
        whole = step.model_copy(update={"budget": Budget(macs=self.baseline.macs), "round_to": step.round_to or 1})
        try:
            floor = choose_removals(self.graph, classes, None, whole, baseline=self.baseline)
        except BudgetUnreachable as exc:
            raise InvalidSpec([Fault(pointer, str(exc))]) from exc
        if not floor.floor_dropped:
            reasons = "; ".join(f"{layer} ({why})" for layer, why in why_kept(self.graph, classes, step).items())
            raise InvalidSpec([Fault(f"{pointer}/budget/latency_ms", f"no channel may be removed: {reasons}")])
        share = budget.allowed_ms(1.0)
        in_ms = budget.absolute or share > 1
        macs, least = int(share * self.baseline.macs), floor.floor.macs
        if in_ms:
            macs, shown = cost(self.graph).macs, "the plan shows the network before it in its place"
        elif macs >= least:
            shown = f"the plan shows {share:g} of the MACs in its place"
        else:
            part, macs = least / max(1, self.baseline.macs), least
            shown = f"the plan shows the smallest network that may be left, with {part:.3g} of the MACs: the budget may be missed"
        message = f"a latency is measured on the worker, in ONNX Runtime: {shown}"
        self.warnings.append(Fault(f"{pointer}/budget/latency_ms", message))
        return step.model_copy(update={"budget": Budget(macs=max(2, macs))})

    def _count_choices(self, pointer: str) -> None:
        self.choices += _channels(self.graph)
        if self.choices > MOST_CHOICES:
            message = f"the layers have too many channels to choose from: {self.choices} over all steps so far"
            raise InvalidSpec([Fault(pointer, message, limit=MOST_CHOICES, value=self.choices)])

    def _classes(self, pointer: str) -> Classes:
        try:
            return channel_classes(self.graph)
        except TooManyChannels as exc:
            raise InvalidSpec([Fault(pointer, str(exc), limit=exc.limit)]) from exc

    def _removals(self, step: Prune, classes: Classes, final: Removals, block: int) -> tuple[Removals, Graph]:
        """What leaves, and the graph without it: round by round, as the worker does it, where the rounds are few.

        `final` is what leaves at once: it says that the budget can be reached.
        """
        rounds = step.schedule.steps or 1
        fractions = [n / rounds for n in range(1, rounds + 1)] if _is_simulated(self.graph, step) else [1.0]
        start = graph = self.graph
        dropped: frozenset[int] = frozenset()
        if len(fractions) == 1:
            return final, shrink_graph(start, final.dropped, classes)
        for fraction in fractions:
            now = channel_classes(graph)
            taken = choose_removals(
                graph, now, None, step, start=start, baseline=self.baseline, fraction=fraction, block=block
            )
            graph, dropped = shrink_graph(graph, taken.dropped, now), dropped | taken.dropped
        return Removals(dropped, cost(graph), final.floor, final.floor_dropped), graph


def _channels(graph: Graph) -> int:
    """Channels of the outputs of all layers; a flattened one has those of its input."""
    return sum(node.shape[0] if node.type != "flatten" else node.input_shapes[0][0] for node in graph.nodes)


def _is_simulated(graph: Graph, step: Prune) -> bool:
    """Whether every round is gone through; one is whatever the size."""
    rounds = step.schedule.steps or 1
    return rounds == 1 or rounds * _channels(graph) <= MOST_SIMULATED


def _weighted(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.type in WEIGHTED]


def _misfit(step: Prune, name: str, reason: str, pointer: str) -> Fault:
    """What is wrong with an override for a layer that the step leaves as it is."""
    override = step.overrides[name]
    at = pointer + pointer_to("overrides", name)
    if override.pattern is not None:
        at += "/pattern"
    return Fault(at, f"does not fit {name}: {reason}{_ADVICE[step.structure]}", value=override.pattern)


_ADVICE: dict[Structure, str] = {  # where no layer, or not the one that is named, can be masked
    "weights": "",
    "channels": "",
    "n:m": "; N:M needs a number of inputs that M divides",
    "blocks": "; choose smaller blocks",
}


def _nothing_to_mask(step: Prune, dense: Mapping[str, str], pointer: str) -> Fault:
    if set(dense.values()) == {"excluded"}:
        return Fault(f"{pointer}/exclude", "every layer with weights is excluded: nothing is left to prune")
    field = "pattern" if step.structure == "n:m" else "block"
    held = ", ".join(f"{name} ({reason})" for name, reason in list(dense.items())[:MOST_NAMED])
    return Fault(f"{pointer}/{field}", f"no layer can be pruned: {held}{_ADVICE[step.structure]}")


def _unused_fields(step: Prune, pointer: str) -> Iterator[Fault]:
    for name in _CHANNEL_FIELDS:
        if getattr(step, name) != Prune.model_fields[name].default:
            yield Fault(f"{pointer}/{name}", f"has no meaning for structure {step.structure}: it is not used")


def _narrowed(
    node: Node,
    after: Node,
    step: Prune,
    exact: bool,
    reasons: Mapping[str, str],
    graph: Graph,
    pointer: str,
) -> LayerPlan:
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


def _why_nothing(step: Prune | LowRank, now: Cost, baseline: Cost) -> str:
    if isinstance(step, LowRank) and step.budget is None:
        return "estimated ranks cost no less than the layers; those of the trained weights may be smaller"
    if step.budget is None:
        assert isinstance(step, Prune)
        return f"sparsity {step.sparsity} is less than half of the smallest removal in every group (see round_to)"
    measure = step.budget.measure
    present, allowed = getattr(now, measure), step.budget.allowed(getattr(baseline, measure))
    return f"the network has {present} {measure} and the budget allows {allowed}"


def _channel_warnings(graph: Graph, step: Prune, pointer: str) -> list[Fault]:
    warnings = []
    if step.criterion == "bn_scale" and not any(node.type == "batch_norm" for node in graph.nodes):
        warnings.append(
            Fault(f"{pointer}/criterion", "there is no batch norm to score by: every layer is ranked by l2")
        )
    if step.budget is not None and step.budget.macs is not None:
        owners = [node for node in _weighted(graph) if node.shares is None]
        macs_of = {node.name: sum(place.macs for place in graph.places(node.name)) for node in owners}
        macs, params = sum(macs_of.values()), sum(node.params for node in owners)
        heaviest = max(owners, key=lambda node: macs_of[node.name])
        of_macs, of_params = macs_of[heaviest.name] / max(1, macs), heaviest.params / max(1, params)
        if of_macs - of_params > 0.5:
            message = (
                f"{heaviest.name} has {of_macs:.0%} of the MACs but {of_params:.0%} "
                "of the parameters: MACs and bytes will not fall together"
            )
            warnings.append(Fault(pointer, message))
    return warnings


def _unreachable(step: Prune | LowRank, exc: BudgetUnreachable, pointer: str) -> Fault:
    if step.budget is None or exc.measure is None or exc.floor is None or exc.dense is None:
        return Fault(pointer, str(exc))
    value = getattr(step.budget, exc.measure)
    # rounded up, so that the limit is a budget that can be sent
    limit = math.ceil(exc.floor / exc.dense * 1e4) / 1e4 if value <= 1 else exc.floor
    message = f"the budget cannot be reached; the lowest reachable is {limit}: {exc}"
    return Fault(f"{pointer}/budget/{exc.measure}", message, limit=limit, value=value)


def _replacement_faults(
    graph: Graph, step: LowRank | Separable, pointer: str, guessed: Collection[str]
) -> Iterator[Fault]:
    """Layers that are named and are not there, or that cannot be replaced; those `guessed` may be other layers yet."""
    reasons = why_irreplaceable(graph, step)
    for position, name in enumerate(step.exclude):
        if reason := _unfit(graph, name, done="replaced"):
            yield Fault(f"{pointer}/exclude/{position}", reason, value=name)
    for position, name in enumerate(step.layers or ()):
        reason = _unfit(graph, name, done="replaced")
        if reason is None and name in step.exclude:
            reason = f"{name} is excluded: it cannot be named too"
        if reason is None and name in reasons and name not in guessed:
            reason = f"{name} stays as it is: {reasons[name]}"
        if reason:
            yield Fault(f"{pointer}/layers/{position}", reason, value=name)


def _useless_faults(step: LowRank | Separable, done: Replacement, pointer: str) -> Iterator[Fault]:
    """Where no layer at all is replaced, whatever the weights are, or one that is named is not."""
    exact = _is_exact(step, done)
    if not done.layers or (exact and not done.products and not (isinstance(step, LowRank) and step.budget)):
        held = ", ".join(f"{name} ({reason})" for name, reason in islice(done.kept.items(), MOST_NAMED))
        at = f"{pointer}/rank" if done.layers else pointer
        yield Fault(at, f"no layer can be replaced: {held or 'none has weights'}")
    elif isinstance(step, LowRank) and step.rank is not None:
        for position, name in enumerate(step.layers or ()):
            if name not in done.products:
                yield Fault(f"{pointer}/layers/{position}", f"{name}: {done.kept[name]}", value=name)


def _is_exact(step: LowRank | Separable, done: Replacement) -> bool:
    """Whether the worker will do just this, whatever the trained weights are."""
    if isinstance(step, Separable) or step.rank is not None:
        return True
    return step.budget is not None and not done.products


def _unsure_faults(unsure: Collection[str], step: Optimization, pointer: str) -> Iterator[Fault]:
    for field_name in ("exclude", "layers", "overrides"):
        for position, name in enumerate(getattr(step, field_name, None) or ()):
            if name in unsure:
                at = pointer + pointer_to(field_name, name if field_name == "overrides" else position)
                message = f"whether there will be a layer {name} depends on the trained weights: name the layer it is a part of"
                yield Fault(at, message, value=name)


def _named_faults(graph: Graph, step: Prune, pointer: str) -> list[Fault]:
    faults: list[Fault] = []
    for position, name in enumerate(step.exclude):
        reason = _unfit(graph, name)
        if reason:
            faults.append(Fault(f"{pointer}/exclude/{position}", reason, value=name))
        if len(faults) >= MOST_FAULTS:
            return faults
    last = {graph[name].home for name in last_layers(graph)}
    for name, override in step.overrides.items():
        at = pointer + pointer_to("overrides", name)
        reason = _unfit(graph, name)
        if reason is None and name in step.exclude:
            reason = f"{name} is excluded: it cannot have an override too"
        if reason is None and step.structure == "channels" and name in last and override.sparsity:
            reason = f"{name} gives the logits: its width is the number of classes and stays"
        if reason:
            faults.append(Fault(at, reason))
        else:
            faults += _override_faults(step, override, at)
        if len(faults) >= MOST_FAULTS:
            return faults
    if step.structure == "channels" and step.sparsity is not None and step.sparsity > step.max_sparsity:
        message = f"at most max_sparsity {step.max_sparsity} of a group may go: raise max_sparsity or lower sparsity"
        faults.append(Fault(f"{pointer}/sparsity", message, limit=step.max_sparsity, value=step.sparsity))
    return faults


def _override_faults(step: Prune, override: PruneOverride, at: str) -> list[Fault]:
    foreign = _FOREIGN_FIELDS[step.structure]
    faults = [
        Fault(f"{at}/{name}", f"has no meaning for structure {step.structure}", value=getattr(override, name))
        for name in foreign
        if getattr(override, name) is not None
    ]
    most = step.max_sparsity if override.max_sparsity is None else override.max_sparsity
    if step.structure == "channels" and override.sparsity is not None and override.sparsity > most:
        message = f"at most max_sparsity {most} of a group may go: raise max_sparsity or lower sparsity"
        faults.append(Fault(f"{at}/sparsity", message, limit=most, value=override.sparsity))
    return faults


def _unfit(graph: Graph, name: str, *, done: str = "pruned") -> str | None:
    """Why `name` cannot be excluded or overridden where layers are `done`; None if it can."""
    if name in graph:
        node = graph[name]
        if node.type not in WEIGHTED:
            return f"is a {node.type} layer: only convolutions and linear layers are {done}"
        return None if node.shares is None else f"has the weights of {node.shares}, which it shares: name {node.shares}"
    names = [node.name for node in _weighted(graph)][:_SIMILAR_AMONG]
    similar = difflib.get_close_matches(name, names, n=1)
    hint = (
        f"; did you mean {similar[0]}?"
        if similar
        else f"; layers are: {', '.join(names[:20])}" + ", ..." * (len(names) > 20)
    )
    return f"is not the name of a layer{hint}"
