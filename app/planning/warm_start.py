"""The network that a job starts from: a finished job's, or a written one with uploaded weights; and what is fresh in it.

The head is everything with tensors from the last layer with weights on: it gives the class scores, so another number
of classes needs a new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import Fault, InvalidSpec, JsonValue
from app.network.blocks import head_layers
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.network.layers.shapes import Shape, written
from app.network.node import Limits
from app.spec.data import DataFacts
from app.spec.job import JobSpec
from app.spec.model import JobModel
from app.spec.references import Reference, Source, every_reference
from app.validation.faults import counted
from app.validation.safetensors_header import COUNTER, FLOATS

MOST_LISTED = 8
SCALES = {"uint8": 1 / 255, "float32": 1.0}


@dataclass(frozen=True)
class WarmStart:
    """Trained weights that a job begins with, and the layers that nevertheless start fresh."""

    reference: Reference
    fresh: tuple[str, ...]
    """Layers of the network that is trained whose tensors are drawn: a new head, and what rewrites brought."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """What the weights' images went through after the scale, per channel; None: nobody said it."""


class Misfit(ValueError):
    """A network that does not take inputs of a shape; the message says which layer, and why."""


def start_reference(spec: JobSpec) -> Reference | None:
    """What the network of `spec` starts from; None: from fresh weights."""
    return next((found for found in every_reference(spec) if found.pointer in ("/model/job", "/model/weights")), None)


def unknown_sources(spec: JobSpec, sources: Mapping[str, Source]) -> Iterator[Fault]:
    """A fault for each network that `spec` names and that is not among `sources`."""
    for reference in every_reference(spec):
        if reference.key not in sources:
            what = f"a finished job {reference.id}" if reference.kind == "job" else f"weights {reference.id}"
            yield Fault(reference.pointer, f"there is no such thing as {what}", value=reference.id)


def source_faults(
    spec: JobSpec, given: Graph, classes: int, sources: Mapping[str, Source], limits: Limits
) -> Iterator[Fault]:
    """What does not fit between the network `given` and the networks that `spec` names: weights, teachers."""
    reference = start_reference(spec)
    if reference is not None:
        source = sources[reference.key]
        yield from weights_faults(given, source, new_head(spec, given, source, classes), reference.pointer)
    yield from teacher_faults(spec, given.input_shape, classes, sources, limits)


def new_head(spec: JobSpec, given: Graph, source: Source | None, classes: int) -> frozenset[str]:
    """Names of the layers of `given` that start fresh because of `model.head`."""
    model = spec.model
    if isinstance(model, JobModel):
        assert source is not None
        assert source.classes is not None
        fresh = model.head == "new" or (model.head == "auto" and len(source.classes) != classes)
    else:
        fresh = model.head == "new"
    return head_layers(given) if fresh else frozenset()


# --- the network of a finished job -----------------------------------------------------------------------------------


def network_at(source: Source, input_shape: Shape, limits: Limits) -> Graph:
    """The network of a finished job for inputs of this shape.

    Raises Misfit: it has other input channels, or a layer does not fit a map of this size.
    """
    assert source.layers is not None, "the source of a job has layers"
    assert source.input_shape is not None
    if input_shape[0] != source.input_shape[0]:
        raise Misfit(f"it takes {counted(source.input_shape[0], 'channel')}, not {input_shape[0]}")
    try:
        return build_graph(read_layers(source.layers), input_shape, limits=limits)
    except InvalidSpec as exc:
        first = exc.faults[0]
        raise Misfit(f"{_layer_at(first.pointer, source.layers)}{first.message}") from exc


def _layer_at(pointer: str, layers: Sequence[Mapping[str, Any]]) -> str:
    """`<name of the layer>: ` for a pointer below `/model/layers/<n>`."""
    parts = pointer.split("/")
    return f"{layers[int(parts[3])].get('name')}: " if len(parts) > 3 and parts[3].isdigit() else ""


