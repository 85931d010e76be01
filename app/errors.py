"""Everything that can go wrong and that a user or an operator has to understand: code, HTTP status, sentence, advice.

    EspalierError
    ├── RequestError                    a refused request: an HTTP answer
    │   ├── MalformedRequest            400 malformed_request
    │   ├── InvalidJson                 400 invalid_json
    │   ├── InvalidHeader               400 invalid_parameter
    │   ├── Unauthorized                401 unauthorized
    │   ├── HostNotAllowed              403 host_not_allowed
    │   ├── RequestTimeout              408 request_timeout
    │   ├── PreconditionFailed          412 precondition_failed
    │   ├── TooLarge                    413 too_large
    │   ├── UriTooLong                  414 uri_too_long
    │   ├── UnsupportedMediaType        415 unsupported_media_type
    │   ├── RangeNotSatisfiable         416 range_not_satisfiable
    │   ├── DuplicateKey                422 duplicate_key
    │   ├── InvalidIdempotencyKey       422 invalid_idempotency_key
    │   ├── TooManyStreams              429 too_many_streams
    │   ├── HeadersTooLarge             431 headers_too_large
    │   ├── InvalidSpec                 422 invalid_spec: faults with JSON pointers
    │   ├── InvalidWeights              422 invalid_weights: faults with pointers into the file's header
    │   ├── InvalidParameter            422 invalid_parameter
    │   ├── InvalidCursor               422 invalid_cursor
    │   ├── NotFound                    404 not_found
    │   │   ├── JobNotFound             404 not_found
    │   │   └── ObjectNotFound          404 not_found: a row without its bytes
    │   ├── IllegalTransition           409 illegal_transition
    │   ├── NotFinished                 409 not_finished
    │   ├── InUse                       409 in_use
    │   ├── IdempotencyMismatch         422 idempotency_mismatch
    │   └── Unavailable                 503 unavailable
    │       ├── StorageDenied           503 unavailable
    │       └── StorageFull             503 storage_full
    ├── JobError                        ends a job: `failed` with code, sentence, hint
    │   ├── BudgetMissed, DataInvalid, DataUnavailable, DiskFull, Diverged, LayerEmptied, OutOfMemory,
    │   └── Poisoned, QuantizationFailed, SourceUnavailable, TimeLimit, VerificationFailed, WeightsInvalid
    ├── LostOwnership                   another worker owns the job now: stop, write nothing
    └── StartupError                    a process cannot start: one sentence that says what to do
        └── NewerDatabase               the schema was made by a later release

The class docstring is the default sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in what was sent: where (JSON pointer), what, and the limit it broke."""

    pointer: str
    message: str
    limit: JsonValue = None
    value: JsonValue = None

    def document(self) -> dict[str, JsonValue]:
        """The fault as an entry of `errors` in a problem answer."""
        document: dict[str, JsonValue] = {"pointer": self.pointer, "message": self.message}
        if self.limit is not None:
            document["limit"] = self.limit
        if self.value is not None:
            document["value"] = self.value
        return document


class EspalierError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip().splitlines()[0]
        super().__init__(self.message)


class RequestError(EspalierError):
    """The request cannot be carried out."""

    status: ClassVar[int] = 400
    title: ClassVar[str] = "Bad request"

    def __init__(self, message: str | None = None, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class MalformedRequest(RequestError):
    """The request is not valid HTTP for this service."""

    code = "malformed_request"


class InvalidJson(RequestError):
    """The body is not one JSON document: UTF-8 without a byte order mark, numbers finite, at most 200 levels deep."""

    code = "invalid_json"
    title = "Invalid JSON"


class InvalidHeader(RequestError):
    """A header of the request is not valid."""

    code = "invalid_parameter"
    title = "Invalid header"


class Unauthorized(RequestError):
    """This needs a key: send `Authorization: Bearer <key>`."""

    code = "unauthorized"
    status = 401
    title = "Unauthorized"


class HostNotAllowed(RequestError):
    """This service answers to localhost only; set ESPALIER_HOST and ESPALIER_API_KEY to serve others."""

    code = "host_not_allowed"
    status = 403
    title = "Host not allowed"


class RequestTimeout(RequestError):
    """The body came too slowly: send it again."""

    code = "request_timeout"
    status = 408
    title = "Too slow"


class PreconditionFailed(RequestError):
    """It has changed since the version that If-Match names: read it again."""

    code = "precondition_failed"
    status = 412
    title = "Changed meanwhile"


class TooLarge(RequestError):
    """The body is larger than it may be."""

    code = "too_large"
    status = 413
    title = "Too large"


class UriTooLong(RequestError):
    """The address is longer than 8,192 bytes."""

    code = "uri_too_long"
    status = 414
    title = "Address too long"


class UnsupportedMediaType(RequestError):
    """The body must be JSON: send `Content-Type: application/json` and no Content-Encoding."""

    code = "unsupported_media_type"
    status = 415
    title = "Unsupported media type"


class RangeNotSatisfiable(RequestError):
    """The range begins after the end of the file."""

    code = "range_not_satisfiable"
    status = 416
    title = "Range not satisfiable"


class DuplicateKey(RequestError):
    """An object of the body names a key twice."""

    code = "duplicate_key"
    status = 422
    title = "Duplicate key"


class InvalidIdempotencyKey(RequestError):
    """Idempotency-Key takes 1 to 255 visible ASCII characters."""

    code = "invalid_idempotency_key"
    status = 422
    title = "Invalid Idempotency-Key"


class TooManyStreams(RequestError):
    """Too many event streams are open: close one, or poll."""

    code = "too_many_streams"
    status = 429
    title = "Too many streams"
    retry_after_s: ClassVar[int] = 5


class HeadersTooLarge(RequestError):
    """The request has more than 100 headers or 32 KiB of them."""

    code = "headers_too_large"
    status = 431
    title = "Headers too large"


class InvalidSpec(RequestError):
    """The job's description has mistakes."""

    code = "invalid_spec"
    status = 422
    title = "Invalid job"

    def __init__(self, faults: Sequence[Fault], message: str | None = None) -> None:
        super().__init__(message or "; ".join(f"{f.pointer or 'the job'}: {f.message}" for f in faults[:3]), faults)


class InvalidWeights(RequestError):
    """The file cannot be used as weights: send safetensors with floating-point tensors."""

    code = "invalid_weights"
    status = 422
    title = "Invalid weights"

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(fault.message for fault in faults[:3]), faults)


