"""The responses of each route, for `/openapi.json`. Routes answer documents; a test checks every answer against these."""

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


def _gives(model: type[Answer], what: str, status: int = 200, headers: tuple[str, ...] = ()) -> Responses:
    named = {name: {"schema": {"type": "string"}} for name in headers}
    return {status: {"model": model, "description": what, **({"headers": named} if named else {})}}


def _content(media_type: str, what: str, schema: dict[str, Any], status: int = 200) -> Responses:
    return {status: {"description": what, "content": {media_type: {"schema": schema}}}}


def _bare(status: int, what: str) -> Responses:
    return {status: {"description": what}}


_TEXT = {"type": "string"}
_BYTES = {"type": "string", "format": "binary"}
JOB = _gives(JobSchema, "The job.", 200, ("ETag", "Retry-After")) | _bare(304, "It is as If-None-Match says.")
SUBMITTED = _gives(JobSchema, "The new job.", 201, ("Location", "ETag")) | _gives(
    JobSchema, "The job that this Idempotency-Key has made.", 200, ("Location", "Idempotent-Replayed")
)
CHANGED = _gives(JobSchema, "The job; it obeys as soon as it can.", 202)
REMOVED = _bare(204, "It is gone.")
JOBS = _gives(JobsSchema, "A page.")
VALIDATED = _gives(PlanSchema, "The job is valid.")
EVENTS = _gives(EventsSchema, "Events in order.")
EVENTS[200]["content"] = {"text/event-stream": {"schema": _TEXT}}
METRICS = _gives(MetricsSchema, "The curves.")
LOG = _content("text/plain", "The log.", _TEXT)
REPORT = _gives(ReportSchema, "The report.")
CHECKPOINTS = _gives(CheckpointsSchema, "The checkpoints.")
ARTIFACTS = _gives(ArtifactsSchema, "The files.")
FILE = (
    _content("application/octet-stream", "The bytes.", _BYTES)
    | _content("application/octet-stream", "A part of the bytes.", _BYTES, 206)
    | _bare(304, "It is as If-None-Match says.")
)
DATASET = _gives(DatasetSchema, "The data set.")
UPLOADED = _gives(DatasetSchema, "The data set; `checking` until its check is over.", 201, ("Location",))
DATASETS = _gives(DatasetsSchema, "The data sets.")
WEIGHTS = _gives(WeightsSchema, "The weights.")
WEIGHTS_UPLOADED = _gives(WeightsSchema, "The weights, checked.", 201, ("Location",))
WEIGHTS_PAGE = _gives(WeightsPageSchema, "A page.")
PRESETS = _gives(PresetsSchema, "The presets.")
OPTIMIZATIONS = _gives(OptimizationsSchema, "The optimizations.")
WORKERS = _gives(WorkersSchema, "The workers.")
HEALTH = _gives(HealthSchema, "Fine.")

SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}
UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": _BYTES}}}
}
