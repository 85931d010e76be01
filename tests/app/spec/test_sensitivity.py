"""Jobs of kind sensitivity: what may be asked, and what the plan says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.jobs.specs import document, misplanned, plan, refused


def test_a_plain_table_measures_five_parts_of_every_group() -> None:
    found = plan(kind="sensitivity")
    options = found.spec.sensitivity
    assert options is not None
    assert options.kept == (0.9, 0.75, 0.5, 0.25, 0.1)
    assert found.planned_cost == found.baseline_cost
    assert [phase.phase for phase in found.phases][-3:] == ["evaluating", "measuring", "exporting"]
    assert {row.layer: row.reason for row in found.layers}["linear2"] == "network output"


def test_a_table_on_training_images_is_warned_of() -> None:
    (warning,) = plan(kind="sensitivity", data={"dataset": "mnist", "validation": 0}).warnings
    assert warning.pointer == "/data/validation"
    assert "measured on training images" in warning.message
    assert plan(kind="sensitivity").warnings == ()


@pytest.mark.parametrize(
    ("parts", "pointer"),
    [
        ({"sensitivity": {}}, "/sensitivity"),
        ({"kind": "sensitivity", "sensitivity": {"kept": []}}, "/sensitivity/kept"),
        ({"kind": "sensitivity", "sensitivity": {"kept": [0.5, 0.5]}}, "/sensitivity/kept/1"),
        ({"kind": "sensitivity", "sensitivity": {"kept": [1.0]}}, "/sensitivity/kept/0"),
        ({"kind": "sensitivity", "sensitivity": {"criterion": "erk"}}, "/sensitivity/criterion"),
        ({"kind": "sensitivity", "optimizations": [{"type": "prune", "sparsity": 0.5}]}, "/optimizations/0"),
        ({"kind": "sensitivity", "optimizations": [{"type": "quantize"}]}, "/optimizations/0"),
        ({"kind": "table"}, "/kind"),
    ],
)
def test_what_means_nothing_is_refused_where_it_is_wrong(parts: dict[str, Any], pointer: str) -> None:
    assert [fault.pointer for fault in refused(document(**parts))] == [pointer]


def test_unknown_layers_and_networks_without_a_group_are_refused() -> None:
    (fault,) = misplanned(kind="sensitivity", sensitivity={"exclude": ["convolution1"]})
    assert fault.pointer == "/sensitivity/exclude/0"
    (fault,) = misplanned(kind="sensitivity", sensitivity={"exclude": ["conv1", "conv2", "linear1"]})
    assert fault.pointer == "/sensitivity"
    assert "no group of channels may be cut" in fault.message


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"sparsity": 0.5, "scope": "sensitivity"}, "/scope"),
        ({"sparsity": 0.5, "structure": "channels", "scope": "sensitivity"}, "/scope"),
        ({"pattern": "2:4", "scope": "global"}, "/scope"),
    ],
)
def test_scope_sensitivity_needs_a_budget_of_channels(fields: dict[str, Any], pointer: str) -> None:
    found = refused(document(optimizations=[{"type": "prune", **fields}]))
    assert [fault.pointer for fault in found] == [f"/optimizations/0{pointer}"]
