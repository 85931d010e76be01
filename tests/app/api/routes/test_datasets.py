"""Uploads: streamed, checked in a child process, listed, used by jobs, removed."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.api import uploads
from app.api.routes import datasets
from app.datasets import registry as registry
from app.schemas.upload import DatasetSchema
from tests.support.services.api import SPEC, Api, open_api, served_api
from tests.support.services.uploads import images, labels, npz


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with open_api(tmp_path_factory.mktemp("home")) as api:
        yield api


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("made") / "small"
    made = npz(path, x_train=images(40, (8, 8, 3)), y_train=labels(40), x_test=images(10, (8, 8, 3)), y_test=labels(10))
    return made.read_bytes()


def _leftovers(api: Api) -> list[str]:
    return [path.name for path in (api.context.settings.home_folder / "uploads").glob("*")]


def test_a_good_upload_is_ready_with_its_hash_size_splits_and_classes(api, upload):
    answer = api.client.post("/v1/datasets?name=tiny&format=auto", content=upload)
    document = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/datasets/{document['id']}"
    DatasetSchema.model_validate(document)
    assert (document["name"], document["state"], document["format"]) == ("tiny", "ready", "npz")
    assert (document["splits"], document["shape"]) == ({"train": 40, "test": 10}, [8, 8, 3])
    assert document["classes"] == ["0", "1"]
    assert (document["size_bytes"], document["sha256"]) == (len(upload), hashlib.sha256(upload).hexdigest())
    assert document["problems"] == []
    assert api.client.get(answer.headers["location"]).json() == document
    assert _leftovers(api) == []


def test_any_content_type_and_a_chunked_body_are_taken(api, upload):
    chunks = [upload[start : start + 1000] for start in range(0, len(upload), 1000)]
    answer = api.client.post("/v1/datasets", content=iter(chunks), headers={"Content-Type": "text/html"})
    assert (answer.status_code, answer.json()["state"], answer.json()["name"]) == (201, "ready", "upload")


def test_what_cannot_be_read_is_rejected_with_the_reason(api):
    answer = api.client.post("/v1/datasets", content=b"this is no archive")
    document = answer.json()
    assert (answer.status_code, document["state"]) == (201, "rejected")
    assert document["problems"][0]["message"]
    job = api.client.post("/v1/jobs", json=SPEC | {"data": {"dataset": document["id"]}})
    assert (job.status_code, job.json()["errors"][0]["pointer"]) == (422, "/data/dataset")


def test_a_job_can_use_an_upload_which_is_in_use_until_the_job_is_over(api, upload):
    dataset_id = api.client.post("/v1/datasets", content=upload).json()["id"]
    path = f"/v1/datasets/{dataset_id}"
    job = api.submit(data={"dataset": dataset_id}, model={"preset": "simple_cnn"})
    assert (job["spec"]["model"]["input_shape"], job["spec"]["model"]["classes"]) == ([3, 8, 8], 2)
    refused = api.client.delete(path)
    assert (refused.status_code, refused.json()["code"]) == (409, "in_use")
    api.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert api.client.delete(path).status_code == 204
    assert api.client.get(path).status_code == 404
    assert api.client.delete(path).status_code == 404
    gone = api.client.post("/v1/jobs", json=SPEC | {"data": {"dataset": dataset_id}})
    assert gone.json()["errors"][0]["pointer"] == "/data/dataset"


def test_data_sets_are_listed_newest_first_in_pages(tmp_path):
    with open_api(tmp_path) as api:
        ids = [api.client.post(f"/v1/datasets?name=n{n}", content=b"x" * (n + 1)).json()["id"] for n in range(3)]
        first = api.client.get("/v1/datasets?limit=2").json()
        rest = api.client.get("/v1/datasets", params={"limit": 2, "cursor": first["next_cursor"]}).json()
        assert [item["id"] for item in first["items"] + rest["items"]] == ids[::-1]
        assert rest["next_cursor"] is None


def test_an_answer_does_not_wait_for_a_long_check(api, upload, monkeypatch):
    started, release = threading.Event(), threading.Event()
    check = registry.check_upload

    def slow(*arguments: object, **more: object) -> None:
        started.set()
        release.wait(10)
        check(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "check_upload", slow)
    monkeypatch.setattr(datasets, "CHECK_S", 0.2)
    answer = api.client.post("/v1/datasets", content=upload + b" ")
    path = answer.headers["location"]
    assert (answer.status_code, answer.json()["state"], answer.json()["splits"]) == (201, "checking", None)
    assert api.client.get(path).headers["retry-after"] == "2"
    assert started.is_set()
    job = api.client.post("/v1/jobs", json=SPEC | {"data": {"dataset": answer.json()["id"]}})
    assert "still being checked" in job.json()["errors"][0]["message"]
    release.set()
    until = time.monotonic() + 20
    while api.client.get(path).json()["state"] == "checking" and time.monotonic() < until:
        time.sleep(0.05)
    assert api.client.get(path).json()["state"] in ("ready", "rejected")


def test_a_check_that_a_stop_interrupted_is_done_by_the_next_process(tmp_path, upload, monkeypatch):
    with monkeypatch.context() as patch, open_api(tmp_path) as api:
        patch.setattr(registry, "check_upload", lambda *_, **__: None)  # as if the process had been killed
        document = api.client.post("/v1/datasets", content=upload).json()
        assert document["state"] == "checking"
    with open_api(tmp_path) as api:
        until = time.monotonic() + 20
        while (state := api.client.get(f"/v1/datasets/{document['id']}").json()["state"]) == "checking":
            assert time.monotonic() < until
            time.sleep(0.05)
        assert state == "ready"


def test_a_check_that_an_absent_store_interrupted_is_done_later(tmp_path, upload, monkeypatch):
    check, calls = registry.check_upload, []

    def second_time(*arguments: object, **more: object) -> None:
        calls.append(arguments)
        if len(calls) > 1:
            check(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "check_upload", second_time)
    monkeypatch.setattr(datasets, "RECHECK_S", 0.1)
    with open_api(tmp_path) as api:
        document = api.client.post("/v1/datasets", content=upload).json()
        until = time.monotonic() + 20
        while (state := api.client.get(f"/v1/datasets/{document['id']}").json()["state"]) == "checking":
            assert time.monotonic() < until
            time.sleep(0.05)
    assert (state, len(calls)) == ("ready", 2)


def test_an_upload_over_the_limit_is_413_and_leaves_nothing(tmp_path):
    with open_api(tmp_path, max_upload_bytes=1000) as api:
        by_length = api.client.post("/v1/datasets", content=b"x" * 1001)
        chunked = api.client.post("/v1/datasets", content=iter([b"x" * 600, b"x" * 600]))
        assert by_length.json()["code"] == chunked.json()["code"] == "too_large"
        assert "1000 bytes" in chunked.json()["detail"]
        assert api.client.get("/v1/datasets").json()["items"] == []
        assert _leftovers(api) == []


def test_a_client_that_leaves_half_way_leaves_nothing(tmp_path):
    with served_api(tmp_path) as (api, port):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = b"POST /v1/datasets HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n"
            connection.sendall(head + b"x" * 2_500_000)
            until = time.monotonic() + 5
            while not _leftovers(api) and time.monotonic() < until:
                time.sleep(0.01)
            assert len(_leftovers(api)) == 1
        while _leftovers(api) and time.monotonic() < until:
            time.sleep(0.01)
        assert _leftovers(api) == []
        assert api.client.get("/v1/datasets").json()["items"] == []


def test_the_beginnings_of_uploads_of_a_killed_process_are_swept(tmp_path):
    old, young = tmp_path / "a.upload", tmp_path / "b.upload"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    uploads.sweep_staging(tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


def test_a_full_disk_is_503_storage_full(api, monkeypatch):
    def full(folder: Path) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(uploads, "_open_file", full)
    answer = api.client.post("/v1/datasets", content=b"x")
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "storage_full", "60")
