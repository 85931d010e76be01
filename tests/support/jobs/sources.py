"""Networks that other jobs start from or learn from, without those jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.errors import Fault, InvalidSpec
from app.network.architecture import Preprocessing, architecture_document
from app.network.graph import Graph
from app.planning.plan import Plan, make_plan
from app.spec.data import DataFacts
from app.spec.job import parse_job
from app.spec.references import Source
from tests.support.jobs.specs import NAMES, document, graph_of

SEEN = Preprocessing(1 / 255, (0.25,), (0.5,))
"""What the images of a finished job went through, one channel."""


def pooled(classes: int, *, norm: bool = True) -> list[dict[str, Any]]:
    """A network that takes any spatial size: two convolutions, global pooling, a linear layer named `head`."""
    layers: list[dict[str, Any]] = [
        {"type": "conv", "name": "first", "out_channels": 8, "kernel_size": 3, "padding": 1},
        *([{"type": "batch_norm", "name": "norm"}] if norm else []),
        {"type": "relu", "name": "relu"},
        {"type": "conv", "name": "second", "out_channels": 8, "kernel_size": 3, "padding": 1},
        {"type": "relu", "name": "relu2"},
    ]
    tail = [{"type": "global_avg_pool", "name": "pool"}, {"type": "flatten", "name": "flat"}]
    return [*layers, *tail, {"type": "linear", "name": "head", "out_features": classes}]


def shapes_of(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors."""
    return {name: tensor.shape for name, tensor in graph.tensors().items()}


def source_of(
    layers: Sequence[dict[str, Any]] | None = None,
    input_shape: tuple[int, ...] = (1, 28, 28),
    names: Sequence[str] = NAMES,
    seen: Preprocessing = SEEN,
) -> Source:
    """The source that a finished job with these layers is."""
    graph = graph_of(pooled(len(names)) if layers is None else layers, input_shape, len(names))
    return Source.of_architecture(architecture_document(graph, names, seen), shapes_of(graph))


def planned(facts: DataFacts, sources: Mapping[str, Source], **parts: Any) -> Plan:
    """The plan of `document(**parts)` that refers to `sources`."""
    return make_plan(parse_job(document(**parts)), facts, sources=sources)


def faults_with(facts: DataFacts, sources: Mapping[str, Source], **parts: Any) -> list[Fault]:
    """The faults of `document(**parts)`, well-formed, that refers to `sources`; empty if there is none."""
    try:
        planned(facts, sources, **parts)
    except InvalidSpec as exc:
        return list(exc.faults)
    return []