class InvalidParameter(RequestError):
    """A parameter of the request is not valid."""

    code = "invalid_parameter"
    status = 422
    title = "Invalid parameter"


class InvalidCursor(RequestError):
    """The cursor is not one that this list gave for these filters: begin again without one."""

    code = "invalid_cursor"
    status = 422
    title = "Invalid cursor"


class IdempotencyMismatch(RequestError):
    """This Idempotency-Key was used with another body: send a new key for a new request."""

    code = "idempotency_mismatch"
    status = 422
    title = "Idempotency key reused"


class NotFound(RequestError):
    """There is no such thing."""

    code = "not_found"
    status = 404
    title = "Not found"


class JobNotFound(NotFound):
    """There is no job with this id."""


class ObjectNotFound(NotFound):
    """The object store does not have this file any more."""


class IllegalTransition(RequestError):
    """The job's state does not allow this."""

    code = "illegal_transition"
    status = 409
    title = "Not possible in this state"

    def __init__(self, verb: str, state: str, allowed: Sequence[str]) -> None:
        super().__init__(f"a job that is {state} cannot {verb}" + (f"; it can {', '.join(allowed)}" if allowed else ""))
        self.state = state
        self.allowed = tuple(allowed)


class NotFinished(RequestError):
    """The job has not finished: wait for a terminal state."""

    code = "not_finished"
    status = 409
    title = "Not finished"


class InUse(RequestError):
    """It is used by a job that has not finished."""

    code = "in_use"
    status = 409
    title = "In use"


class Unavailable(RequestError):
    """The database or the object store does not answer: try again."""

    code = "unavailable"
    status = 503
    title = "Try again"
    retry_after_s: ClassVar[int] = 2


class StorageDenied(Unavailable):
    """The object store refuses this service's credentials, or its bucket does not exist."""


class StorageFull(Unavailable):
    """The disk is full: free space, then try again."""

    code = "storage_full"
    retry_after_s = 60


class JobError(EspalierError):
    """The job cannot go on."""

    code = "failed"
    hint: ClassVar[str] = "read the job's log"

    def __init__(self, message: str | None = None, *, pointer: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.pointer = pointer
        self.advice = hint or self.hint

    def document(self) -> dict[str, JsonValue]:
        """The job's `error`: code, message, pointer, hint."""
        return {"code": self.code, "message": self.message, "pointer": self.pointer, "hint": self.advice}


class BudgetMissed(JobError):
    """The pruned network is larger than its budget."""

    code = "budget_missed"
    hint = "raise the budget, lower min_channels, or exclude fewer layers"


class DataInvalid(JobError):
    """The data cannot be used."""

    code = "data_invalid"
    hint = "read the data set's problems, correct the upload and send it again"


class DataUnavailable(JobError):
    """The data set cannot be obtained on this machine."""

    code = "data_unavailable"
    hint = "put the files where ESPALIER_DATA_PATH points"


class SourceUnavailable(JobError):
    """A network that the job starts from or learns from is not there any more."""

    code = "source_unavailable"
    hint = "name a finished job or uploaded weights that still exist, and submit the job again"


class WeightsInvalid(JobError):
    """The weights that the job starts from cannot be used."""

    code = "weights_invalid"
    hint = "upload weights whose values are finite in float32"


class DiskFull(JobError):
    """The worker's disk is full."""

    code = "disk_full"
    hint = "free space under ESPALIER_HOME, then retry the job"


class Diverged(JobError):
    """The loss is no longer a number."""

    code = "diverged"
    hint = "lower training.optimizer.lr, add warm-up, or set training.gradient_clipping"


class LayerEmptied(JobError):
    """Pruning would remove all of a layer."""

    code = "layer_emptied"
    hint = "lower the threshold, or exclude the layer"


class OutOfMemory(JobError):
    """The device ran out of memory."""

    code = "out_of_memory"
    hint = "lower training.batch_size or the network's width"


class Poisoned(JobError):
    """The trainer crashed three times without progress."""

    code = "poison"
    hint = "the log's last lines say how it ended; a retry starts from the beginning"


class QuantizationFailed(JobError):
    """The network could not be quantized."""

    code = "quantization_failed"
    hint = "submit the job again without quantize, or with the layers in exclude that hold large or broken values"


class TimeLimit(JobError):
    """The job ran longer than it may."""

    code = "time_limit"
    hint = "lower training.epochs or raise ESPALIER_JOB_TIME_LIMIT_S"


class VerificationFailed(JobError):
    """An exported file does not reproduce the trained network; nothing was delivered."""

    code = "verification_failed"
    hint = "retry the job; if it fails again, report it with the job's log"


class LostOwnership(EspalierError):
    """Another worker owns this job now."""

    code = "lost_ownership"


class StartupError(EspalierError):
    """The process cannot start."""

    code = "startup"


class NewerDatabase(StartupError):
    """The database was made by a later release of Espalier: install that release, or restore an older backup."""
