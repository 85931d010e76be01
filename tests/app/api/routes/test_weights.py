"""Weights over HTTP: streamed in, checked, listed, needed by jobs, removed; and jobs that start from another one's network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

from app.schemas.upload import WeightsSchema
from tests.support.jobs.finished import both_networks
from tests.support.jobs.weights import entry, good, tensors_of, weights_file
from tests.support.services.api import SPEC, Api, error_pointers, open_api

LAYERS = [
    {"type": "conv", "name": "one", "out_channels": 4, "kernel_size": 3, "padding": 1},
    {"type": "global_avg_pool", "name": "pool"},
    {"type": "flatten", "name": "flat"},
    {"type": "linear", "name": "head", "out_features": 10},
]
SHAPES = {"one__weight": (4, 1, 3, 3), "one__bias": (4,), "head__weight": (10, 4), "head__bias": (10,)}
UNKNOWN = "job_" + "0" * 26


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with open_api(tmp_path_factory.mktemp("home")) as api:
        yield api


@pytest.fixture(scope="module")
def source(api: Api) -> str:
    """A job that succeeded with a network's files."""
    job_id = api.submit()["id"]
    api.deliver(api.claim(job_id), both_networks())
    return str(job_id)


def upload(api: Api, content: bytes | None = None) -> str:
    answer = api.client.post("/v1/weights", content=content or good(**SHAPES))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def with_weights(weights_id: str, layers: list[dict[str, Any]] = LAYERS, **more: Any) -> dict[str, Any]:
    return SPEC | {"model": {"input_shape": [1, 28, 28], "layers": layers, "weights": weights_id, **more}}


def leftovers(api: Api) -> list[str]:
    return [path.name for path in (api.context.settings.home_folder / "uploads").glob("*")]


def test_good_weights_are_201_with_every_tensor(api):
    file = good(**SHAPES)
    answer = api.client.post("/v1/weights?name=mine", content=file, headers={"Content-Type": "image/png"})
    document = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/weights/{document['id']}"
    WeightsSchema.model_validate(document)
    assert (document["name"], document["size_bytes"]) == ("mine", len(file))
    assert document["sha256"] == hashlib.sha256(file).hexdigest()
    assert {row["name"]: tuple(row["shape"]) for row in document["tensors"]} == {
        name: shape for name, (_, shape) in tensors_of(file).items()
    }
    assert {row["dtype"] for row in document["tensors"]} == {"float32"}
    assert document["created_at"].endswith("Z")
    assert api.client.get(answer.headers["location"]).json() == document
    assert leftovers(api) == []


def test_a_chunked_body_is_taken_and_the_name_is_optional(api):
    file = good(**SHAPES)
    answer = api.client.post("/v1/weights", content=iter([file[:100], file[100:]]))
    assert (answer.status_code, answer.json()["name"]) == (201, "weights")


@pytest.mark.parametrize(
    ("content", "pointer", "words"),
    [
        (
            b"\x80\x04\x95\x10\0\0\0\0\0\0\0]\x94.",
            "",
            "this is a PyTorch pickle: save with safetensors.torch.save_file",
        ),
        (good(**SHAPES)[:-1], "", "cut off"),
        (weights_file({"a": entry(0, 8)}, b"\0\0\xc0\x7f" * 2), "/a", "a has values that are not finite"),
        (weights_file({"a": entry(0, 8, [1], "I64")}, bytes(8)), "/a/dtype", "a is I64"),
        (weights_file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "/b/data_offsets", "overlaps"),
        (weights_file({}, length=2**63), "", "cut off or damaged"),
    ],
    ids=["pickle", "truncated", "NaN", "int64", "overlap", "length"],
)
def test_a_file_that_cannot_be_used_is_422_and_says_why(api, content, pointer, words):
    answer = api.client.post("/v1/weights", content=content)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, "invalid_weights")
    assert error_pointers(problem) == [pointer]
    assert words in problem["errors"][0]["message"]
    assert words in problem["detail"]
    assert leftovers(api) == []


def test_an_empty_or_compressed_body_is_refused(api):
    empty = api.client.post("/v1/weights", content=b"")
    assert (empty.status_code, empty.json()["code"]) == (422, "invalid_parameter")
    packed = api.client.post("/v1/weights", content=b"x", headers={"Content-Encoding": "gzip"})
    assert packed.json()["code"] == "unsupported_media_type"


def test_weights_over_the_limit_are_413_and_leave_nothing(tmp_path):
    with open_api(tmp_path, max_upload_bytes=1000) as api:
        for content in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):
            assert api.client.post("/v1/weights", content=content).json()["code"] == "too_large"
        assert api.client.get("/v1/weights").json() == {"items": [], "next_cursor": None}
        assert leftovers(api) == []


