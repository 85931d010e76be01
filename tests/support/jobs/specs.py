"""Small jobs and facts of data sets for tests of the job language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.errors import Fault, InvalidSpec
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.network.node import Limits
from app.network.presets.registry import PRESETS, preset_layers
from app.planning.plan import Plan, make_plan
from app.spec.data import DataFacts
from app.spec.job import JobSpec, parse_job

NAMES = tuple("abcdefghij")
GREY = DataFacts("fashion-mnist", (28, 28), 10, NAMES, 60_000, 10_000, "uint8")
COLOUR = DataFacts("colour", (32, 32, 3), 10, NAMES, 50_000, 10_000, "uint8")
PICTURES = DataFacts("pictures", None, 10, NAMES, 50_000, 10_000, "uint8", pictures=True)


def document(**parts: Any) -> dict[str, Any]:
    """A job on Fashion-MNIST with the preset simple_cnn, with other `parts` where given."""
    return {"spec_version": 1, "data": {"dataset": "fashion-mnist"}, "model": {"preset": "simple_cnn"}, **parts}


def job(**parts: Any) -> JobSpec:
    """`document(**parts)`, read."""
    return parse_job(document(**parts))


def plan(facts: DataFacts = GREY, limits: Limits | None = None, **parts: Any) -> Plan:
    """The plan of `document(**parts)`."""
    return make_plan(job(**parts), facts, limits=limits)


def refused(sent: object) -> list[Fault]:
    """The faults with which `parse_job` refuses what was sent; empty if it does not."""
    try:
        parse_job(sent)
    except InvalidSpec as exc:
        return list(exc.faults)
    return []


def misplanned(facts: DataFacts = GREY, limits: Limits | None = None, **parts: Any) -> list[Fault]:
    """The faults with which `make_plan` refuses `document(**parts)`, which is well-formed; empty if it does not."""
    spec = job(**parts)
    try:
        make_plan(spec, facts, limits=limits)
    except InvalidSpec as exc:
        return list(exc.faults)
    return []


def graph_of(layers: Sequence[dict[str, Any]], input_shape: tuple[int, ...], classes: int | None = None) -> Graph:
    """The graph of layers in the job language."""
    return build_graph(read_layers(list(layers)), input_shape, classes=classes)


def preset_graph(name: str, input_shape: tuple[int, ...] | None = None, classes: int = 10, width: float = 1.0) -> Graph:
    """The graph of a preset, for the data it is known for unless told otherwise."""
    shape = input_shape or PRESETS[name].usual_shape
    return graph_of(preset_layers(name, shape, classes, width), shape, classes)
