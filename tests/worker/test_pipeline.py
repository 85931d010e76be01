"""A job from its description to its files: wishes on the way, failures, the report, what is delivered."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from app.errors import DataInvalid, DiskFull, Diverged, LayerEmptied
from app.schemas.report import ReportSchema
from app.spec.budget import Budget
from tests.support.jobs.tiny import (
    SHAPE,
    SYNTHETIC,
    resume_folder,
    task_of,
    tiny_data,
    tiny_layers,
    tiny_spec,
    train_alone,
)
from worker import pipeline
from worker.journal import MemoryJournal, Progress, Wish
from worker.network import Network
from worker.pipeline import Cancelled, Delivered, Paused, run
from worker.run.checkpoint_writer import CheckpointWriter
from worker.run.monitor import Interrupted

HALF = {"type": "prune", "sparsity": 0.5, "retrain": {"epochs": 1}}
NARROW = {"type": "prune", "budget": {"macs": 0.5}, "round_to": 1, "retrain": {"epochs": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


def when(phase: str, wish: Wish, *, step: int = 0, epoch: int = 0) -> Callable[[Progress | None], Wish | None]:
    """Wishes `wish` from the first moment of a phase at which so many steps and epochs are done."""

    def wishes(progress: Progress | None) -> Wish | None:
        reached = progress is not None and progress.phase == phase and progress.step >= step and progress.epoch >= epoch
        return wish if reached else None

    return wishes


@pytest.fixture(scope="module")
def delivered(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Delivered, MemoryJournal]:
    """A whole job with all exports: a regularization, half of the channels' MACs, then half of the weights."""
    journal = MemoryJournal()
    spec = tiny_spec({"type": "regularization", "l2": 1e-4}, NARROW, HALF, exports=["safetensors", "onnx", "pytorch"])
    outcome = run(task_of(spec, data, tmp_path_factory.mktemp("job")), journal)
    assert isinstance(outcome, Delivered)
    return outcome, journal


def test_every_file_is_there_with_the_size_and_digest_it_says(delivered: tuple[Delivered, MemoryJournal]) -> None:
    outcome, _ = delivered
    names = [artifact.name for artifact in outcome.artifacts]
    assert names == [
        "pruned.safetensors",
        "pruned.sparse.safetensors",
        "architecture.json",
        "model.py",
        "pruned.onnx",
        "baseline.safetensors",
        "baseline.architecture.json",
        "report.json",
        "manifest.json",
    ]
    manifest = json.loads(outcome.artifacts[-1].path.read_text())
    listed = {entry["name"]: entry for entry in manifest["files"]}
    for artifact in outcome.artifacts[:-1]:
        assert artifact.path.stat().st_size == artifact.size_bytes
        assert listed[artifact.name]["sha256"] == artifact.sha256
    assert json.loads((outcome.artifacts[-2].path).read_text()) == outcome.report


def test_the_summary_counts_what_the_delivered_file_holds(delivered: tuple[Delivered, MemoryJournal]) -> None:
    outcome, _ = delivered
    baseline, final = outcome.summary["baseline"], outcome.summary["final"]
    tensors = load_file(outcome.artifacts[0].path)
    trained = {name: t for name, t in tensors.items() if "running" not in name}
    assert final["params"] == sum(t.numel() for t in trained.values())
    assert final["nonzero_params"] == sum(int(t.count_nonzero()) for t in trained.values())
    assert final["bytes"] == outcome.artifacts[0].size_bytes
    assert final["macs"] <= 0.5 * baseline["macs"]
    assert 0.95 * baseline["params"] < baseline["nonzero_params"] <= baseline["params"]
    assert set(final["latency_ms"]) == {"torch", "onnxruntime"}
    assert final["accuracy"] == outcome.report["verification"]["pruned.safetensors"]["accuracy"]
    assert final["accuracy"] > 0.6


