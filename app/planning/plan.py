"""What a job will do, worked out before anything is trained: the networks, their cost, every mistake of meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, assert_never

from app.errors import Fault, InvalidSpec, JsonValue
from app.network.cost import Cost, Memory, cost, layer_rows, training_memory
from app.network.graph import Graph, build_graph
from app.network.layers.layer import Layer
from app.network.layers.registry import read_layers
from app.network.node import Limits
from app.network.presets.registry import preset_layers
from app.planning import checks, warm_start
from app.planning.dry_run import DryRun
from app.planning.faults import Faults
from app.planning.fine_tuning import (
    fine_tuning_faults,
    fine_tuning_warnings,
    frozen_layers,
    frozen_norm_warnings,
    rate_factors,
)
from app.planning.phases import PlannedPhase, phases_of
from app.planning.planned_network import LayerPlan, weighted_layers
from app.planning.warm_start import WarmStart
from app.rewrites.rewrites import rewrite
from app.schemas.plan import PlanSchema
from app.settings import Settings
from app.spec.data import DataFacts
from app.spec.default_recipe import with_recipe
from app.spec.job import JobSpec, completed
from app.spec.model import JobModel, LayersModel, PresetModel
from app.spec.optimizations import Optimization, Rewrite, SmallKernels
from app.spec.references import Source

PLAN_VERSION = 1


@dataclass(frozen=True)
class JobLimits(Limits):
    """How large a job may be: the network's limits, and those of its training."""

    epochs: int = 10_000
    """Epochs of one training."""
    training_bytes: int = 64 << 30
    """Estimated memory of a training."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The limits that the settings state."""
        return cls(params=settings.max_params, epochs=settings.max_epochs, training_bytes=settings.max_training_bytes)


@dataclass(frozen=True)
class Plan:
    """A job that can be run.

    `spec` has every default filled in, `input_shape` and `classes` too. `graphs` are the network as given and after
    each optimization (after those that do not rewrite it: the same again), one more than there are optimizations.
    `floor` is the cost with every channel group at its smallest, of the last step that removes channels, else None.
    `start` says which trained weights it begins with; `frozen` are the layers that no training changes, `rate_factors`
    those with a learning rate of their own.
    """

    spec: JobSpec
    facts: DataFacts
    graphs: tuple[Graph, ...]
    given_cost: Cost
    baseline_cost: Cost
    planned_cost: Cost
    planned: Graph
    floor: Cost | None
    memory: Memory
    layers: tuple[LayerPlan, ...]
    phases: tuple[PlannedPhase, ...]
    warnings: tuple[Fault, ...]
    start: WarmStart | None = None
    frozen: frozenset[str] = frozenset()
    rate_factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def given(self) -> Graph:
        """The network as sent."""
        return self.graphs[0]

    @property
    def baseline(self) -> Graph:
        """The network that is trained: after the rewrites, before the first compression."""
        return self.graphs[-1]


