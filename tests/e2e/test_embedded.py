"""What a user does with the embedded service: from an upload it has never seen to weights that give the report's accuracy."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.services.service import Service, embedded_service, long_job, synthetic_job

DAG = [
    {"type": "conv", "name": "stem", "out_channels": 16, "kernel_size": 3, "padding": "same"},
    {"type": "batch_norm", "name": "stem_bn"},
    {"type": "relu", "name": "stem_relu"},
    {"type": "conv", "name": "left", "inputs": ["stem_relu"], "out_channels": 16, "kernel_size": 3, "padding": "same"},
    {"type": "conv", "name": "right", "inputs": ["stem_relu"], "out_channels": 16, "kernel_size": 1},
    {"type": "add", "name": "sum", "inputs": ["left", "right"]},
    {"type": "relu", "name": "sum_relu"},
    {"type": "concat", "name": "both", "inputs": ["sum_relu", "stem_relu"]},
    {"type": "max_pool", "kernel_size": 2},
    {"type": "conv", "name": "last", "out_channels": 16, "kernel_size": 3, "padding": 1},
    {"type": "relu"},
    {"type": "global_avg_pool"},
    {"type": "flatten"},
    {"type": "linear", "name": "head", "out_features": 3},
]
# A clean process: torch, safetensors, NumPy and the delivered files, nothing of ours.
ACCURACY_TORCH = """
import json, sys, importlib.util, numpy as np, torch
folder, data = sys.argv[1:]
spec = importlib.util.spec_from_file_location("m", folder + "/model.py"); m = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m)
net = m.load(folder + "/pruned.safetensors").eval(); p = json.load(open(folder + "/architecture.json"))["preprocessing"]
x = np.load(data)["x_test"].transpose(0, 3, 1, 2).astype("float32"); y = np.load(data)["y_test"]
x = (torch.from_numpy(x) * p["scale"] - torch.tensor(p["mean"]).view(-1, 1, 1)) / torch.tensor(p["std"]).view(-1, 1, 1)
with torch.inference_mode(): print(int((net(x).argmax(1).numpy() == y).sum()))
assert "app" not in sys.modules and "worker" not in sys.modules
"""
ACCURACY_ONNX = """
import json, sys, numpy as np, onnxruntime
folder, data = sys.argv[1:]
net = onnxruntime.InferenceSession(folder + "/pruned.onnx", providers=["CPUExecutionProvider"])
p = json.load(open(folder + "/architecture.json"))["preprocessing"]
x = np.load(data)["x_test"].transpose(0, 3, 1, 2).astype("float32"); y = np.load(data)["y_test"]
x = (x * p["scale"] - np.array(p["mean"]).reshape(-1, 1, 1)) / np.array(p["std"]).reshape(-1, 1, 1)
print(int((net.run(None, {net.get_inputs()[0].name: x.astype("float32")})[0].argmax(1) == y).sum()))
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with embedded_service(tmp_path_factory.mktemp("service") / "home") as started:
        yield started