def test_half_of_the_prunable_weights_are_zero_to_the_count(delivered: tuple[Delivered, MemoryJournal]) -> None:
    outcome, _ = delivered
    tensors = load_file(outcome.artifacts[0].path)
    weights = [tensors[name] for name in ("conv1.weight", "conv2.weight", "linear1.weight")]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == round(0.5 * sum(weight.numel() for weight in weights))
    rows = outcome.report["steps"][2]["layers"]
    assert sum(row["weights"] - row["nonzero"] for row in rows) == zeros


def test_the_file_without_zeros_is_listed_proven_and_its_size_is_in_the_report(
    delivered: tuple[Delivered, MemoryJournal],
) -> None:
    outcome, _ = delivered
    dense, sparse = outcome.artifacts[:2]
    assert (sparse.name, sparse.kind, sparse.media_type) == (
        "pruned.sparse.safetensors",
        "weights",
        "application/octet-stream",
    )
    report = outcome.report
    assert report["sparse"] == {"name": sparse.name, "size_bytes": sparse.size_bytes, "dense_bytes": dense.size_bytes}
    ReportSchema.model_validate_json(json.dumps(report, allow_nan=False), strict=True)
    assert sparse.size_bytes < dense.size_bytes == report["final"]["bytes"]
    assert report["verification"][sparse.name] == report["verification"][dense.name]
    assert set(report["compressed_bytes"]) == {dense.name, sparse.name, "baseline.safetensors"}
    listed = {entry["name"]: entry for entry in json.loads(outcome.artifacts[-1].path.read_text())["files"]}
    assert listed[sparse.name]["kind"] == "weights"
    assert listed[sparse.name]["verification"]["max_abs_difference"] == 0


def test_the_report_has_each_step_before_and_after(delivered: tuple[Delivered, MemoryJournal]) -> None:
    report = delivered[0].report
    sent = [row["optimization"]["type"] for row in report["steps"]]
    assert sent == ["regularization", "prune", "prune"]
    regularization, narrow, half = report["steps"]
    assert regularization["before"] == regularization["after"]
    assert regularization["before"]["accuracy"] is None
    assert narrow["before"]["accuracy"] == report["baseline"]["accuracy"]
    assert narrow["after"]["macs"] <= 0.5 * narrow["before"]["macs"]
    assert half["before"] == narrow["after"]
    assert half["after"]["accuracy"] == report["final"]["accuracy"]
    assert half["after"]["loss"] == pytest.approx(report["final"]["loss"], rel=1e-6)
    for step in (narrow, half):
        assert 0 <= step["after_cut"] <= 1
        assert 0 <= step["after_recalibration"] <= 1
        assert step["seconds"] > 0
        assert step["applied"]
        assert step["complete"]
    widths = {row["name"]: (row["channels_before"], row["channels_after"]) for row in narrow["layers"]}
    assert widths["linear1"] == (3, 3)
    assert widths["conv1"][1] < widths["conv1"][0]
    assert next(row for row in narrow["layers"] if row["name"] == "linear1")["reason"] == "network output"


def test_classes_data_and_environment_are_in_the_report(delivered: tuple[Delivered, MemoryJournal]) -> None:
    report = delivered[0].report
    assert [row["examples"] for row in report["classes"]] == [10, 10, 10]
    mean = sum(row["final_accuracy"] * row["examples"] for row in report["classes"]) / 30
    assert mean == pytest.approx(report["final"]["accuracy"])
    for row in report["classes"]:
        assert row["change"] == pytest.approx(row["final_accuracy"] - row["baseline_accuracy"])
    assert report["data"] | {"sha256": "", "preprocessing": {}} == {
        "name": "synthetic",
        "sha256": "",
        "train": 108,
        "validation": 12,
        "test": 30,
        "preprocessing": {},
    }
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["threads"] == 1


def test_progress_rises_to_one_through_all_phases(delivered: tuple[Delivered, MemoryJournal]) -> None:
    _, journal = delivered
    fractions = [progress.fraction for progress in journal.progresses]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    phases = list(dict.fromkeys(progress.phase for progress in journal.progresses))
    assert phases == ["preparing", "training", "evaluating", "pruning", "retraining", "measuring", "exporting"]
    assert [event.data["phase"] for event in journal.of_type("phase.started")] == [
        *["preparing", "training", "evaluating"],
        *["pruning", "retraining", "evaluating"] * 2,
        *["measuring", "exporting"],
    ]
    assert (journal.progresses[-1].step, journal.progresses[-1].steps) == (16, 16)
    assert all(progress.step <= progress.steps for progress in journal.progresses)
    left = [progress.eta_s for progress in journal.progresses]
    assert left[-1] == 0
    assert left[0] is None