def job_graph(model: JobModel, source: Source, classes: int, limits: Limits) -> Graph:
    """The network of a finished job at the model's input shape, with scores for so many classes.

    Raises InvalidSpec, with pointers into the description: other input channels, a spatial size that the network does
    not take, another number of classes where the head is to be kept.
    """
    assert model.input_shape is not None, "make_plan fills it in"
    assert source.classes is not None, "the source of a job has classes"
    known = len(source.classes)
    if model.head == "keep" and known != classes:
        message = (
            f"the head of job {model.job} gives scores for {known} classes, but the data have {classes}: state new"
        )
        raise InvalidSpec([Fault("/model/head", message, limit=known, value=classes)])
    try:
        graph = network_at(source, model.input_shape, limits)
    except Misfit as misfit:
        if model.input_shape == source.input_shape:  # beyond this service's limits
            raise InvalidSpec(
                [Fault("/model/job", f"the network of job {model.job} is too large: {misfit}")]
            ) from misfit
        message = f"the network of job {model.job} does not take {written(model.input_shape)}: {misfit}"
        limit: JsonValue = list(source.input_shape or ())
        raise InvalidSpec([Fault("/model/input_shape", message, limit, list(model.input_shape))]) from misfit
    return graph if known == classes else _with_classes(graph, classes, limits)


def _with_classes(graph: Graph, classes: int, limits: Limits) -> Graph:
    changed = {}
    for place in [place for name in head_layers(graph) for place in graph.places(name)]:
        for field in ("out_features", "out_channels"):
            if field in type(place.layer).model_fields:
                changed[place.name] = place.layer.model_copy(update={field: classes})
    try:
        wider = graph.replace(changed, limits=limits)
        return build_graph(wider.layers(), wider.input_shape, classes=classes, limits=limits)
    except InvalidSpec as exc:
        message = f"no head for {classes} classes can be made of {', '.join(sorted(changed))}: {exc.faults[0].message}"
        raise InvalidSpec([Fault("/model/head", message)]) from exc


# --- weights ---------------------------------------------------------------------------------------------------------


def weights_faults(graph: Graph, source: Source, head: frozenset[str], pointer: str) -> Iterator[Fault]:
    """Every tensor of `graph` that `source` has not, or in another shape or type; then the tensors that are too many.

    Layers in `head` may be absent or of another shape.
    """
    wanted = {key: tensor.shape for key, tensor in graph.tensors().items()}
    for key, shape in wanted.items():
        if key.rpartition(".")[0] in head:
            continue
        found = source.tensors.get(key)
        if found is None:
            message = f"have no tensor {key}, which is {written(shape)} in the network"
            yield Fault(pointer, message, limit=list(shape))
        elif tuple(found) != shape:
            message = (
                f"have {key} as {written(tuple(found)) or 'one number'}, but in the network it is {written(shape)}"
            )
            yield Fault(pointer, message, limit=list(shape), value=list(found))
        elif (kind := source.dtypes.get(key, "F32")) not in FLOATS:
            yield Fault(pointer, f"have {key} as {kind}; weights are one of: {', '.join(FLOATS)}", value=kind)
    foreign = [key for key in source.tensors if key not in wanted and key.rpartition(".")[2] != COUNTER]
    if foreign:
        message = f"have tensors that the network has not: {listed(foreign)}"
        yield Fault(pointer, message, limit=len(wanted), value=len(source.tensors))


def listed(names: Sequence[str]) -> str:
    """Names as words: at most 8 of them, and how many more there are."""
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(name[:200] for name in names[:MOST_LISTED]) + more


def start_of(spec: JobSpec, given: Graph, trained: Graph, source: Source, classes: int) -> WarmStart:
    """What the weights of `source` are for: `given` is the network they belong to, `trained` it after the rewrites."""
    reference, model = start_reference(spec), spec.model
    assert reference is not None
    fresh = _fresh_layers(given, trained, new_head(spec, given, source, classes))
    if isinstance(model, JobModel):
        known = source.preprocessing
        return WarmStart(reference, fresh, *((known.mean, known.std) if known is not None else (None, None)))
    stated = model.preprocessing
    return WarmStart(reference, fresh, *((stated.mean, stated.std) if stated is not None else (None, None)))


def _fresh_layers(given: Graph, trained: Graph, head: frozenset[str]) -> tuple[str, ...]:
    """Layers of the `trained` network with tensors that `given`, whose weights are known, has not or in another shape."""
    known = {key: tensor.shape for key, tensor in given.tensors().items()}

    def is_known(name: str) -> bool:
        if name in head or name not in given or given[name].type != trained[name].type:
            return False
        return all(known.get(f"{name}.{key}") == tensor.shape for key, tensor in trained[name].tensors.items())

    return tuple(node.name for node in trained.nodes if node.tensors and not is_known(node.name))


