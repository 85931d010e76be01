"""The catalogue: everything offered is in it, and every example works."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.network.cost import cost
from app.network.presets.registry import PRESETS
from app.spec.catalogue import optimization_catalogue, preset_catalogue
from app.spec.data import DataFacts
from app.spec.optimizations import OPTIMIZATIONS
from tests.support.jobs.specs import plan


def test_every_optimization_and_every_preset_is_listed_once() -> None:
    kinds = [entry["type"] for entry in optimization_catalogue()]
    assert kinds == [part.kind() for part in OPTIMIZATIONS]
    assert [entry["name"] for entry in preset_catalogue()] == list(PRESETS)
    json.dumps([optimization_catalogue(), preset_catalogue()])


@pytest.mark.parametrize("entry", optimization_catalogue(), ids=lambda entry: entry["type"])
def test_every_entry_has_the_words_and_the_examples_of_its_class(entry: dict[str, Any]) -> None:
    (part,) = (part for part in OPTIMIZATIONS if part.kind() == entry["type"])
    assert entry["title"] == part.title
    assert entry["description"].split() == (part.__doc__ or "").split()
    assert entry["examples"] == [*part.examples]
    assert entry["examples"][0] == entry["example"]


@pytest.mark.parametrize("entry", preset_catalogue(), ids=lambda entry: entry["name"])
def test_every_preset_example_has_the_cost_that_is_stated(entry: dict[str, Any]) -> None:
    shape, classes = tuple(entry["input_shape"]), entry["classes"]
    facts = DataFacts("usual", shape, classes, tuple(map(str, range(classes))), 10_000, 1_000, "float32")
    planned = plan(facts, model=entry["example"])
    assert cost(planned.given).document() == entry["cost"]
    assert entry["description"]
    assert entry["source"]


def test_callers_cannot_change_the_catalogue() -> None:
    optimization_catalogue()[0]["example"]["type"] = "changed"
    preset_catalogue()[0]["cost"]["params"] = 0
    assert optimization_catalogue()[0]["example"]["type"] == "batch_norm"
    assert preset_catalogue()[0]["cost"]["params"] > 0