def test_curves_have_rising_steps_over_the_whole_job(delivered: tuple[Delivered, MemoryJournal]) -> None:
    _, journal = delivered
    assert set(journal.metrics) == {
        *["train.loss", "train.l2", "train.lr", "train.images_per_s", "val.loss", "val.accuracy", "sparsity"],
        "train.distillation",
    }
    for series, points in journal.metrics.items():
        steps = [step for step, _ in points]
        assert steps == sorted(steps), series
    assert len(journal.metrics["val.accuracy"]) == 4
    assert journal.metrics["sparsity"][-1][1] == pytest.approx(0.5, abs=1e-2)


def test_a_cancelled_job_ends_at_once_wherever_it_is(data: Path, tmp_path: Path) -> None:
    for phase in ("training", "pruning", "retraining", "measuring"):
        journal = MemoryJournal(wishes=when(phase, "cancel"))
        assert isinstance(run(task_of(tiny_spec(HALF), data, tmp_path), journal), Cancelled)
        assert journal.progresses[-1].phase == phase


def test_a_job_paused_while_it_exports_is_delivered_later_without_training(data: Path, tmp_path: Path) -> None:
    journal = MemoryJournal(wishes=when("measuring", "pause"))
    assert isinstance(run(task_of(tiny_spec(), data, tmp_path), journal), Paused)
    resume = resume_folder(journal.checkpoints[-1], tmp_path / "resume")
    second = MemoryJournal()
    outcome = run(task_of(tiny_spec(), data, tmp_path, resume=resume), second)
    assert isinstance(outcome, Delivered)
    assert not outcome.stopped_early
    assert "train.loss" not in second.metrics
    assert outcome.summary["final"]["accuracy"] == outcome.summary["baseline"]["accuracy"]


def test_a_job_stopped_while_it_trains_delivers_the_best_so_far(data: Path, tmp_path: Path) -> None:
    spec = tiny_spec(NARROW, training={"epochs": 9})
    journal = MemoryJournal(wishes=when("training", "stop", epoch=3))
    outcome = run(task_of(spec, data, tmp_path), journal)
    assert isinstance(outcome, Delivered)
    assert outcome.stopped_early
    assert outcome.report["stopped_early"]
    final, baseline = outcome.summary["final"], outcome.summary["baseline"]
    assert final | {"latency_ms": None} == baseline | {"latency_ms": None}  # the budget is not checked
    (step,) = outcome.report["steps"]
    assert not step["applied"]
    assert step["after"]["macs"] == baseline["macs"]
    assert {"pruned.safetensors", "baseline.safetensors"} <= {artifact.name for artifact in outcome.artifacts}
    best = max(value for _, value in journal.metrics["val.accuracy"])
    assert best == max(event.data["val_accuracy"] for event in journal.of_type("epoch.finished") if event.data["best"])
    assert any(note.startswith("stopped early, while training") for note in outcome.report["notes"])


def test_a_job_stopped_while_it_retrains_keeps_the_cut_and_its_zeros(data: Path, tmp_path: Path) -> None:
    spec = tiny_spec(HALF | {"retrain": {"epochs": 5}}, NARROW | {"structure": "channels"})
    spec["optimizations"].reverse()  # channels first
    journal = MemoryJournal(wishes=when("retraining", "stop", step=8 + 4 + 6))
    outcome = run(task_of(spec, data, tmp_path), journal)
    assert isinstance(outcome, Delivered)
    assert outcome.stopped_early
    narrow, half = outcome.report["steps"]
    assert (narrow["complete"], half["complete"]) == (True, False)
    assert half["after"]["nonzero_params"] < half["before"]["nonzero_params"]
    assert half["after"]["accuracy"] == outcome.summary["final"]["accuracy"]
    tensors = load_file(outcome.artifacts[0].path)
    weights = [tensors[name] for name in ("conv1.weight", "conv2.weight", "linear1.weight")]
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.5 * sum(w.numel() for w in weights))