def make_plan(
    spec: JobSpec, facts: DataFacts, *, limits: Limits | None = None, sources: Mapping[str, Source] | None = None
) -> Plan:
    """The plan of `spec` on data with these facts; `sources` has every network that `spec` refers to, by its key.

    Raises InvalidSpec with every mistake of meaning that could be found, at most 100.
    """
    known, bounds, faults = sources or {}, _bounds(limits), Faults()
    spec = with_recipe(completed(spec), facts.training_images(spec.data)[0])
    faults.add(checks.data_faults(spec, facts))
    faults.add(checks.training_faults(spec, bounds.epochs))
    faults.add(checks.order_faults(spec))
    faults.raise_with(warm_start.unknown_sources(spec, known))
    reference = warm_start.start_reference(spec)
    source = None if reference is None else known[reference.key]
    with faults.followed():
        spec = _with_model(spec, facts, source)
        given = given_graph(spec, facts.classes, limits=bounds, source=source)
    faults.add(warm_start.source_faults(spec, given, facts.classes, known, bounds))
    faults.raise_if_any()
    graphs, rows, warnings = _rewritten(given, spec.optimizations, bounds)
    baseline = graphs[-1]
    start = None if source is None else warm_start.start_of(spec, given, baseline, source, facts.classes)
    memory = training_memory(
        baseline,
        batch_size=spec.training.batch_size,
        optimizer=spec.training.optimizer.name,
        gradients_of_choices=checks.chooses_by_gradients(spec),
        taught=checks.is_taught(spec),
    )
    faults.add(checks.graph_faults(spec, baseline))
    faults.add(fine_tuning_faults(spec.training, baseline))
    if start is not None:
        faults.add(warm_start.start_faults(spec, start, given.input_shape))
    faults.add(checks.memory_faults(spec, memory, bounds.training_bytes))
    dry_run = _dry_run(spec, baseline, faults)
    faults.raise_if_any()
    return Plan(
        spec=spec,
        facts=facts,
        graphs=graphs,
        given_cost=cost(given),
        baseline_cost=dry_run.network.baseline,
        planned_cost=dry_run.network.cost,
        planned=dry_run.network.graph,
        floor=dry_run.network.floor,
        memory=memory,
        layers=(*rows, *dry_run.rows, *_untouched(baseline, dry_run.rows)),
        phases=phases_of(spec),
        warnings=(
            *checks.warnings(spec, facts, baseline),
            *warm_start.warnings(spec, facts, given, start, known),
            *fine_tuning_warnings(spec.training, baseline, start),
            *frozen_norm_warnings(spec.training, baseline, dry_run.network.graph, dry_run.rows),
            *warnings,
            *dry_run.warnings,
        ),
        start=start,
        frozen=frozen_layers(spec.training, baseline),
        rate_factors=rate_factors(spec.training, baseline),
    )


def given_graph(spec: JobSpec, classes: int, *, limits: Limits | None = None, source: Source | None = None) -> Graph:
    """The network as `spec` gives it, for K = `classes`; its `input_shape` must be stated.

    `source` is the finished job's network where the model is one.

    Raises InvalidSpec with pointers into the spec if it is not a network.
    """
    model, bounds = spec.model, limits or JobLimits()
    assert model.input_shape is not None, "make_plan fills it in"
    match model:
        case JobModel():
            assert source is not None, "the network of a job needs its source"
            return warm_start.job_graph(model, source, classes, bounds)
        case LayersModel():
            return build_graph(model.layers, model.input_shape, classes=classes, limits=bounds)
        case PresetModel():
            return _preset_graph(model, model.input_shape, classes, bounds)
    assert_never(model)


def plan_answer(plan: Plan) -> dict[str, Any]:
    """The body of the answer of `POST /v1/jobs/validate`, as `PlanSchema` states it."""
    fields = {
        "valid": True,
        "plan_version": PLAN_VERSION,
        "layers": [vars(row) for row in layer_rows(plan.baseline)],
        "given": vars(plan.given_cost),
        "baseline": vars(plan.baseline_cost),
        "planned": vars(plan.planned_cost),
        "floor": None if plan.floor is None else vars(plan.floor),
        "memory": plan.memory.document(),
        "estimate": {"seconds": None, "reason": "no finished job to measure from"},
        "plan": [vars(row) for row in plan.layers],
        "phases": [_stated_fields(phase) for phase in plan.phases],
        "warnings": [warning.document() for warning in plan.warnings],
        "spec": plan.spec.document(),
    }
    # in one call for all rows, which takes half the time of a call for each
    return PlanSchema.model_validate(fields).model_dump(exclude_unset=True)


def _stated_fields(phase: PlannedPhase) -> dict[str, JsonValue]:
    """A phase as it stands in an answer: fields without a value are left out."""
    fields: dict[str, JsonValue] = {"phase": phase.phase, "epochs": phase.epochs, "optimization": phase.optimization}
    return {name: value for name, value in fields.items() if value is not None}


def _bounds(limits: Limits | None) -> JobLimits:
    if limits is None or isinstance(limits, JobLimits):
        return limits or JobLimits()
    return JobLimits(**vars(limits))


