"""The example jobs of the documentation: valid, and what they say they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidSpec
from app.planning.plan import Plan, make_plan
from app.spec.data import Synthetic, synthetic_facts
from app.spec.job import parse_job
from tests.support.checkout import ROOT

FOLDER = ROOT / "docs" / "examples"
FILES = sorted(FOLDER.glob("*.json"))


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return document


def planned(document: dict[str, Any]) -> Plan:
    spec = parse_job(document)
    assert isinstance(spec.data.synthetic, Synthetic)
    assert spec.model.input_shape is not None
    return make_plan(spec, synthetic_facts(spec.data.synthetic, spec.model.input_shape))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_can_be_planned_and_stands_in_the_readme(path: Path) -> None:
    plan = planned(read(path.stem))
    assert plan.context.input_shape == (3, 32, 32)
    assert plan.spec.training.optimizer.lr == 0.01
    assert plan.spec.training.epochs == 10
    assert f"]({path.name})" in (FOLDER / "README.md").read_text()


def test_there_is_one_for_each_family() -> None:
    assert len(FILES) == 5


def test_the_first_sets_weights_to_zero_by_their_absolute_value() -> None:
    (step,) = parse_job(read("1-weight-pruning")).optimizations
    assert (step.type, step.structure, step.criterion, step.threshold) == ("prune", "weights", "l1", 0.01)  # type: ignore[union-attr]


def test_the_second_is_warned_of_its_large_term() -> None:
    (warning,) = planned(read("2-regularization")).warnings
    assert warning.pointer == "/optimizations/0/l1"


def test_the_third_has_batch_norm_behind_both_convolutions_and_no_biases_there() -> None:
    graph = planned(read("3-batch-normalization")).baseline
    assert [node.name for node in graph.nodes if node.type == "batch_norm"] == ["conv1_bn", "conv2_bn"]
    assert "bias" not in graph["conv1"].tensors


def test_the_fourth_has_dropout_before_the_last_layer_and_refuses_it_behind() -> None:
    document = read("4-dropout")
    graph = planned(document).baseline
    assert graph["fc2"].inputs == ("fc2_dropout",)
    document["model"]["layers"].append({"type": "dropout", "p": 0.5})
    with pytest.raises(InvalidSpec, match="dropout after the logits"):
        planned(document)


def test_the_fifth_has_a_shortcut_around_each_convolution() -> None:
    graph = planned(read("5-convolution")).baseline
    assert len([node for node in graph.nodes if node.type == "add"]) == 4


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [("1-weight-pruning", 64 * 16 * 16, 64 * 8 * 8), ("5-convolution", 256 * 8 * 8, 256 * 2 * 2)],
)
def test_the_original_flattening_is_refused_with_both_numbers(name: str, wrong: int, right: int) -> None:
    document = read(name)
    position, layer = next((i, x) for i, x in enumerate(document["model"]["layers"]) if x.get("name") == "fc1")
    layer["in_features"] = wrong
    with pytest.raises(InvalidSpec) as caught:
        planned(document)
    (fault,) = caught.value.faults
    assert fault.pointer == f"/model/layers/{position}/in_features"
    assert (fault.limit, fault.value) == (right, wrong)