def test_a_stop_at_rest_takes_the_best_weights_of_the_checkpoint(data: Path, tmp_path: Path) -> None:
    spec = tiny_spec(training={"epochs": 6})
    journal = MemoryJournal(wishes=when("training", "pause", step=17))
    with pytest.raises(Interrupted):
        train_alone(task_of(spec, data, tmp_path), journal)
    resume = resume_folder(journal.checkpoints[-1], tmp_path / "resume")
    second = MemoryJournal(wishes=lambda progress: "stop")
    reached = train_alone(task_of(spec, data, tmp_path, resume=resume), second)
    assert "train.loss" not in second.metrics
    best = load_file(resume / "checkpoint.safetensors")
    for name, tensor in reached.network.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, best[f"fit/best/{name}"]), name


def test_a_stop_before_the_first_step_delivers_what_there_is(data: Path, tmp_path: Path) -> None:
    reached = train_alone(task_of(tiny_spec(HALF), data, tmp_path), MemoryJournal(wishes=lambda progress: "stop"))
    assert reached.record.baseline is not None
    assert not reached.record.steps


def test_a_diverging_job_is_tried_once_more_and_then_fails_with_step_rate_and_advice(
    data: Path, tmp_path: Path
) -> None:
    layers = [layer for layer in tiny_layers() if layer["type"] != "batch_norm"]
    spec = tiny_spec(
        model={"input_shape": list(SHAPE), "layers": layers},
        training={"epochs": 20, "optimizer": {"name": "sgd", "lr": 100.0}, "schedule": {"name": "constant"}},
    )
    journal = MemoryJournal()
    with pytest.raises(Diverged, match=r"loss became (nan|inf) at step \d+, learning rate 100") as caught:
        train_alone(task_of(spec, data, tmp_path), journal)
    assert journal.of_type("warning")[0].message.endswith("once more from the last checkpoint")
    assert "lower training.optimizer.lr" in caught.value.advice


def test_a_loss_that_recovers_at_the_second_try_costs_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train_alone(task_of(tiny_spec(), data, tmp_path), MemoryJournal()).network.state_dict()
    forward, calls = Network.forward, [0]

    def flaky(self: Network, images: Tensor) -> Tensor:
        calls[0] += self.training
        return forward(self, images) * (float("nan") if calls[0] == 6 and self.training else 1.0)

    monkeypatch.setattr(Network, "forward", flaky)
    journal = MemoryJournal()
    found = train_alone(task_of(tiny_spec(), data, tmp_path), journal).network.state_dict()
    assert len(journal.of_type("warning")) == 1
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_full_disk_skips_one_checkpoint_and_fails_at_the_second(data: Path, tmp_path: Path) -> None:
    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = MemoryJournal()
    job = pipeline.prepare(task_of(tiny_spec(training={"epochs": 6}), data, tmp_path), journal)
    job.checkpoints = CheckpointWriter(tmp_path, journal, interval_s=60, identity={}, write=full)
    with pytest.raises(DiskFull, match="two checkpoints in a row"):
        pipeline.run_stages(job)
    assert [event.data.get("code") for event in journal.of_type("warning")] == ["disk_full"]
    job.close()


def test_a_threshold_that_empties_a_layer_fails_with_its_name(data: Path, tmp_path: Path) -> None:
    spec = tiny_spec({"type": "prune", "threshold": 1000.0})
    with pytest.raises(LayerEmptied, match="conv1"):
        train_alone(task_of(spec, data, tmp_path), MemoryJournal())


