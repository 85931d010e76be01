"""Odd jobs that the API accepts: they end well, or with a code, a sentence and advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.network.cost import cost
from tests.support.jobs.finished import network_files
from tests.support.jobs.specs import graph_of
from tests.support.jobs.tiny import SHAPE, SYNTHETIC, task_of, tiny_data, tiny_layers, tiny_spec, train_alone
from tests.support.jobs.wishes import ACCEPTED, described
from worker.journal import MemoryJournal
from worker.pipeline import Delivered, run
from worker.run.state import Reached

HALF_THE_CHANNELS = {"type": "prune", "budget": {"params": 0.6}, "round_to": 1, "retrain": {"policy": "none"}}


@pytest.mark.parametrize("shape", [(2, 32), (1, 4, 6, 6)], ids=["signals", "volumes"])
def test_jobs_on_signals_and_volumes_are_delivered_bit_for_bit(shape: tuple[int, ...], tmp_path: Path) -> None:
    layers: list[dict[str, Any]] = [
        {"type": "conv", "out_channels": 8, "kernel_size": 3, "padding": "same"},
        *({"type": kind} for kind in ("batch_norm", "relu", "global_avg_pool", "flatten")),
        {"type": "linear", "out_features": 3},
    ]
    spec = tiny_spec(
        HALF_THE_CHANNELS, model={"input_shape": list(shape), "layers": layers}, exports=["safetensors", "pytorch"]
    )
    data = tiny_data(tmp_path / "cache", SYNTHETIC, shape)
    outcome = run(task_of(spec, data, tmp_path), MemoryJournal())
    assert isinstance(outcome, Delivered)
    assert outcome.summary["final"]["params"] < outcome.summary["baseline"]["params"]
    proofs = outcome.report["verification"]
    assert {"pruned.safetensors", "baseline.safetensors"} <= set(proofs)
    assert all(proof["max_abs_difference"] == 0 for proof in proofs.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


def reached(data: Path, scratch: Path, *steps: dict[str, Any], **fields: Any) -> Reached:
    """What a tiny job of one epoch reaches."""
    spec = tiny_spec(*steps, **fields, training={"epochs": 1})
    return train_alone(task_of(spec, data, scratch), MemoryJournal())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The networks that odd wishes refer to, as a worker gets them."""
    folder = tmp_path_factory.mktemp("sources")
    for name, classes in (("three", 3), ("ten", 10)):
        layers = [*tiny_layers()[:-1], {"type": "linear", "out_features": classes}]
        files = network_files(layers, SHAPE, tuple(f"class {number}" for number in range(classes)))
        for key in (f"job-{name}-pruned", f"job-{name}-baseline", "weights-weights")[: 3 if name == "three" else 2]:
            (folder / key).mkdir()
            (folder / key / "weights.safetensors").write_bytes(files["pruned.safetensors"])
            (folder / key / "architecture.json").write_bytes(files["architecture.json"])
    return folder


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_wish_that_is_accepted_is_carried_out(data: Path, sources: Path, tmp_path: Path, name: str) -> None:
    spec = described(ACCEPTED[name][0], {"@three": "three", "@ten": "ten", "@weights": "weights"})
    shape = tuple(spec["model"].get("input_shape", SHAPE))
    given = data if shape == SHAPE else tiny_data(tmp_path, SYNTHETIC, shape)
    found = train_alone(task_of(spec, given, tmp_path, sources=sources), MemoryJournal())
    assert found.record.baseline is not None
    assert all(record.complete for record in found.record.steps)
    assert all(bool(tensor.isfinite().all()) for tensor in found.network.state_dict().values())
    json.dumps(found.record.document(), allow_nan=False)


BY_SENSITIVITY = {"type": "prune", "scope": "sensitivity", "retrain": {"policy": "none"}}


def test_a_layer_with_a_part_of_its_own_has_no_share_in_a_budget_by_sensitivity(data: Path, tmp_path: Path) -> None:
    step = BY_SENSITIVITY | {"budget": {"macs": 0.5}, "round_to": 1, "overrides": {"conv1": {"sparsity": 0}}}
    graph = reached(data, tmp_path, step).network.graph
    assert (graph["conv1"].shape[0], graph["conv2"].shape[0]) == (8, 3)


@pytest.mark.parametrize("floor", [{"max_sparsity": 0.1}, {"min_channels": 30}])
def test_sensitivity_looks_at_groups_that_may_lose_less_than_a_block(
    data: Path, tmp_path: Path, floor: dict[str, Any]
) -> None:
    model = {"input_shape": list(SHAPE), "layers": tiny_layers(channels=32)}
    step = BY_SENSITIVITY | {"budget": {"macs": 0.97}} | floor
    graph = reached(data, tmp_path, step, model=model).network.graph
    assert cost(graph).macs <= 0.97 * cost(graph_of(tiny_layers(channels=32), SHAPE)).macs
    assert min(graph["conv1"].shape[0], graph["conv2"].shape[0]) >= 29


def test_a_cubic_after_zeros_in_one_layer_ends_with_exactly_what_was_asked_for(data: Path, tmp_path: Path) -> None:
    pattern = {"type": "prune", "pattern": "2:4", "exclude": ["conv1", "linear1"], "retrain": {"policy": "none"}}
    cubic = {"type": "prune", "sparsity": 0.45, "schedule": {"name": "cubic"}, "retrain": {"epochs": 2}}
    found = reached(data, tmp_path, pattern, cubic)
    assert found.masks is not None
    assert found.record.steps[1].sparsity_before == 288 / 744
    assert (found.masks.zeros(), found.masks.sizes()) == (round(0.45 * 744), 744)


def test_a_cubic_to_less_than_there_is_removes_nothing_more(data: Path, tmp_path: Path) -> None:
    most = {"type": "prune", "sparsity": 0.8, "exclude": ["conv1"], "retrain": {"policy": "none"}}
    own = {"conv1": {"sparsity": 0.25}}
    less = {"type": "prune", "sparsity": 0.5, "schedule": {"name": "cubic"}, "overrides": own, "retrain": {"epochs": 1}}
    found = reached(data, tmp_path, most, less)
    assert found.masks is not None
    zeros = {name: int((found.masks[name] == 0).sum()) for name in found.masks}
    assert zeros["conv1.weight"] == 18  # a quarter of 72
    assert zeros["conv2.weight"] + zeros["linear1.weight"] == round(0.8 * 672)
