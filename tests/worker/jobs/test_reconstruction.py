"""Whole jobs whose removals are repaired: what the report says, and how they end when the user asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.jobs.tiny import resume_folder, task_of, tiny_data, tiny_layers, tiny_spec, train_alone
from worker.journal import MemoryJournal, Progress, Wish
from worker.run.monitor import Interrupted
from worker.run.state import Reached

NONE = {"retrain": {"policy": "none"}}
CHANNELS = {"type": "prune", "budget": {"macs": 0.3}, "scope": "layer", "round_to": 1}
ZEROS = {"type": "prune", "sparsity": 0.7}
PRODUCTS = {"type": "low_rank", "rank": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


def spec_of(step: dict[str, Any], **fields: Any) -> dict[str, Any]:
    layers = tiny_layers(channels=16)
    return tiny_spec(step, model={"input_shape": [1, 8, 8], "layers": layers}, training={"epochs": 4}, **fields)


def reached(step: dict[str, Any], data: Path, folder: Path) -> Reached:
    return train_alone(task_of(spec_of(step), data, folder), MemoryJournal())


@pytest.mark.parametrize(
    "step", [CHANNELS, ZEROS, {"type": "prune", "pattern": "2:4"}, PRODUCTS, {"type": "separable"}]
)
def test_each_removal_is_repaired_and_the_report_says_what_became_of_each_layer(
    step: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    repaired, plain = (reached(step | NONE | {"reconstruct": asked}, data, tmp_path) for asked in (True, False))
    (record,), (without,) = repaired.record.steps, plain.record.steps
    assert without.rounds[0]["reconstruction"] is None
    assert not any("reconstructed" in row for row in without.layers)
    (found,) = record.rounds
    assert found["after_cut"] == without.rounds[0]["after_cut"]
    if found["reconstruction"]["kept"]:
        assert found["reconstruction"]["divergence_after"] < found["reconstruction"]["divergence_before"]
    rows = {row["name"]: row for row in record.layers}
    for row in rows.values():
        if row["reconstructed"]:
            before, after = row["output_error"]
            assert after < before
        else:
            assert row["not_reconstructed"]
    assert found["reconstruction"]["kept"] == any(row["reconstructed"] for row in rows.values())
    assert (repaired.network.graph, plain.network.graph) == (plain.network.graph, repaired.network.graph)
    if repaired.masks is not None:
        for name in repaired.masks:
            assert not repaired.network.get_parameter(name)[repaired.masks[name] == 0].any()


def test_a_cut_without_retraining_is_nearer_to_the_dense_network_with_the_repair(data: Path, tmp_path: Path) -> None:
    found = reached(CHANNELS | NONE, data, tmp_path).record.steps[0].rounds[0]["reconstruction"]
    assert found["kept"]
    assert found["images"] == 86  # of 108 training images one in five judges
    assert found["divergence_after"] < 0.7 * found["divergence_before"]


def wish_after_the_cut(wish: Wish) -> MemoryJournal:
    """A journal in which the user asks for something right after a removal was planned: the repair looks first."""

    def wishes(progress: Progress | None) -> Wish | None:
        return wish if any(event.type == "prune.planned" for event in journal.events) else None

    journal = MemoryJournal(wishes=wishes)
    return journal


def test_a_pause_in_the_repair_goes_on_before_the_cut_and_ends_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    spec = spec_of(CHANNELS)
    whole = train_alone(task_of(spec, data, tmp_path), MemoryJournal())
    journal = wish_after_the_cut("pause")
    with pytest.raises(Interrupted):
        train_alone(task_of(spec, data, tmp_path), journal)
    assert not any(event.type == "prune.applied" for event in journal.events)
    folder = resume_folder(journal.checkpoints[-1], tmp_path / "resumed")
    again = train_alone(task_of(spec, data, tmp_path, resume=folder, attempt=2), MemoryJournal())
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name])
    assert again.record.steps[0].rounds == whole.record.steps[0].rounds


def test_a_cancellation_ends_the_repair_and_a_stop_waits_for_its_end(data: Path, tmp_path: Path) -> None:
    journal = wish_after_the_cut("cancel")
    with pytest.raises(Interrupted):
        train_alone(task_of(spec_of(CHANNELS), data, tmp_path), journal)
    assert not any(event.type == "prune.applied" for event in journal.events)
    stopped = wish_after_the_cut("stop")
    found = train_alone(task_of(spec_of(CHANNELS), data, tmp_path), stopped)
    assert any(event.type == "prune.applied" for event in stopped.events)
    assert found.record.steps[0].rounds[0]["reconstruction"]["kept"]