def test_data_that_do_not_fit_the_job_any_more_are_refused(data: Path, tmp_path: Path) -> None:
    spec = tiny_spec(model={"preset": "simple_cnn", "classes": 7, "input_shape": list(SHAPE)})
    with pytest.raises(DataInvalid, match="classes") as caught:
        train_alone(task_of(spec, data, tmp_path), MemoryJournal())
    assert caught.value.pointer == "/model/classes"
    with pytest.raises(DataInvalid, match="cannot be read"):
        train_alone(task_of(tiny_spec(), tmp_path / "nothing", tmp_path), MemoryJournal())


def test_an_iterative_job_prunes_in_rounds_and_never_tears_open_a_zero(data: Path, tmp_path: Path) -> None:
    step = {
        "type": "prune",
        "sparsity": 0.75,
        "schedule": {"name": "iterative", "steps": 2},
        "retrain": {"epochs": 1, "policy": "fine_tune"},
    }
    journal = MemoryJournal()
    reached = train_alone(task_of(tiny_spec(step), data, tmp_path), journal)
    (record,) = reached.record.steps
    assert [found["round"] for found in record.rounds] == [1, 2]
    assert reached.masks is not None
    sparsities = [value for _, value in journal.metrics["sparsity"]]
    assert sparsities == pytest.approx([0.5, 0.5, 0.75, 0.75], abs=0.01)
    for name, parameter in reached.network.named_parameters():
        if name in reached.masks:
            assert not parameter[reached.masks[name] == 0].any()


def test_without_validation_the_last_weights_are_taken_and_the_report_says_so(data: Path, tmp_path: Path) -> None:
    spec = tiny_spec(data={"synthetic": SYNTHETIC, "validation": 0.0}, exports=["safetensors"])
    outcome = run(task_of(spec, data, tmp_path), MemoryJournal())
    assert isinstance(outcome, Delivered)
    assert any("the last weights were taken" in note for note in outcome.report["notes"])


def test_recalibration_only_is_a_step_without_retraining(data: Path, tmp_path: Path) -> None:
    step = NARROW | {"retrain": {"policy": "none"}}
    reached = train_alone(task_of(tiny_spec(step), data, tmp_path), MemoryJournal())
    (record,) = reached.record.steps
    assert record.after is not None
    assert record.after["accuracy"] == record.rounds[0]["after_recalibration"]


def test_the_command_runs_a_job_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps(tiny_spec(training={"epochs": 1})))
    assert pipeline.main([str(spec), str(data), str(tmp_path / "out"), "--threads", "1"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"pruned.safetensors", "report.json"}
    assert not list((tmp_path / "out").glob(".*"))
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "onnxruntime batch_1 ms" in printed
    spec.write_text(json.dumps(tiny_spec(training={"epochs": 0})))
    assert pipeline.main([str(spec), str(data), str(tmp_path / "out")]) == 1
    assert "invalid_spec: /training/epochs" in capsys.readouterr().err


def test_a_network_that_is_found_slower_at_the_end_is_delivered_and_says_so(data: Path, tmp_path: Path) -> None:
    """Everything was trained and searched for by then; here the budget is what changes, not the machine."""
    step = {"type": "prune", "budget": {"latency_ms": 0.99}, "scope": "layer", "retrain": {"epochs": 1}}
    journal = MemoryJournal()
    job = pipeline.prepare(task_of(tiny_spec(step), data, tmp_path), journal)
    stages = job.stages
    job.stages = stages[:-1]
    assert not pipeline.run_stages(job)
    strict = job.plan.spec.optimizations[0].model_copy(update={"budget": Budget(latency_ms=1e-6, absolute=True)})
    job.plan = replace(job.plan, spec=job.plan.spec.model_copy(update={"optimizations": (strict,)}))
    job.stages = stages
    assert not pipeline.run_stages(job)
    outcome = pipeline.deliver(job, stopped_early=False)
    (row,) = outcome.report["steps"]
    assert (row["applied"], row["complete"], row["met"]) == (True, True, False)
    (note,) = [note for note in outcome.report["notes"] if "the budget allows" in note]
    assert note.startswith("/optimizations/0: the pruned network takes")
    assert any(event.message == note for event in journal.of_type("warning"))
    ReportSchema.model_validate_json(json.dumps(outcome.report, allow_nan=False), strict=True)
    job.close()
