"""The API describes itself truly: every answer fits `/openapi.json`, every error code has its place in `/docs/errors`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from typing import Any

import pytest

from app import errors
from app.jobs import attempts, workers
from app.schemas.answer import Answer
from app.schemas.catalogue import OptimizationsSchema, PresetsSchema
from app.schemas.job import ArtifactsSchema, CheckpointsSchema, EventsSchema, JobSchema, JobsSchema, MetricsSchema
from app.schemas.plan import PlanSchema
from app.schemas.problem import ProblemSchema
from app.schemas.report import ReportSchema
from app.schemas.service import HealthSchema, WorkersSchema
from app.schemas.upload import DatasetSchema, DatasetsSchema, WeightsPageSchema, WeightsSchema
from tests.support.jobs.weights import good
from tests.support.services.api import FILES, SPEC, Api, open_api

WITHOUT_SHAPE = {"get /metrics"}  # text in the form of Prometheus


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with open_api(tmp_path_factory.mktemp("home")) as api:
        workers.register_worker(api.db, "w", "host", 1, 1, "cpu")
        yield api


@pytest.fixture(scope="module")
def openapi(api: Api) -> dict[str, Any]:
    document: dict[str, Any] = api.client.get("/openapi.json").json()
    return document


def test_every_reference_leads_somewhere(openapi):
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for member in value.values():
                yield from references(member)
        elif isinstance(value, list):
            for member in value:
                yield from references(member)

    assert openapi["openapi"].startswith("3.1")
    for reference in references(openapi):
        here: Any = openapi
        for part in reference.removeprefix("#/").split("/"):
            assert part in here, reference
            here = here[part]


def test_every_route_is_described_and_says_that_errors_are_problems(openapi):
    operations = {
        (method, path): operation for path, methods in openapi["paths"].items() for method, operation in methods.items()
    }
    for place in [
        ("post", "/v1/jobs"),
        ("post", "/v1/jobs/validate"),
        ("get", "/v1/jobs"),
        ("get", "/v1/jobs/{job_id}"),
        ("delete", "/v1/jobs/{job_id}"),
        *(("post", f"/v1/jobs/{{job_id}}/{verb}") for verb in ("cancel", "stop", "pause", "resume", "retry")),
        *(("get", f"/v1/jobs/{{job_id}}/{part}") for part in ("events", "metrics", "logs", "report", "checkpoints")),
        ("get", "/v1/jobs/{job_id}/artifacts"),
        ("get", "/v1/jobs/{job_id}/artifacts/{name}"),
        ("post", "/v1/datasets"),
        ("get", "/v1/datasets"),
        ("get", "/v1/datasets/{dataset_id}"),
        ("delete", "/v1/datasets/{dataset_id}"),
        ("post", "/v1/weights"),
        ("get", "/v1/weights"),
        ("get", "/v1/weights/{weights_id}"),
        ("delete", "/v1/weights/{weights_id}"),
        *(
            ("get", path)
            for path in ("/v1/presets", "/v1/optimizations", "/v1/workers", "/healthz", "/readyz", "/metrics")
        ),
    ]:
        operation = operations[place]
        assert operation["summary"], place
        assert operation["description"], place
        assert list(operation["responses"]["default"]["content"]) == ["application/problem+json"]
        assert "422" not in operation["responses"], "FastAPI's own error is not ours"
    assert "HTTPValidationError" not in openapi["components"]["schemas"]


def test_no_route_lacks_a_summary_a_description_and_the_shape_of_its_answer(openapi):
    operations = {
        f"{method} {path}": operation
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    }
    for place, operation in operations.items():
        assert operation.get("summary"), place
        assert operation.get("description"), place
        good = [answer for status, answer in operation["responses"].items() if status in ("200", "201", "202")]
        shaped = [content.get("schema") for answer in good for content in answer.get("content", {}).values()]
        assert any(shaped) or place.startswith("delete ") or place in WITHOUT_SHAPE, place


def test_the_body_of_a_submit_is_the_job_language(openapi):
    body = openapi["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    spec = openapi["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert set(spec["required"]) == {"spec_version", "data", "model"}
    assert spec["additionalProperties"] is False


def test_parameters_are_described_with_their_limits(openapi):
    parameters = {
        parameter["name"]: parameter for parameter in openapi["paths"]["/v1/jobs/{job_id}"]["get"]["parameters"]
    }
    assert set(parameters) == {"job_id", "wait_s", "if-none-match"}
    assert "60" in json.dumps(parameters["wait_s"]["schema"])


def test_every_answer_fits_its_schema(api):
    job_id = api.submit()["id"]
    claim = api.claim(job_id)
    api.say(
        claim,
        ("epoch.finished", "one"),
        metrics=[("train.loss", 1, 1.0)],
        progress={"phase": "training", "epoch": 1, "epochs": 2, "step": 1, "steps": 4, "fraction": 0.5},
    )
    key = f"jobs/{job_id}/attempts/1/checkpoints/{1:012d}.safetensors"
    attempts.record_checkpoint(
        api.db, claim, step=1, epoch=1, phase="training", key=key, size_bytes=1, sha256="0" * 64, metrics={}
    )
    base = f"/v1/jobs/{job_id}"
    while_it_runs: list[tuple[str, str, type[Answer]]] = [
        ("GET", base, JobSchema),
        ("GET", f"{base}/events", EventsSchema),
        ("GET", f"{base}/metrics", MetricsSchema),
        ("GET", f"{base}/checkpoints", CheckpointsSchema),
        ("GET", f"{base}/report", ProblemSchema),
        ("GET", "/v1/jobs", JobsSchema),
        ("GET", "/v1/workers", WorkersSchema),
        ("GET", "/v1/presets", PresetsSchema),
        ("GET", "/v1/optimizations", OptimizationsSchema),
        ("GET", "/healthz", HealthSchema),
        ("GET", "/readyz", HealthSchema),
        ("GET", "/v1/jobs/x", ProblemSchema),
        ("POST", f"{base}/pause", JobSchema),
    ]
    for method, path, model in while_it_runs:
        model.model_validate_json(api.client.request(method, path).content, strict=True)
    api.deliver(claim)
    for path, model in (
        (base, JobSchema),
        (f"{base}/artifacts", ArtifactsSchema),
        (f"{base}/report", ReportSchema),
    ):
        model.model_validate_json(api.client.get(path).content, strict=True)
    PlanSchema.model_validate_json(api.client.post("/v1/jobs/validate", json=SPEC).content, strict=True)
    JobSchema.model_validate_json(api.client.post("/v1/jobs", json=SPEC).content, strict=True)
    DatasetSchema.model_validate_json(api.client.post("/v1/datasets", content=b"x").content, strict=True)
    DatasetsSchema.model_validate_json(api.client.get("/v1/datasets").content, strict=True)
    weights = api.client.post("/v1/weights", content=good(head__weight=(2, 3)))
    WeightsSchema.model_validate_json(weights.content, strict=True)
    WeightsPageSchema.model_validate_json(api.client.get("/v1/weights").content, strict=True)
    refused = api.client.post("/v1/jobs", json={"spec_version": 1, "name": "\0"})
    ProblemSchema.model_validate_json(refused.content, strict=True)


def test_every_error_code_has_its_place_in_the_docs(api):
    html = api.client.get("/docs/errors").text
    pending = [errors.EspalierError]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if issubclass(kind, errors.RequestError | errors.JobError):
            assert f'id="{kind.code}"' in html, kind
    assert 'id="internal"><code>internal</code></td><td>500<' in html


def test_the_docs_list_every_route_of_the_description(api, openapi):
    html = api.client.get("/docs").text
    for path, methods in openapi["paths"].items():
        for method in methods:
            assert f"{method.upper()} {path}" in html


def test_the_job_language_has_a_page_with_every_field_and_every_link_leads_somewhere(api, openapi):
    html = api.client.get("/docs/jobs").text
    for part in (
        "JobSpec",
        "Sensitivity",
        "Budget",
        "Distillation",
        "JobModel",
        "StatedPreprocessing",
        "Conv",
        "Quantize",
    ):
        assert f'<h2 id="{part}">' in html
        for field, schema in openapi["components"]["schemas"][part]["properties"].items():
            assert f"<td><code>{field}</code></td>" in html
            assert escape(schema.get("description", "")) in html
    links = set(re.findall(r'href="/docs/jobs#(\w+)"', html))
    assert links <= set(re.findall(r'<h2 id="(\w+)"', html))
    assert "Problem" not in links
    assert 'href="/docs/jobs"' in api.client.get("/docs").text


def test_the_catalogue_has_schemas_and_examples_that_are_accepted(api):
    for entry in api.client.get("/v1/optimizations").json()["items"]:
        assert entry["schema"]["properties"].keys() >= entry["example"].keys()
    for entry in api.client.get("/v1/presets").json()["items"]:
        assert entry["cost"]["macs"] > 0
        data = {"synthetic": {"classes": entry["classes"], "train": 256, "test": 64}}
        answer = api.client.post("/v1/jobs/validate", json=SPEC | {"data": data, "model": entry["example"]})
        assert (answer.status_code, answer.json()["given"]) == (200, entry["cost"])


def test_workers_are_listed_with_what_they_run(api):
    workers.record_beat(api.db, "w", ["job_1"])
    worker = api.client.get("/v1/workers").json()["items"][0]
    assert (worker["id"], worker["alive"], worker["running"], worker["device"]) == ("w", True, ["job_1"], "cpu")


def test_metrics_count_jobs_by_state_and_requests_by_route(api):
    job_id = api.delivered()
    api.client.get(f"/v1/jobs/{job_id}")
    api.client.get(f"/v1/jobs/{job_id}/artifacts/{next(iter(FILES))}")
    text = api.client.get("/metrics").text
    assert 'espalier_jobs{state="succeeded"}' in text
    assert 'espalier_requests_total{method="GET",route="/v1/jobs/{job_id}/artifacts/{name}",status="200"}' in text
    assert 'espalier_request_seconds_bucket{le="0.008",method="GET",route="/v1/jobs/{job_id}"}' in text
    assert job_id not in text


def test_two_applications_have_counters_of_their_own(api, tmp_path):
    with open_api(tmp_path) as other:
        other.client.get("/healthz")
        assert 'espalier_requests_total{method="GET",route="/v1/jobs",' not in other.client.get("/metrics").text


def test_the_service_is_not_ready_while_it_stops_or_cannot_store(tmp_path):
    with open_api(tmp_path) as api:
        assert api.client.get("/readyz").json() == {"status": "ready"}
        api.context.stopping.set()
        assert api.client.get("/readyz").json()["code"] == "unavailable"
        assert api.client.get("/healthz").status_code == 200
