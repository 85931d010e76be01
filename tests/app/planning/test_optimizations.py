"""The contract of every optimization: title, examples and docstring of its class, its schema, its rule, its dry run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest

from app.network.cost import cost
from app.planning.dry_run import HANDLERS, UNCHANGED, StepHandler
from app.planning.plan import Plan, make_plan
from app.rewrites.rewrites import RULES
from app.spec.catalogue import optimization_catalogue
from app.spec.job import parse_job
from app.spec.optimizations import COMPRESSIONS, OPTIMIZATIONS, REWRITES, TRAINING_TERMS
from app.spec.references import references_in
from app.spec.step import JobStep
from tests.support.jobs.sources import source_of
from tests.support.jobs.specs import COLOUR, NAMES, document

LAYERS: list[dict[str, Any]] = [
    {"type": "conv", "out_channels": 16, "kernel_size": 5, "padding": 2},
    {"type": "relu"},
    {"type": "conv", "out_channels": 32, "kernel_size": 3, "padding": 1},
    {"type": "flatten"},
    {"type": "linear", "out_features": 10},
]
"""A network in which every optimization finds something to do."""
EXAMPLES = [(part, example) for part in OPTIMIZATIONS for example in getattr(part, "examples", ())]


def missing(part: type[JobStep]) -> Iterator[str]:
    """The parts of an optimization that are not there."""
    if not getattr(part, "title", ""):
        yield "title"
    if not getattr(part, "examples", ()):
        yield "examples"
    if not (part.__doc__ or "").strip():
        yield "docstring"
    if not isinstance(HANDLERS.get(part), StepHandler):
        yield "dry-run handler"
    schema = part.model_json_schema()
    if schema["properties"]["type"].get("const") != part.kind() or "description" not in schema:
        yield "schema with type and description"
    if part in REWRITES and part not in RULES:
        yield "rule"
    if part in (*REWRITES, *TRAINING_TERMS) and part.why_before_compressions is None:
        yield "why it stands before compressions"


def planned(step: dict[str, Any]) -> Plan:
    """The plan of a job with one optimization, and with a finished job for each that it names."""
    spec = parse_job(document(model={"layers": LAYERS}, optimizations=[step]))
    source = source_of(LAYERS, (3, 32, 32), NAMES)
    return make_plan(spec, COLOUR, sources={reference.key: source for reference in references_in(spec)})


@pytest.mark.parametrize("part", OPTIMIZATIONS, ids=lambda part: part.kind())
def test_every_optimization_has_all_its_parts(part: type[JobStep]) -> None:
    assert [*missing(part)] == []


def test_an_optimization_that_is_only_a_class_has_none_of_the_parts() -> None:
    class Bare(JobStep):
        type: Literal["bare"] = "bare"

    Bare.__doc__ = None
    assert [*missing(Bare)] == ["title", "examples", "docstring", "dry-run handler", "schema with type and description"]


@pytest.mark.parametrize(
    ("part", "example"), EXAMPLES, ids=lambda value: value.kind() if isinstance(value, type) else ""
)
def test_every_example_is_a_step_that_can_be_planned_and_does_what_its_family_does(
    part: type[JobStep], example: dict[str, Any]
) -> None:
    assert example["type"] == part.kind()
    assert part.model_json_schema()["properties"].keys() >= example.keys()
    plan = planned(example)
    (step,) = plan.spec.optimizations
    assert type(step) is part
    assert (plan.baseline != plan.given) == (part in REWRITES)
    assert (plan.planned_cost != plan.baseline_cost) == (part in COMPRESSIONS)
    assert plan.baseline_cost == cost(plan.baseline)


def test_every_optimization_is_of_one_family_and_no_registry_has_another() -> None:
    removing = {part for part, handler in HANDLERS.items() if handler is not UNCHANGED}
    assert set(HANDLERS) == set(OPTIMIZATIONS)
    assert set(RULES) == set(REWRITES)
    assert removing == set(OPTIMIZATIONS) - {*REWRITES, *TRAINING_TERMS}
    assert len({*REWRITES, *TRAINING_TERMS, *COMPRESSIONS}) == len(REWRITES) + len(TRAINING_TERMS) + len(COMPRESSIONS)
    assert OPTIMIZATIONS[: len(REWRITES)] == REWRITES


def test_types_and_titles_are_said_once() -> None:
    assert len({part.kind() for part in OPTIMIZATIONS}) == len(OPTIMIZATIONS)
    assert len({part.title for part in OPTIMIZATIONS}) == len(OPTIMIZATIONS)
    assert [entry["type"] for entry in optimization_catalogue()] == [part.kind() for part in OPTIMIZATIONS]