def _preset_graph(model: PresetModel, input_shape: tuple[int, ...], classes: int, limits: Limits) -> Graph:
    layers = read_layers(preset_layers(model.preset, input_shape, classes, model.width))
    try:
        return build_graph(layers, input_shape, classes=classes, limits=limits)
    except InvalidSpec as exc:
        # its layers were not sent, so pointers to them would lead nowhere
        first = exc.faults[0]
        at = first.pointer if first.pointer.startswith("/model/input_shape") else "/model/preset"
        raise InvalidSpec([Fault(at, f"{model.preset}: {first.message}", first.limit, first.value)]) from exc


def _with_model(spec: JobSpec, facts: DataFacts, source: Source | None) -> JobSpec:
    update: dict[str, Any] = {"input_shape": checks.input_shape(spec, facts, source)}
    if isinstance(spec.model, PresetModel):
        update["classes"] = facts.classes
    return spec.model_copy(update={"model": spec.model.model_copy(update=update)})


def _rewritten(
    given: Graph, optimizations: Sequence[Optimization], limits: JobLimits
) -> tuple[tuple[Graph, ...], list[LayerPlan], list[Fault]]:
    """(the graphs from `given` on, what was inserted and replaced, warnings)."""
    graphs = [given]
    rows: list[LayerPlan] = []
    warnings: list[Fault] = []
    for position, step in enumerate(optimizations):
        before, pointer = graphs[-1], f"/optimizations/{position}"
        if not isinstance(step, Rewrite):
            graphs.append(before)
            continue
        after = rewrite(before, step, pointer=pointer, limits=limits)
        graphs.append(after)
        rows += _changes(before, after, step.type, pointer)
        if after is before:
            warnings.append(Fault(pointer, f"{step.type} finds nothing to change in this network"))
        elif isinstance(step, SmallKernels):
            warnings += _dearer(before, after, pointer)
    return tuple(graphs), rows, warnings


def _changes(before: Graph, after: Graph, kind: str, pointer: str) -> list[LayerPlan]:
    rows = []
    for node in after.nodes:
        if node.name not in before:
            rows.append(LayerPlan(node.name, "insert", None, node.shape[0], True, f"{node.type}, by {kind}", pointer))
        elif node.layer != before[node.name].layer:
            old = before[node.name]
            reason = f"{_difference(old.layer, node.layer)} by {kind}"
            rows.append(LayerPlan(node.name, "replace", old.shape[0], node.shape[0], True, reason, pointer))
    return rows


def _difference(old: Layer, new: Layer) -> str:
    """What a rewrite changed in a layer that it kept the name of."""
    if type(old) is not type(new):
        return f"{old.type} replaced with {new.type}"
    fields = [name for name in type(new).model_fields if getattr(new, name) != getattr(old, name)]
    return f"{', '.join(fields)} changed"


def _dearer(before: Graph, after: Graph, pointer: str) -> list[Fault]:
    """A warning where small kernels cost more than the large one: few input channels, many output channels."""
    old, new = cost(before), cost(after)
    if new.macs <= old.macs:
        return []
    message = (
        f"costs more here: {old.macs} -> {new.macs} MACs, {old.params} -> {new.params} parameters, because the first "
        "convolution of a stack is as wide as the last; narrow it with layers"
    )
    return [Fault(pointer, message)]


def _dry_run(spec: JobSpec, baseline: Graph, faults: Faults) -> DryRun:
    """The dry run of every optimization and of the table of sensitivities; their mistakes are added to `faults`."""
    dry_run = DryRun(baseline)
    for position, step in enumerate(spec.optimizations):
        with faults.collecting():
            dry_run.step(step, f"/optimizations/{position}")
    if spec.sensitivity is not None:
        with faults.collecting():
            dry_run.check_sensitivity(spec.sensitivity, "/sensitivity")
    return dry_run


def _untouched(baseline: Graph, rows: Sequence[LayerPlan]) -> list[LayerPlan]:
    """A row for each layer with weights that no compression has a row for."""
    named = {row.layer for row in rows}
    return [
        LayerPlan(node.name, "keep", node.shape[0], node.shape[0], True, "nothing removes from it")
        for node in weighted_layers(baseline)
        if node.name not in named
    ]