def start_faults(spec: JobSpec, start: WarmStart, input_shape: Shape) -> Iterator[Fault]:
    """What is wrong between trained weights and what the job does with them."""
    if spec.training.epochs == 0 and start.fresh:
        message = f"0 leaves layers untrained that start fresh: {listed(start.fresh)}"
        yield Fault("/training/epochs", message, limit=1, value=0)
    if start.mean is not None and len(start.mean) != input_shape[0]:
        message = f"has {counted(len(start.mean), 'number')}, the images have {counted(input_shape[0], 'channel')}"
        at = "/model/job" if start.reference.kind == "job" else "/model/preprocessing/mean"
        yield Fault(at, message, limit=input_shape[0], value=len(start.mean))


def warnings(
    spec: JobSpec, facts: DataFacts, given: Graph, start: WarmStart | None, sources: Mapping[str, Source]
) -> Iterator[Fault]:
    """What is allowed between the job and the networks it names, and may not be meant."""
    if start is not None:
        yield from _start_warnings(spec, facts, given, start, sources[start.reference.key])
    for reference in _teachers(spec):
        difference = differing_names(sources[reference.key].classes or (), facts.class_names)
        if difference:
            yield Fault(reference.pointer, f"the classes of job {reference.id} {difference}")


def _start_warnings(spec: JobSpec, facts: DataFacts, given: Graph, start: WarmStart, source: Source) -> Iterator[Fault]:
    model, at = spec.model, start.reference.pointer
    head = new_head(spec, given, source, facts.classes)
    if isinstance(model, JobModel):
        assert source.classes is not None
        if head and model.head == "auto":
            yield Fault(
                "/model/head",
                f"job {model.job} knows {len(source.classes)} classes, the data have {facts.classes}: "
                f"{listed(sorted(head))} starts fresh",
                limit=len(source.classes),
                value=facts.classes,
            )
        elif not head and (difference := differing_names(source.classes, facts.class_names)):
            yield Fault("/model/head", f"is kept, but the classes {difference}")
        scale = None if source.preprocessing is None else source.preprocessing.scale
        if scale is not None and abs(scale - SCALES[facts.dtype]) > 1e-9:
            message = (
                f"its images were multiplied by {scale:.6g}, these are by {SCALES[facts.dtype]:.6g}: its mean and standard "
                "deviation fit if the numbers mean the same after that"
            )
            yield Fault(at, message)
    elif start.mean is None:
        message = "mean and standard deviation are measured on the training images: state model.preprocessing if theirs was other"
        yield Fault(at, message)
    inserted = [name for name in start.fresh if name not in head]
    if inserted:
        yield Fault(at, f"the optimizations bring layers that start fresh: {listed(inserted)}")


def differing_names(known: Sequence[str], wanted: Sequence[str]) -> str | None:
    """How two lists of class names of one length differ, as words; None if they do not or one is not known."""
    if not known or not wanted or tuple(known) == tuple(wanted):
        return None
    if sorted(known) == sorted(wanted):
        return "have the same names in another order: the scores belong to other classes"
    pair = next((one, other) for one, other in zip(known, wanted, strict=False) if one != other)
    return f"have other names: {pair[0][:64]!r} there, {pair[1][:64]!r} in the data"


# --- teachers --------------------------------------------------------------------------------------------------------


def _teachers(spec: JobSpec) -> list[Reference]:
    return [found for found in every_reference(spec) if found.pointer.endswith("/teacher")]


def teacher_faults(
    spec: JobSpec, input_shape: Shape, classes: int, sources: Mapping[str, Source], limits: Limits
) -> Iterator[Fault]:
    """Teachers that speak of another number of classes, or do not take the job's images."""
    for reference in _teachers(spec):
        source = sources[reference.key]
        assert source.classes is not None
        if len(source.classes) != classes:
            message = (
                "distillation from a job of another class count: "
                f"job {reference.id} gives scores for {len(source.classes)} classes, the data have {classes}"
            )
            yield Fault(reference.pointer, message, limit=len(source.classes), value=classes)
            continue
        try:
            network_at(source, input_shape, limits)
        except Misfit as misfit:
            message = f"the network of job {reference.id} does not take {written(input_shape)}: {misfit}"
            yield Fault(reference.pointer, message, limit=list(source.input_shape or ()), value=list(input_shape))
