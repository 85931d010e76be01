"""The catalogue: everything offered is in it, and every example works."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.network.cost import cost
from app.network.presets import PRESETS
from app.spec.catalogue import optimization_catalogue, preset_catalogue
from app.spec.data import DataFacts
from app.spec.optimizations import OPTIMIZATIONS
from tests.support.jobs.specs import COLOUR, plan


def test_every_optimization_and_every_preset_is_listed_once() -> None:
    kinds = [entry["type"] for entry in optimization_catalogue()]
    assert kinds == [part.model_fields["type"].default for part in OPTIMIZATIONS]
    assert [entry["name"] for entry in preset_catalogue()] == list(PRESETS)
    json.dumps([optimization_catalogue(), preset_catalogue()])


ELSEWHERE = ("distill",)  # needs a finished job


@pytest.mark.parametrize(
    "entry", [e for e in optimization_catalogue() if e["type"] not in ELSEWHERE], ids=lambda entry: entry["type"]
)
def test_every_example_is_a_job_that_can_be_planned(entry: dict[str, Any]) -> None:
    assert entry["title"]
    assert entry["description"]
    assert entry["schema"]["properties"].keys() >= entry["example"].keys()
    layers = [
        {"type": "conv", "out_channels": 16, "kernel_size": 5, "padding": 2},
        {"type": "relu"},
        {"type": "conv", "out_channels": 32, "kernel_size": 3, "padding": 1},
        {"type": "flatten"},
        {"type": "linear", "out_features": 10},
    ]
    assert entry["examples"][0] == entry["example"]
    for example in entry["examples"]:
        planned = plan(COLOUR, model={"layers": layers}, optimizations=[example])
        changes = planned.baseline != planned.context or planned.planned_cost != planned.baseline_cost
        assert changes or entry["type"] in ("regularization", "quantize")


@pytest.mark.parametrize("entry", preset_catalogue(), ids=lambda entry: entry["name"])
def test_every_preset_example_has_the_cost_that_is_stated(entry: dict[str, Any]) -> None:
    shape, classes = tuple(entry["input_shape"]), entry["classes"]
    facts = DataFacts("usual", shape, classes, tuple(map(str, range(classes))), 10_000, 1_000, "float32")
    planned = plan(facts, model=entry["example"])
    assert cost(planned.context).document() == entry["cost"]
    assert entry["description"]
    assert entry["source"]


def test_callers_cannot_change_the_catalogue() -> None:
    optimization_catalogue()[0]["example"]["type"] = "changed"
    preset_catalogue()[0]["cost"]["params"] = 0
    assert optimization_catalogue()[0]["example"]["type"] == "batch_norm"
    assert preset_catalogue()[0]["cost"]["params"] > 0
