"""The 8-bit file of a job: delivered with figures of its own if it keeps the accuracy, and otherwise not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from app.errors import QuantizationFailed, VerificationFailed
from app.schemas.report import ReportSchema
from app.spec.quantize import Quantize, Scheme
from tests.support.jobs.tiny import SHAPE, SYNTHETIC, task_of, tiny_data, tiny_spec
from worker.compression import quantization
from worker.compression.quantization import Quantizer
from worker.export.files import INT8_MODEL, media_type_of
from worker.journal import MemoryJournal, Progress, Wish
from worker.pipeline import Cancelled, Delivered, run, table
from worker.run import delivery, int8
from worker.run.preparation import prepare
from worker.run.stages import run_stages
from worker.verification.verification import compute_logits

INT8 = {"type": "quantize"}
NARROW = {"type": "prune", "budget": {"macs": 0.5}, "round_to": 1, "retrain": {"epochs": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


def delivered_of(spec: dict[str, Any], data: Path, scratch: Path, journal: MemoryJournal | None = None) -> Delivered:
    outcome = run(task_of(spec, data, scratch), journal or MemoryJournal())
    assert isinstance(outcome, Delivered)
    return outcome


@pytest.fixture(scope="module")
def job(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Delivered, MemoryJournal]:
    """Channels pruned, then 8 bits beside a float32 file."""
    journal = MemoryJournal()
    spec = tiny_spec(NARROW, INT8, exports=["safetensors", "onnx"])
    return delivered_of(spec, data, tmp_path_factory.mktemp("job"), journal), journal


def file_of(outcome: Delivered, name: str = INT8_MODEL) -> Path:
    return next(artifact.path for artifact in outcome.artifacts if artifact.name == name)


def test_the_8_bit_file_is_delivered_proven_and_listed(job: tuple[Delivered, MemoryJournal]) -> None:
    outcome, journal = job
    names = [artifact.name for artifact in outcome.artifacts]
    assert names[:4] == ["pruned.safetensors", "architecture.json", "pruned.onnx", INT8_MODEL]
    delivery = outcome.artifacts[3]
    assert (delivery.kind, delivery.media_type) == ("onnx", media_type_of("x.onnx"))
    proof = outcome.report["verification"][INT8_MODEL]
    assert proof["max_abs_difference"] == 0
    manifest = json.loads(outcome.artifacts[-1].path.read_text())
    listed = {entry["name"]: entry for entry in manifest["files"]}
    assert listed[INT8_MODEL]["verification"] == proof
    assert listed[INT8_MODEL]["scheme"] == proof["scheme"] == "int8_static"
    assert {name for name, entry in listed.items() if "scheme" in entry} == {INT8_MODEL}
    assert 0 < proof["largest_pair_sum"] <= 255 * (64 + 64) < proof["saturates_above"] == 32_767
    assert proof["right_on"] == "every processor"
    assert listed[INT8_MODEL]["size_bytes"] == outcome.report["int8"]["bytes"] == delivery.size_bytes
    assert {node.op_type for node in onnx.load(delivery.path).graph.node} >= {"QuantizeLinear", "DequantizeLinear"}
    described = ReportSchema.model_validate_json(json.dumps(outcome.report, allow_nan=False), strict=True)
    assert described.int8 is not None
    (event,) = journal.of_type("quantize.applied")
    assert event.data["accuracy"] == outcome.report["int8"]["accuracy"]
    phases = [progress.phase for progress in journal.progresses]
    assert phases[-1] == "exporting"
    fractions = [progress.fraction for progress in journal.progresses]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_its_accuracy_is_the_one_that_a_user_measures(job: tuple[Delivered, MemoryJournal], data: Path) -> None:
    outcome, _ = job
    stated = json.loads(file_of(outcome, "architecture.json").read_text())["preprocessing"]
    images = np.load(data / "test.images.npy").astype(np.float32).reshape(-1, *SHAPE)
    images = (images * stated["scale"] - np.float32(stated["mean"][0])) / np.float32(stated["std"][0])
    session = onnxruntime.InferenceSession(str(file_of(outcome)), providers=["CPUExecutionProvider"])
    answered = session.run(None, {"images": images.astype(np.float32)})[0].argmax(axis=1)
    accuracy = float((answered == np.load(data / "test.labels.npy")).mean())
    int8 = outcome.report["int8"]
    assert int8["accuracy"] == accuracy == outcome.report["verification"][INT8_MODEL]["accuracy"]
    assert int8["accuracy_drop"] == pytest.approx(outcome.report["final"]["accuracy"] - accuracy)
    assert int8["met"] is True
    assert int8["accuracy_drop"] <= int8["max_accuracy_drop"] == 0.01


def test_the_report_has_its_own_figures_and_the_step_before_and_after(job: tuple[Delivered, MemoryJournal]) -> None:
    outcome, _ = job
    report, final = outcome.report, outcome.report["final"]
    int8, measures = report["int8"], outcome.summary["int8"]
    assert measures.keys() == final.keys()
    assert measures == {name: int8[name] for name in measures}
    for name in ("params", "nonzero_params", "macs"):
        assert measures[name] == final[name]
    assert measures["latency_ms"].keys() == {"onnxruntime"}
    assert measures["latency_ms"]["onnxruntime"].keys() == final["latency_ms"]["onnxruntime"].keys()
    assert 0.9 <= int8["agreement"] <= 1
    assert 0 < int8["rmse_ratio"] < 0.2
    assert int8["left_in_float32"] == []
    assert int8["calibration_images"] == 108
    assert int8["chosen_on"]["part"] == "validation"
    assert int8["reduce_range"] is True
    assert (int8["scheme"], int8["right_on"]) == ("int8_static", "every processor")
    row = report["steps"][1]
    assert (row["applied"], row["before"], row["after"]) == (True, final, measures)
    assert (row["scheme"], row["largest_pair_sum"]) == ("int8_static", int8["largest_pair_sum"])
    assert [(layer["name"], layer["bits"]) for layer in row["layers"]] == [("conv1", 8), ("conv2", 8), ("linear1", 8)]
    lines = table(outcome.summary).splitlines()
    assert lines[0].split() == ["dense", "pruned", "int8"]
    assert f"{int8['bytes']:,}" in lines[5]


def test_a_stopped_job_gets_it_too_whatever_formats_the_float32_network_has_and_excluded_layers_are_named(
    data: Path, tmp_path: Path
) -> None:
    def wishes(progress: Progress | None) -> Wish | None:
        return "stop" if progress is not None and progress.phase == "training" and progress.epoch >= 1 else None

    spec = tiny_spec(NARROW, INT8 | {"exclude": ["conv1"], "max_accuracy_drop": 1.0}, training={"epochs": 6})
    outcome = delivered_of(spec, data, tmp_path, MemoryJournal(wishes=wishes))
    assert outcome.stopped_early
    narrow, int8 = outcome.report["steps"]
    assert (narrow["applied"], int8["applied"]) == (False, True)
    names = {artifact.name for artifact in outcome.artifacts}
    assert INT8_MODEL in names
    assert "pruned.onnx" not in names
    assert outcome.report["int8"]["left_in_float32"] == [{"name": "conv1", "reason": "excluded"}]
    rows = {row["name"]: row for row in int8["layers"]}
    assert (rows["conv1"]["bits"], rows["conv1"]["reason"]) == (32, "excluded")
    assert "conv1.weight" in {tensor.name for tensor in onnx.load(file_of(outcome)).graph.initializer}


def spoil(file: Path, *layers: str) -> None:
    """Let layers of 8 bits give their biases only, as if the ranges had been measured on other data."""
    model = onnx.load(file)
    for weight in model.graph.initializer:
        if weight.name.removesuffix(".weight_quantized") in layers:
            weight.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(weight)), weight.name))
    onnx.save(model, file)


def spoil_all(monkeypatch: pytest.MonkeyPatch, *layers: str) -> None:
    """Spoil every file that is made, where it has these layers in 8 bits."""
    make = Quantizer.file

    def spoilt(self: Quantizer, *arguments: Any) -> Path:
        file = make(self, *arguments)
        spoil(file, *layers)
        return file

    monkeypatch.setattr(Quantizer, "file", spoilt)


def test_a_file_that_loses_too_much_is_not_delivered_and_the_report_says_by_how_much(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_all(monkeypatch, "conv1", "conv2", "linear1")
    journal = MemoryJournal()
    outcome = delivered_of(tiny_spec(INT8 | {"max_accuracy_drop": 0.05}), data, tmp_path, journal)
    int8 = outcome.report["int8"]
    assert not int8["met"]
    assert int8["accuracy"] == pytest.approx(outcome.report["final"]["accuracy"] - int8["accuracy_drop"])
    assert INT8_MODEL not in {artifact.name for artifact in outcome.artifacts}
    assert "int8" not in outcome.summary
    assert INT8_MODEL not in outcome.report["verification"]
    (note,) = [note for note in outcome.report["notes"] if note.startswith(f"{INT8_MODEL} is not delivered")]
    assert f"{int8['accuracy_drop'] - 0.05:.4f} more than max_accuracy_drop 0.05" in note
    row = outcome.report["steps"][0]
    assert (row["applied"], row["after"], row["layers"]) == (False, outcome.report["final"], [])
    assert journal.of_type("warning")[-1].message.endswith("this file is not delivered")
    assert outcome.artifacts[0].name == "pruned.safetensors"


def test_a_layer_left_in_float32_for_the_accuracy_is_named_with_the_reason(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_all(monkeypatch, "linear1")
    job = prepare(task_of(tiny_spec(INT8), data, tmp_path), MemoryJournal())
    run_stages(job)
    network = delivery.on_cpu(job.reached.network)
    made = int8.make_int8(job, network, compute_logits(network, job.splits.test.images, job.preprocessing))
    job.close()
    assert made is not None
    assert made.met
    document = int8.int8_document(made, {}, {})
    (left,) = document["left_in_float32"]
    assert left["name"] == "linear1"
    assert left["reason"].startswith("quantized alone it moves the logits by ")
    assert document["chosen_on"]["files"] == 2 + 1
    assert any("1 of 3 layers stay in float32: linear1" in note for note in job.reached.record.notes)


def test_nothing_is_chosen_or_measured_on_the_test_part(data: Path, tmp_path: Path) -> None:
    test_images = np.load(data / "test.images.npy").reshape(-1, 64)
    for validation in (0.1, 0.0):
        job = prepare(
            task_of(tiny_spec(INT8, data={"synthetic": SYNTHETIC, "validation": validation}), data, tmp_path),
            MemoryJournal(),
        )
        network = job.reached.network
        step = Quantize(calibration_images=50)
        calibration, chosen_on, part = int8._samples(job, step, network)
        again, _, _ = int8._samples(job, step, network)
        job.close()
        assert part == ("validation" if validation else "train")
        assert len(calibration.part) == 50
        assert np.array_equal(calibration.part.images, again.part.images), "drawn by the seed"
        seen = [sample.part.images.reshape(-1, 64) for sample in (calibration, chosen_on)]
        for one, other in ((seen[0], test_images), (seen[1], test_images), (seen[0], seen[1])):
            assert not {row.tobytes() for row in one} & {row.tobytes() for row in other}
        assert len(chosen_on.part) == (12 if validation else 70)
        assert len(set(np.asarray(calibration.part.labels[:16]).tolist())) > 1, "not one class after the other"


def test_a_quantizer_that_fails_ends_the_job_with_a_sentence(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quantizer, "source", property(lambda self: self.folder / "missing.onnx"))
    with pytest.raises(QuantizationFailed, match="ONNX Runtime could not quantize the network"):
        run(task_of(tiny_spec(INT8), data, tmp_path), MemoryJournal())


def test_a_file_that_is_not_the_one_that_was_judged_is_found(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = int8.write_int8

    def another(folder: Path, int8: int8.Int8File) -> Path:
        path = write(folder, int8)
        spoil(path, "linear1")
        return path

    monkeypatch.setattr(delivery, "write_int8", another)
    with pytest.raises(VerificationFailed, match=r"pruned\.int8\.onnx does not reproduce"):
        run(task_of(tiny_spec(INT8), data, tmp_path), MemoryJournal())


@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_the_processor_decides_only_whether_a_file_of_the_full_range_is_delivered(
    scheme: Scheme, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(INT8 | {"scheme": scheme, "max_accuracy_drop": 1.0}, exports=["safetensors", "onnx"])
    outcomes = []
    for saturating in (False, True):
        for module in (quantization, int8):
            monkeypatch.setattr(module, "saturates", lambda saturating=saturating: saturating)
        outcomes.append(delivered_of(spec, data, tmp_path))
    elsewhere, here = outcomes
    other = {artifact.name: artifact.sha256 for artifact in elsewhere.artifacts if artifact.kind != "report"}
    found = {artifact.name: artifact.sha256 for artifact in here.artifacts if artifact.kind != "report"}
    del found["manifest.json"], other["manifest.json"]
    if scheme == "int8_vnni":
        assert other.pop(INT8_MODEL)
    assert found == other


def test_a_file_of_the_full_range_says_where_it_is_right(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "saturates", lambda: False)
    outcome = delivered_of(tiny_spec(INT8 | {"scheme": "int8_vnni", "max_accuracy_drop": 1.0}), data, tmp_path)
    proof, (row,) = outcome.report["verification"][INT8_MODEL], outcome.report["steps"]
    assert proof["largest_pair_sum"] > proof["saturates_above"]
    assert outcome.report["int8"]["reduce_range"] is False
    for part in (proof, outcome.report["int8"], row):
        assert (part["scheme"], part["right_on"]) == ("int8_vnni", "processors with VNNI or AMX, and ARM")
    (note,) = [note for note in outcome.report["notes"] if note.startswith(INT8_MODEL)]
    assert f"right only on {proof['right_on']}" in note
    assert note.endswith(f"they can reach {proof['largest_pair_sum']}")
    manifest = json.loads(outcome.artifacts[-1].path.read_text())
    assert [entry["scheme"] for entry in manifest["files"] if entry["name"] == INT8_MODEL] == ["int8_vnni"]


def test_a_worker_that_saturates_delivers_the_other_files_and_says_what_to_do(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "saturates", lambda: True)
    journal = MemoryJournal()
    outcome = delivered_of(tiny_spec(NARROW, INT8 | {"scheme": "int8_vnni"}), data, tmp_path, journal)
    assert outcome.artifacts[0].name == "pruned.safetensors"
    assert INT8_MODEL not in {artifact.name for artifact in outcome.artifacts}
    report = outcome.report
    assert "int8" not in report.keys() | outcome.summary.keys()
    (note,) = [note for note in report["notes"] if note.startswith("the 8-bit file is not delivered")]
    assert "int8_vnni" in note
    assert note.endswith("or with the scheme int8_static, which is right on every processor")
    row = report["steps"][1]
    assert (row["applied"], row["before"], row["after"]) == (False, report["final"], report["final"])
    assert (row["scheme"], row["reason"]) == ("int8_vnni", note)
    assert note in [event.message for event in journal.of_type("warning")]
    ReportSchema.model_validate_json(json.dumps(report, allow_nan=False), strict=True)
    assert [progress.phase for progress in journal.progresses][-1] == "exporting"
    fractions = [progress.fraction for progress in journal.progresses]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_weights_that_can_saturate_are_no_proven_file_for_every_processor(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Quantizer.file

    def full_range(self: Quantizer, *arguments: Any) -> Path:
        self.scheme = "int8_vnni"
        return make(self, *arguments)

    monkeypatch.setattr(Quantizer, "file", full_range)
    with pytest.raises(
        VerificationFailed, match=r"in layer \w+ two products can add up to \d+, and 16 bits hold 32767"
    ):
        run(task_of(tiny_spec(INT8 | {"max_accuracy_drop": 1.0}), data, tmp_path), MemoryJournal())


def test_a_job_cancelled_while_it_quantizes_ends_and_leaves_nothing(data: Path, tmp_path: Path) -> None:
    def wishes(progress: Progress | None) -> Wish | None:
        return "cancel" if begun() else None

    def begun() -> bool:
        return any("quantizing" in event.message for event in journal.events)

    journal = MemoryJournal(wishes=wishes)
    task = task_of(tiny_spec(INT8), data, tmp_path)
    assert isinstance(run(task, journal), Cancelled)
    assert not (task.scratch / "int8").exists()