def test_weights_are_listed_newest_first_in_pages_without_their_tensors(tmp_path):
    with open_api(tmp_path) as api:
        ids = [upload(api) for _ in range(3)]
        first = api.client.get("/v1/weights?limit=2").json()
        rest = api.client.get("/v1/weights", params={"limit": 2, "cursor": first["next_cursor"]}).json()
        assert [item["id"] for item in first["items"] + rest["items"]] == ids[::-1]
        assert rest["next_cursor"] is None
        assert "tensors" not in first["items"][0]
        wrong = api.client.get("/v1/weights?cursor=ds_" + "0" * 26)
        assert (wrong.status_code, wrong.json()["code"]) == (422, "invalid_cursor")


def test_a_job_starts_from_weights_which_are_in_use_until_it_is_over(api):
    weights_id = upload(api)
    path = f"/v1/weights/{weights_id}"
    assert api.client.post("/v1/jobs/validate", json=with_weights(weights_id)).json()["valid"] is True
    job = api.client.post("/v1/jobs", json=with_weights(weights_id)).json()
    assert job["spec"]["model"]["weights"] == weights_id
    refused = api.client.delete(path)
    assert (refused.status_code, refused.json()["code"]) == (409, "in_use")
    assert job["id"] in refused.json()["detail"]
    api.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert api.client.delete(path).status_code == 204
    for method in ("GET", "DELETE"):
        assert api.client.request(method, path).status_code == 404
    for path in ("/v1/jobs", "/v1/jobs/validate"):
        gone = api.client.post(path, json=with_weights(weights_id))
        assert (gone.status_code, error_pointers(gone.json())) == (422, ["/model/weights"])
        assert "upload them" in gone.json()["errors"][0]["message"]


def test_a_tensor_that_does_not_fit_is_422_with_its_name_and_both_shapes(api):
    weights_id = upload(api)
    wider = [LAYERS[0] | {"out_channels": 6}, *LAYERS[1:]]
    answer = api.client.post("/v1/jobs", json=with_weights(weights_id, wider))
    assert answer.status_code == 422
    faults = {fault["message"].split()[1]: fault for fault in answer.json()["errors"]}
    assert set(faults) == {"one.weight", "one.bias", "head.weight"}
    assert (faults["head.weight"]["limit"], faults["head.weight"]["value"]) == ([10, 6], [10, 4])
    missing = api.client.post("/v1/jobs", json=with_weights(upload(api, good(one__weight=(4, 1, 3, 3)))))
    assert "have no tensor one.bias" in missing.json()["detail"]


def test_a_job_starts_from_the_network_of_a_finished_one(api, source):
    spec = SPEC | {"model": {"job": source}, "optimizations": [{"type": "distill", "teacher": source}]}
    plan = api.client.post("/v1/jobs/validate", json=spec).json()
    assert [row["name"] for row in plan["layers"]][:2] == ["first", "norm"]
    job = api.client.post("/v1/jobs", json=spec).json()
    assert job["spec"]["model"] == {"job": source, "artifact": "pruned", "input_shape": [1, 28, 28], "head": "auto"}
    refused = api.client.delete(f"/v1/jobs/{source}")
    assert (refused.status_code, refused.json()["code"]) == (409, "in_use")
    assert job["id"] in refused.json()["detail"]
    api.client.post(f"/v1/jobs/{job['id']}/cancel")
    retried = api.client.post(f"/v1/jobs/{job['id']}/retry")
    assert (retried.status_code, retried.json()["spec"]) == (201, job["spec"])
    assert api.client.delete(f"/v1/jobs/{source}").json()["code"] == "in_use"
    assert api.client.delete(f"/v1/jobs/{retried.json()['id']}").status_code == 204
    assert api.client.delete(f"/v1/jobs/{source}").status_code == 204
    again = api.client.post(f"/v1/jobs/{job['id']}/retry")
    assert (again.status_code, again.json()["code"]) == (422, "invalid_spec")
    assert error_pointers(again.json()) == ["/model/job"]


def test_a_network_that_is_not_there_yet_or_never_was_is_422_at_its_place(api):
    running = api.submit()["id"]
    for job_id, words in ((running, "it is queued: wait until it has succeeded"), (UNKNOWN, "there is no job")):
        for path in ("/v1/jobs", "/v1/jobs/validate"):
            answer = api.client.post(path, json=SPEC | {"model": {"job": job_id}})
            assert (answer.status_code, error_pointers(answer.json())) == (422, ["/model/job"])
            assert words in answer.json()["errors"][0]["message"]
            assert answer.json()["errors"][0]["value"] == job_id
