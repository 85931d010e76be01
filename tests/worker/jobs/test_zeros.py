"""Whole jobs that set weights to zero in a form: what holds at their end, and what the report says of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.datasets.packed.packed import read_manifest
from app.planning.plan import make_plan
from app.pruning.weight_matrix import weight_matrix
from app.spec.job import parse_job
from tests.support.jobs.tiny import SHAPE, task_of, tiny_data, tiny_layers, tiny_spec, train_alone
from worker.journal import MemoryJournal
from worker.run.state import Reached

PATTERN = {"type": "prune", "pattern": "2:4"}
BLOCKS = {"type": "prune", "sparsity": 0.6, "block": [2, 2]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


def reached(data: Path, folder: Path, *steps: dict[str, Any], **fields: Any) -> Reached:
    return train_alone(task_of(tiny_spec(*steps, **fields), data, folder), MemoryJournal())


def rows_of(found: Reached, layer: str) -> np.ndarray[Any, Any]:
    weight = found.network.get_parameter(f"{layer}.weight").detach().numpy()
    return weight_matrix(found.network.graph[layer]).rows(weight.ravel())


def most_of_four(found: Reached, layer: str) -> int:
    rows = rows_of(found, layer)
    groups, outputs, inputs, positions = rows.shape
    return int((rows != 0).reshape(groups, outputs, inputs // 4, 4, positions).sum(axis=3).max())


@pytest.mark.parametrize("policy", ["auto", "lr_rewind", "fine_tune", "weight_rewind", "none"])
def test_a_pattern_behind_a_removal_of_channels_holds_on_the_smaller_network(
    policy: str, data: Path, tmp_path: Path
) -> None:
    channels = {"type": "prune", "budget": {"macs": 0.5}, "round_to": 4, "retrain": {"policy": "none"}}
    retrain = {"policy": policy} if policy == "none" else {"policy": policy, "epochs": 1}
    if policy == "weight_rewind":
        channels = {"type": "prune", "sparsity": 0.2, "retrain": {"policy": "none"}}  # rewinding needs the same shapes
    training = {"ema_decay": 0.9, "optimizer": {"name": "adamw", "lr": 0.01}}
    found = reached(data, tmp_path, channels, PATTERN | {"retrain": retrain}, training=training)
    assert most_of_four(found, "conv2") == 2
    assert most_of_four(found, "linear1") == 2
    rows = {row["name"]: row for row in found.record.steps[1].layers}
    assert rows["conv1"]["reason"] == "2:4 on 1 input channel"
    assert "reason" not in rows["conv2"]
    assert found.masks is not None
    assert "conv1.weight" not in found.masks or policy == "weight_rewind"
    for name in found.masks:
        weight = found.network.get_parameter(name).detach()
        gone = weight[found.masks[name] == 0]
        assert not bool(gone.any())
        assert not bool(torch.signbit(gone).any())
        assert bool(weight[found.masks[name] == 1].all())


@pytest.mark.parametrize(
    ("schedule", "retrain"),
    [
        ({"name": "iterative", "steps": 3}, {"epochs": 1, "policy": "weight_rewind"}),
        ({"name": "cubic"}, {"epochs": 2, "policy": "lr_rewind"}),
    ],
)
def test_blocks_that_go_little_by_little_are_whole_at_the_end(
    schedule: dict[str, Any], retrain: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    found = reached(data, tmp_path, BLOCKS | {"schedule": schedule, "retrain": retrain})
    assert found.masks is not None
    assert abs(found.masks.zeros() - round(0.6 * found.masks.sizes())) <= 2 * 2 * 9 / 2
    for layer in ("conv1", "conv2", "linear1"):
        rows = rows_of(found, layer)
        for top in range(0, rows.shape[1], 2):
            for left in range(0, rows.shape[2], 2):
                block = rows[0, top : top + 2, left : left + 2]
                assert np.count_nonzero(block) in (0, block.size)


def test_erk_ends_with_the_shares_that_the_plan_stated(data: Path, tmp_path: Path) -> None:
    step = {
        "type": "prune",
        "sparsity": 0.7,
        "criterion": "erk",
        "schedule": {"name": "cubic"},
        "retrain": {"epochs": 1},
    }
    found = reached(data, tmp_path, step)
    assert found.masks is not None
    zeros = {name: int((found.masks[name] == 0).sum()) for name in found.masks}
    assert sum(zeros.values()) == round(0.7 * found.masks.sizes())
    planned = make_plan(parse_job(tiny_spec(step)), read_manifest(data).facts())
    assert {f"{row.layer}.weight": row.before - row.after for row in planned.layers} == zeros  # type: ignore[operator]


def test_a_step_that_finds_nothing_left_to_prune_says_so(data: Path, tmp_path: Path) -> None:
    none = {"retrain": {"policy": "none"}}
    found = reached(data, tmp_path, PATTERN | none, PATTERN | none)
    first, second = found.record.steps
    assert first.after == second.after
    (note,) = [note for note in found.record.notes if "no further weight became zero" in note]
    assert note.startswith("/optimizations/1")


def test_layers_that_a_form_does_not_fit_or_did_not_meet_are_listed_with_the_reason(data: Path, tmp_path: Path) -> None:
    layers = tiny_layers()
    layers[0]["name"] = "stem"
    model = {"input_shape": list(SHAPE), "layers": layers}
    step = {"type": "prune", "sparsity": 0.1, "block": [8, 4], "exclude": ["conv1"], "retrain": {"policy": "none"}}
    found = reached(data, tmp_path, step, model=model)
    rows = {row["name"]: row.get("reason") for row in found.record.steps[0].layers}
    assert rows == {
        "stem": "one block of 8 x 4 holds all of it",
        "conv1": "excluded",
        "linear1": None,
    }
