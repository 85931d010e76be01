"""The shapes of the answers, for `/openapi.json`. Routes answer documents; a test checks every answer against these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

JobState = Literal["queued", "running", "paused", "cancelling", "succeeded", "failed", "cancelled"]
Responses = dict[int | str, dict[str, Any]]
_SHA256 = Field(pattern="^[0-9a-f]{64}$")


class Answer(BaseModel):
    """Clients ignore fields they do not know: more may come."""

    model_config = ConfigDict(extra="allow")


class Fault(Answer):
    """One mistake: where in what was sent, what, and the limit it broke."""

    pointer: str
    message: str
    limit: Any = None
    value: Any = None


class Problem(Answer):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str
    errors: list[Fault]


class Progress(Answer):
    """How far a job is, over all of its phases."""

    phase: str
    epoch: int
    epochs: int | None
    step: int
    steps: int | None
    fraction: float = Field(ge=0, le=1)
    images_per_s: float | None
    eta_s: float | None


class JobError(Answer):
    """Why a job failed."""

    code: str
    message: str
    pointer: str | None
    hint: str


class Queue(Answer):
    """Why a queued job waits."""

    position: int
    reason: Literal["no_worker", "backing_off", "all_busy", "starting"]
    workers_alive: int


class Job(Answer):
    """A job."""

    id: str
    name: str | None
    labels: dict[str, str]
    state: JobState
    attempt: int
    progress: Progress
    created_at: str
    started_at: str | None
    finished_at: str | None
    error: JobError | None
    summary: dict[str, Any] | None = Field(
        description='{"baseline": M, "final": M}, and "int8": M where an 8-bit file was asked for and delivered'
    )
    stopped_early: bool
    retry_of: str | None
    allowed: list[str] = Field(description="Verbs that are legal now.")
    spec: dict[str, Any] = Field(description="The job as submitted, with every default filled in.")
    links: dict[str, str]
    queue: Queue | None = None


class Jobs(Answer):
    """A page of jobs."""

    items: list[Job]
    next_cursor: str | None


class Event(Answer):
    """Something that happened."""

    seq: int
    at: str
    type: str
    level: Literal["info", "warn", "error"]
    message: str
    data: dict[str, Any]


class Events(Answer):
    """A page of events."""

    items: list[Event]
    next_after: int


class Metrics(Answer):
    """Curves: series name to [step, value] pairs."""

    series: dict[str, list[tuple[int, float | None]]]


class Checkpoint(Answer):
    """A checkpoint that a job can go on from."""

    attempt: int
    step: int
    epoch: int
    phase: str
    at: str
    metrics: dict[str, Any]
    size_bytes: int
    sha256: str = _SHA256


class Checkpoints(Answer):
    """Checkpoints, newest first."""

    items: list[Checkpoint]


class Artifact(Answer):
    """A delivered file."""

    name: str
    kind: str
    size_bytes: int
    sha256: str = _SHA256
    media_type: str
    href: str


class Artifacts(Answer):
    """Delivered files."""

    items: list[Artifact]


class DatasetProblem(Answer):
    """What is wrong with one file of an upload."""

    file: str
    message: str


class Dataset(Answer):
    """An uploaded data set."""

    id: str
    name: str
    state: Literal["checking", "ready", "rejected"]
    format: str
    splits: dict[str, int] | None
    classes: list[str]
    shape: list[int] | None
    size_bytes: int
    sha256: str | None
    problems: list[DatasetProblem]


class Datasets(Answer):
    """Uploaded data sets."""

    items: list[Dataset]


class Tensor(Answer):
    """One tensor of uploaded weights."""

    name: str
    shape: list[int]
    dtype: str = Field(description="float32, float16, bfloat16 or float64.")


class WeightsHead(Answer):
    """Uploaded weights without their tensors."""

    id: str
    name: str
    sha256: str = _SHA256
    size_bytes: int
    created_at: str


class Weights(WeightsHead):
    """Uploaded weights."""

    tensors: list[Tensor]


class WeightsPage(Answer):
    """A page of uploaded weights."""

    items: list[WeightsHead]
    next_cursor: str | None


class Cost(Answer):
    """What a network costs; `bytes` is the size of its safetensors file."""

    params: int
    nonzero_params: int
    macs: int
    bytes: int


class LayerRow(Answer):
    """One layer of a network."""

    name: str
    type: str
    output_shape: list[int]
    params: int
    macs: int


class Plan(Answer):
    """What a job would be."""

    valid: Literal[True]
    layers: list[LayerRow]
    given: Cost
    baseline: Cost
    planned: Cost
    memory: dict[str, Any]
    estimate: dict[str, Any]
    warnings: list[Any]


class Worker(Answer):
    """A worker."""

    id: str
    alive: bool
    host: str
    pid: int
    slots: int
    device: str
    running: list[str]
    started_at: str
    seen_at: str


class Workers(Answer):
    """Workers."""

    items: list[Worker]


class Preset(Answer):
    """A network by name."""

    name: str
    description: str
    source: str
    input_shape: list[int]
    classes: int
    cost: Cost
    schema_: dict[str, Any] = Field(alias="schema")
    example: dict[str, Any]


class Presets(Answer):
    """Networks by name."""

    items: list[Preset]


class Optimization(Answer):
    """An optimization a job may ask for."""

    type: str
    title: str
    description: str
    schema_: dict[str, Any] = Field(alias="schema")
    example: dict[str, Any]
    examples: list[dict[str, Any]]


class Optimizations(Answer):
    """Optimizations."""

    items: list[Optimization]


class Health(Answer):
    """Fine."""

    status: str


def _gives(model: type[Answer], what: str, status: int = 200, headers: tuple[str, ...] = ()) -> Responses:
    named = {name: {"schema": {"type": "string"}} for name in headers}
    return {status: {"model": model, "description": what, **({"headers": named} if named else {})}}


def _content(media_type: str, what: str, schema: dict[str, Any], status: int = 200) -> Responses:
    return {status: {"description": what, "content": {media_type: {"schema": schema}}}}


def _bare(status: int, what: str) -> Responses:
    return {status: {"description": what}}


_TEXT = {"type": "string"}
_BYTES = {"type": "string", "format": "binary"}
JOB = _gives(Job, "The job.", 200, ("ETag", "Retry-After")) | _bare(304, "It is as If-None-Match says.")
SUBMITTED = _gives(Job, "The new job.", 201, ("Location", "ETag")) | _gives(
    Job, "The job that this Idempotency-Key has made.", 200, ("Location", "Idempotent-Replayed")
)
RETRIED = SUBMITTED
TOLD = _gives(Job, "The job; it obeys as soon as it can.", 202)
REMOVED = _bare(204, "It is gone.")
JOBS = _gives(Jobs, "A page.")
VALIDATED = _gives(Plan, "The job is valid.")
EVENTS = _gives(Events, "Events in order.")
EVENTS[200]["content"] = {"text/event-stream": {"schema": _TEXT}}
METRICS = _gives(Metrics, "The curves.")
LOG = _content("text/plain", "The log.", _TEXT)
REPORT = _content("application/json", "The report.", {"type": "object"})
CHECKPOINTS = _gives(Checkpoints, "The checkpoints.")
ARTIFACTS = _gives(Artifacts, "The files.")
FILE = (
    _content("application/octet-stream", "The bytes.", _BYTES)
    | _content("application/octet-stream", "A part of the bytes.", _BYTES, 206)
    | _bare(304, "It is as If-None-Match says.")
)
DATASET = _gives(Dataset, "The data set.")
UPLOADED = _gives(Dataset, "The data set; `checking` until its check is over.", 201, ("Location",))
DATASETS = _gives(Datasets, "The data sets.")
WEIGHTS = _gives(Weights, "The weights.")
WEIGHTS_UPLOADED = _gives(Weights, "The weights, checked.", 201, ("Location",))
WEIGHTS_PAGE = _gives(WeightsPage, "A page.")
PRESETS = _gives(Presets, "The presets.")
OPTIMIZATIONS = _gives(Optimizations, "The optimizations.")
WORKERS = _gives(Workers, "The workers.")
HEALTH = _gives(Health, "Fine.")

SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}
UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": _BYTES}}}
}