def coloured_stripes(count: int, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """RGB pictures N x 20 x 20 x 3 of noise with a stripe whose direction is the class."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 120, (count, 20, 20, 3), dtype=np.uint8)
    labels = random.integers(0, 3, count)
    for image, label, at in zip(images, labels, random.integers(2, 17, count), strict=True):
        if label == 0:
            image[at : at + 2] += 120
        elif label == 1:
            image[:, at : at + 2] += 120
        else:
            np.einsum("iic->ic", image)[:] += 120
    return images, labels.astype(np.int64)


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upload") / "stripes.npz"
    x_train, y_train = coloured_stripes(900, 1)
    x_test, y_test = coloured_stripes(211, 2)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture(scope="module")
def delivered(service: Service, upload: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A succeeded job on the upload, and the folder with all of its files."""
    answer = service.client.post("/v1/datasets?name=stripes", content=upload.read_bytes())
    assert answer.status_code == 201, answer.text
    dataset = answer.json()
    assert dataset["state"] == "ready", dataset
    assert dataset["splits"] == {"train": 900, "test": 211}
    job_id = service.submit(
        {
            "spec_version": 1,
            "data": {"dataset": dataset["id"]},
            "model": {"input_shape": [3, 20, 20], "layers": DAG},
            "training": {"epochs": 4, "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.05}},
            "optimizations": [
                {"type": "prune", "budget": {"macs": 0.6}, "retrain": {"epochs": 2}},
                {"type": "prune", "structure": "weights", "sparsity": 0.5, "retrain": {"epochs": 1}},
            ],
        }
    )
    job = service.finish(job_id)
    folder = tmp_path_factory.mktemp("delivered")
    for item in service.get(f"/v1/jobs/{job_id}/artifacts")["items"]:
        data = service.client.get(item["href"]).content
        assert hashlib.sha256(data).hexdigest() == item["sha256"]
        assert len(data) == item["size_bytes"]
        (folder / item["name"]).write_bytes(data)
    return job, folder


def clean_process(code: str, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments], capture_output=True, text=True, cwd="/", check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.mark.parametrize("code", [ACCURACY_TORCH, ACCURACY_ONNX], ids=["torch", "onnxruntime"])
def test_the_delivered_files_give_the_accuracy_of_the_report_to_the_image(
    delivered: tuple[dict[str, Any], Path], upload: Path, code: str
) -> None:
    job, folder = delivered
    right = int(clean_process(code, str(folder), str(upload)))
    assert right == round(job["summary"]["final"]["accuracy"] * 211)
    assert job["summary"]["final"]["accuracy"] > 0.6


def test_the_pruned_network_is_physically_smaller_and_on_its_budget(delivered: tuple[dict[str, Any], Path]) -> None:
    job, folder = delivered
    baseline, final = job["summary"]["baseline"], job["summary"]["final"]
    assert final["macs"] <= 0.6 * baseline["macs"]
    assert final["bytes"] == (folder / "pruned.safetensors").stat().st_size < baseline["bytes"]
    report = json.loads((folder / "report.json").read_text())
    assert report["final"] == final
    assert final["nonzero_params"] < 0.6 * final["params"]


def test_the_manifest_names_every_file(delivered: tuple[dict[str, Any], Path]) -> None:
    job, folder = delivered
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["job_id"] == job["id"]
    for file in manifest["files"]:
        assert hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest() == file["sha256"]
    expected = {"pruned.safetensors", "architecture.json", "model.py", "pruned.onnx", "baseline.safetensors",
                "baseline.architecture.json", "report.json", "pruned.sparse.safetensors"}  # fmt: skip
    assert expected <= {file["name"] for file in manifest["files"]}


def test_a_download_resumes_with_range(service: Service, delivered: tuple[dict[str, Any], Path]) -> None:
    job, folder = delivered
    whole = (folder / "pruned.safetensors").read_bytes()
    path = f"/v1/jobs/{job['id']}/artifacts/pruned.safetensors"
    first = service.client.get(path, headers={"Range": "bytes=0-99"})
    assert (first.status_code, first.content) == (206, whole[:100])
    assert first.headers["content-range"] == f"bytes 0-99/{len(whole)}"
    rest = service.client.get(path, headers={"Range": "bytes=100-", "If-Range": first.headers["etag"]})
    assert first.content + rest.content == whole
    assert first.headers["etag"] == f'"{hashlib.sha256(whole).hexdigest()}"'


def test_the_delivered_architecture_is_the_next_job(service: Service, delivered: tuple[dict[str, Any], Path]) -> None:
    _, folder = delivered
    architecture = json.loads((folder / "architecture.json").read_text())
    spec = synthetic_job(
        data={"synthetic": {"classes": 3, "train": 64, "test": 32, "seed": 0}},
        model={"input_shape": architecture["input_shape"], "layers": architecture["layers"]},
        optimizations=[],
    )
    answer = service.client.post("/v1/jobs/validate", json=spec)
    assert answer.status_code == 200, answer.text
    assert answer.json()["given"]["params"] == json.loads((folder / "report.json").read_text())["final"]["params"]


def test_a_job_goes_on_from_the_network_of_another_or_from_uploaded_weights_to_the_bit(
    service: Service, delivered: tuple[dict[str, Any], Path]
) -> None:
    job, folder = delivered
    file = (folder / "pruned.safetensors").read_bytes()
    architecture = json.loads((folder / "architecture.json").read_text())
    weights = service.client.post("/v1/weights?name=stripes", content=file).json()
    assert weights["sha256"] == hashlib.sha256(file).hexdigest()
    seen = {name: architecture["preprocessing"][name] for name in ("mean", "std")}
    common = {"spec_version": 1, "data": job["spec"]["data"], "training": {"epochs": 0}, "exports": ["safetensors"]}
    written = {"input_shape": architecture["input_shape"], "layers": architecture["layers"]}
    prune = {"type": "prune", "budget": {"macs": 0.7}, "retrain": {"epochs": 1, "distillation": {"teacher": job["id"]}}}
    started = [
        service.submit(common | {"model": written | {"weights": weights["id"], "preprocessing": seen}}),
        service.submit(common | {"model": {"job": job["id"]}, "optimizations": [prune]}),
    ]
    for path, user in ((f"/v1/weights/{weights['id']}", started[0]), (f"/v1/jobs/{job['id']}", started[1])):
        refused = service.client.delete(path)
        assert (refused.status_code, refused.json()["code"]) == (409, "in_use")
        assert user in refused.json()["detail"]
    for job_id in started:
        summary = service.finish(job_id)["summary"]
        assert service.client.get(f"/v1/jobs/{job_id}/artifacts/baseline.safetensors").content == file
        for measure in ("accuracy", "loss", "params", "macs"):
            assert summary["baseline"][measure] == job["summary"]["final"][measure]
    assert summary["final"]["macs"] <= 0.7 * summary["baseline"]["macs"]
    assert service.client.delete(f"/v1/weights/{weights['id']}").status_code == 204
    assert service.client.post(f"/v1/jobs/{started[0]}/retry").json()["errors"][0]["pointer"] == "/model/weights"


def read_stream(service: Service, job_id: str, *, last_event_id: int | None = None) -> list[dict[str, Any]]:
    """Every event of the stream until the server closes it."""
    headers = {"Accept": "text/event-stream"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = str(last_event_id)
    events: list[dict[str, Any]] = []
    with service.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers, timeout=120) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("id:"):
                events.append({"id": int(line[3:])})
            elif line.startswith("event:"):
                events[-1]["event"] = line[6:].strip()
            elif line.startswith("data:"):
                events[-1]["data"] = json.loads(line[5:])
    return events


def test_the_stream_tells_the_whole_story_and_resumes(service: Service) -> None:
    job_id = service.submit(synthetic_job())
    events = read_stream(service, job_id)
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert events[0]["event"] == "job.submitted"
    assert events[-1]["event"] == "job.succeeded"
    assert {"phase.started", "epoch.finished", "prune.applied"} <= {event["event"] for event in events}
    assert read_stream(service, job_id, last_event_id=3) == events[3:]


def training(job: dict[str, Any]) -> bool:
    return (
        job["state"] == "running"
        and (job["progress"] or {}).get("phase") == "training"
        and job["progress"]["epoch"] >= 2
    )


def test_a_cancelled_job_ends_and_delivers_nothing(service: Service) -> None:
    job_id = service.submit(long_job())
    service.wait(job_id, training)
    assert service.act(job_id, "cancel")["state"] in {"cancelling", "cancelled"}
    service.wait(job_id, lambda job: job["state"] == "cancelled", 30)
    assert service.get(f"/v1/jobs/{job_id}/artifacts")["items"] == []
    refused = service.client.post(f"/v1/jobs/{job_id}/stop")
    assert (refused.status_code, refused.json()["code"]) == (409, "illegal_transition")


def test_a_stopped_job_delivers_the_best_it_has_reached(service: Service, tmp_path: Path) -> None:
    job_id = service.submit(long_job())
    service.wait(job_id, training)
    service.act(job_id, "stop")
    job = service.finish(job_id, 60)
    assert job["stopped_early"] is True
    names = {item["name"] for item in service.get(f"/v1/jobs/{job_id}/artifacts")["items"]}
    assert {"pruned.safetensors", "model.py", "pruned.onnx"} <= names
    report = service.get(f"/v1/jobs/{job_id}/report")
    assert report["final"]["accuracy"] > 0.3


def test_a_paused_job_waits_and_goes_on_from_its_checkpoint(service: Service) -> None:
    job_id = service.submit(long_job())
    service.wait(job_id, training)
    service.act(job_id, "pause")
    paused = service.wait(job_id, lambda job: job["state"] == "paused", 30)
    reached = paused["progress"]["epoch"]
    service.act(job_id, "resume")
    resumed = service.wait(job_id, lambda job: job["state"] == "running" and training(job), 30)
    assert resumed["progress"]["epoch"] >= reached
    service.act(job_id, "stop")
    service.finish(job_id)
    assert "job.resumed_from_checkpoint" in [event["type"] for event in service.events(job_id)]


def test_a_waiting_job_says_why_and_runs_after_the_one_before(service: Service) -> None:
    first = service.submit(long_job())
    service.wait(first, training)
    second = service.submit(synthetic_job())
    queue = service.job(second)["queue"]
    assert queue["reason"] == "all_busy"
    assert queue["workers_alive"] == 1
    service.act(first, "cancel")
    service.finish(second)


def test_long_poll_answers_when_the_job_changes(service: Service) -> None:
    job_id = service.submit(synthetic_job())
    tag = service.client.get(f"/v1/jobs/{job_id}").headers["etag"]
    answer = service.client.get(f"/v1/jobs/{job_id}?wait_s=20", headers={"If-None-Match": tag})
    assert answer.status_code == 200
    assert answer.headers["etag"] != tag
    service.finish(job_id)


def test_twenty_posts_with_one_key_make_one_job(service: Service) -> None:
    body = json.dumps(synthetic_job(name="once")).encode()
    headers = {"Content-Type": "application/json", "Idempotency-Key": "once-and-for-all"}
    answers: list[tuple[int, str]] = []

    def post() -> None:
        answer = service.client.post("/v1/jobs", content=body, headers=headers)
        answers.append((answer.status_code, answer.json()["id"]))

    threads = [threading.Thread(target=post) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job_id for _, job_id in answers}) == 1
    assert sorted(status for status, _ in answers) == [200] * 19 + [201]
    service.finish(answers[0][1])


def test_a_diverging_job_fails_with_advice(service: Service) -> None:
    job_id = service.submit(
        synthetic_job(
            training={
                "epochs": 2,
                "batch_size": 32,
                "optimizer": {"name": "sgd", "lr": 100},
                "schedule": {"name": "constant"},
            }
        )
    )
    job = service.wait(job_id, lambda job: job["state"] == "failed", 60)
    assert job["error"]["code"] == "diverged"
    assert "lr" in job["error"]["hint"]


def test_a_data_set_with_broken_pictures_lists_them(service: Service) -> None:
    import zipfile

    from PIL import Image

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        for index in range(240):
            picture = io.BytesIO()
            Image.new("RGB", (12 + index % 5, 12), (index, 0, 0)).save(picture, "PNG")
            zipped.writestr(f"class{index % 2}/{index}.png", picture.getvalue())
        zipped.writestr("class0/broken.png", b"\x89PNG\r\n\x1a\nnothing")
    answer = service.client.post("/v1/datasets?name=pictures", content=archive.getvalue())
    assert answer.status_code == 201
    dataset = answer.json()
    assert dataset["state"] == "ready"
    assert [problem["file"] for problem in dataset["problems"]] == ["class0/broken.png"]
    assert dataset["splits"]["train"] + dataset["splits"]["test"] == 240
