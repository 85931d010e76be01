"""The shapes of the answers, for `/openapi.json`. Routes answer documents; a test checks every answer against these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.spec.low_rank import Scheme

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


class PlanRow(Answer):
    """What one optimization does to one layer; numbers are widths, of `mask` weights that are not zero."""

    layer: str
    action: Literal["narrow", "follow", "keep", "mask", "insert", "replace"]
    before: int | None
    after: int | None
    exact: bool = Field(description="false: an estimate, the trained weights decide.")
    reason: str
    optimization: str | None = Field(description="Pointer of the optimization.")


class Phase(Answer):
    """One stretch of the job."""

    phase: str
    epochs: int | None = None
    optimization: str | None = None


class Plan(Answer):
    """What a job would be."""

    valid: Literal[True]
    plan_version: int
    layers: list[LayerRow]
    given: Cost
    baseline: Cost = Field(description="After the rewrites: what is trained.")
    planned: Cost = Field(description="After the compressions.")
    floor: Cost | None = Field(description="The least that the last removal of channels could leave.")
    memory: dict[str, Any]
    estimate: dict[str, Any]
    plan: list[PlanRow]
    phases: list[Phase]
    warnings: list[Fault]
    spec: dict[str, Any] = Field(description="The job with every default filled in.")


class Measures(Answer):
    """`M`: what a network can do and costs, on the test part and on this worker; null: not measured."""

    accuracy: float | None
    loss: float | None
    params: int
    nonzero_params: int
    macs: int
    bytes: int
    latency_ms: dict[str, dict[str, dict[str, float]]] | None = Field(
        description="Runtime to batch size to p50 and p95."
    )


class Step(Answer):
    """One optimization of a finished job."""

    optimization: dict[str, Any]
    applied: bool
    before: Measures
    after: Measures
    layers: list[dict[str, Any]]
    seconds: float


class ClassRow(Answer):
    """What became of one class; null: the test part has no example."""

    name: str
    baseline_accuracy: float | None
    final_accuracy: float | None
    change: float | None
    examples: int


class Proof(Answer):
    """What a delivered file gave in a clean process; of the 8-bit file also the bound of its arithmetic."""

    max_abs_difference: float
    accuracy: float
    scheme: Scheme | None = Field(None, description="Of the 8-bit file.")
    largest_pair_sum: int | None = Field(
        None, description="The largest sum of two products of uint8 activations and the file's weights."
    )
    saturates_above: int | None = Field(None, description="What processors without VNNI cut such sums off at.")
    right_on: str | None = Field(None, description="The processors on which the file computes what was proven.")


class Layer(Answer):
    """A layer, and why it is as it is."""

    name: str
    reason: str


class Int8(Measures):
    """The 8-bit file, delivered or not."""

    met: bool = Field(description="Whether it keeps to max_accuracy_drop, and so is delivered.")
    max_accuracy_drop: float
    accuracy_drop: float
    left_in_float32: list[Layer]
    scheme: Scheme | None = None
    right_on: str | None = Field(None, description="The processors on which the file computes what was measured.")


class Cut(Answer):
    """A group of channels cut to one width: the accuracy right after it, and with batch norm recalibrated."""

    kept: float
    channels: int
    macs: int
    params: int
    after_cut: float
    after_recalibration: float


class GroupRow(Answer):
    """A group of channels: the layers that lose them together, and a cut for each part that was asked for."""

    layers: list[str]
    channels: int
    points: list[Cut]


class SensitivityTable(Answer):
    """What each group of channels costs when it alone is cut; nothing is trained again."""

    criterion: str
    examples: int = Field(description="Test images that were looked at.")
    accuracy: float = Field(description="Of the whole network, on these images.")
    groups: list[GroupRow]
    whole: list[Layer]


class SparseFile(Answer):
    """The size of the file without zeros beside that of the same weights with them."""

    name: str
    size_bytes: int
    dense_bytes: int


class Report(Answer):
    """Dense against compressed, step by step and class by class."""

    job_id: str
    baseline: Measures
    final: Measures
    steps: list[Step]
    classes: list[ClassRow]
    verification: dict[str, Proof]
    environment: dict[str, Any]
    notes: list[str]
    int8: Int8 | None = Field(
        None, description="Where an 8-bit file was asked for, and the worker's processor computes its scheme."
    )
    sensitivity: SensitivityTable | None = Field(None, description="Of a job of kind sensitivity.")
    sparse: SparseFile | None = Field(None, description="Where weights were set to zero.")


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
REPORT = _gives(Report, "The report.")
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
