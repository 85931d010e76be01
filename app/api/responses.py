"""The responses of each route, for `/openapi.json`. A test checks every answer against them."""

from __future__ import annotations

from typing import Any

from app.schemas.answer import Answer
from app.schemas.catalogue import OptimizationsSchema, PresetsSchema
from app.schemas.job import ArtifactsSchema, CheckpointsSchema, EventsSchema, JobSchema, JobsSchema, MetricsSchema
from app.schemas.plan import PlanSchema
from app.schemas.report import ReportSchema
from app.schemas.service import HealthSchema, WorkersSchema
from app.schemas.upload import DatasetSchema, DatasetsSchema, WeightsPageSchema, WeightsSchema

Responses = dict[int | str, dict[str, Any]]


def _json_response(model: type[Answer], what: str, status: int = 200, headers: tuple[str, ...] = ()) -> Responses:
    named = {name: {"schema": {"type": "string"}} for name in headers}
    return {status: {"model": model, "description": what, **({"headers": named} if named else {})}}


def _content_response(media_type: str, what: str, schema: dict[str, Any], status: int = 200) -> Responses:
    return {status: {"description": what, "content": {media_type: {"schema": schema}}}}


def _empty_response(status: int, what: str) -> Responses:
    return {status: {"description": what}}


_TEXT = {"type": "string"}
_BYTES = {"type": "string", "format": "binary"}
JOB = _json_response(JobSchema, "The job.", 200, ("ETag", "Retry-After")) | _empty_response(
    304, "It is as If-None-Match says."
)
SUBMITTED = _json_response(JobSchema, "The new job.", 201, ("Location", "ETag")) | _json_response(
    JobSchema, "The job that this Idempotency-Key has made.", 200, ("Location", "Idempotent-Replayed")
)
CHANGED = _json_response(JobSchema, "The job; it obeys as soon as it can.", 202)
REMOVED = _empty_response(204, "It is gone.")
JOBS = _json_response(JobsSchema, "A page.")
VALIDATED = _json_response(PlanSchema, "The job is valid.")
EVENTS = _json_response(EventsSchema, "Events in order.")
EVENTS[200]["content"] = {"text/event-stream": {"schema": _TEXT}}
METRICS = _json_response(MetricsSchema, "The curves.")
LOG = _content_response("text/plain", "The log.", _TEXT)
REPORT = _json_response(ReportSchema, "The report.")
CHECKPOINTS = _json_response(CheckpointsSchema, "The checkpoints.")
ARTIFACTS = _json_response(ArtifactsSchema, "The files.")
FILE = (
    _content_response("application/octet-stream", "The bytes.", _BYTES)
    | _content_response("application/octet-stream", "A part of the bytes.", _BYTES, 206)
    | _empty_response(304, "It is as If-None-Match says.")
)
DATASET = _json_response(DatasetSchema, "The data set.")
UPLOADED = _json_response(DatasetSchema, "The data set; `checking` until its check is over.", 201, ("Location",))
DATASETS = _json_response(DatasetsSchema, "The data sets.")
WEIGHTS = _json_response(WeightsSchema, "The weights.")
WEIGHTS_UPLOADED = _json_response(WeightsSchema, "The weights, checked.", 201, ("Location",))
WEIGHTS_PAGE = _json_response(WeightsPageSchema, "A page.")
PRESETS = _json_response(PresetsSchema, "The presets.")
OPTIMIZATIONS = _json_response(OptimizationsSchema, "The optimizations.")
WORKERS = _json_response(WorkersSchema, "The workers.")
HEALTH = _json_response(HealthSchema, "Fine.")

SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}
UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": _BYTES}}}
}
