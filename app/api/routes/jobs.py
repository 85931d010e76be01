"""`/v1/jobs`: submit, look, tell, remove. Each move is committed before its answer begins."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from app.api import schemas
from app.api.bodies import parse_json, read_json
from app.api.context import LOOK_S, Context, context_of, pause, tenant
from app.api.downloads import matches
from app.api.parameters import (
    Cursor,
    IdempotencyKey,
    IfMatch,
    IfNoneMatch,
    JobId,
    Limit,
    WaitS,
    check_id,
    check_match,
    parse_label,
    read_idempotency_key,
)
from app.api.rendering import Document, Json, checkpoint_document, etag_of, job_document
from app.api.submission import plan_job
from app.database.engine import Database
from app.jobs import commands
from app.jobs.commands import JobView
from app.planning.plan import plan_answer
from app.spec.references import references_in

POLL_S = 2  # Retry-After of a job that is not over

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
Given = Annotated[Context, Depends(context_of)]
Tenant = Annotated[str, Depends(tenant)]
JsonBytes = Annotated[bytes, Depends(read_json)]
Move = Callable[[Database, str, str], JobView]


@router.post("", status_code=201, summary="Submit a job", responses=schemas.SUBMITTED, openapi_extra=schemas.SPEC_BODY)
def submit_job(
    request: Request, given: Given, owner: Tenant, raw: JsonBytes, idempotency_key: IdempotencyKey = None
) -> Response:
    """A new job, queued. With an `Idempotency-Key` that was used before: the job of that time (200)."""
    key = read_idempotency_key(request.headers)
    plan = plan_job(given, owner, parse_json(raw).document)
    view, created = commands.submit(
        given.db,
        tenant=owner,
        spec=plan.spec.document(),
        name=plan.spec.name,
        labels=plan.spec.labels,
        idempotency=None if key is None else (key, hashlib.sha256(raw).hexdigest()),
        needs=references_in(plan.spec),
    )
    return _made(given, view, created)


@router.post(
    "/validate", summary="Try a job without submitting it", responses=schemas.VALIDATED, openapi_extra=schemas.SPEC_BODY
)
def validate_job(given: Given, owner: Tenant, raw: JsonBytes) -> Response:
    """What the job would be: layers, costs, memory, warnings. 200 exactly when a submit is 201; stores nothing."""
    return Json(plan_answer(plan_job(given, owner, parse_json(raw).document)))


@router.get("", summary="List jobs, newest first", responses=schemas.JOBS)
def list_jobs(
    given: Given,
    owner: Tenant,
    state: Annotated[str | None, Query(description="Only jobs in this state.")] = None,
    label: Annotated[str | None, Query(description="Only jobs with this label, as key:value.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """One page; `next_cursor` null is the end. More than 200 are cut to 200."""
    page, following = commands.list_jobs(
        given.db, owner, state=state, label=parse_label(label), limit=min(limit, commands.PAGE_LIMIT), cursor=cursor
    )
    return Json({"items": [job_document(job) for job in page], "next_cursor": following})


@router.get("/{job_id}", summary="One job", responses=schemas.JOB)
async def get_job(
    request: Request,
    given: Given,
    owner: Tenant,
    job_id: JobId,
    wait_s: WaitS = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The job. With `wait_s` the answer is held until it changes: from what If-None-Match names, else from now."""
    check_id("job", job_id)
    version, answer = await run_in_threadpool(_look, given, owner, job_id)
    seen = answer.headers["etag"]
    until = asyncio.get_running_loop().time() + (wait_s or 0)
    if if_none_match is None or matches(if_none_match, seen):
        # a new event alone is a new version of the row, and no change of the answer
        while answer.headers["etag"] == seen and "retry-after" in answer.headers:
            if not await _wait_for_change(request, given, owner, job_id, version, until):
                break
            version, answer = await run_in_threadpool(_look, given, owner, job_id)
    if matches(if_none_match, answer.headers["etag"]):
        return Response(status_code=304, headers={"ETag": answer.headers["etag"]})
    return answer


async def _wait_for_change(
    request: Request, given: Context, owner: str, job_id: str, version: str, until: float
) -> bool:
    """True when the job's row changed; False when the time is over, the server stops or the client is gone.

    Holds no session.
    """
    while (left := until - asyncio.get_running_loop().time()) > 0:
        if await pause(given.stopping, min(LOOK_S, left)) or await request.is_disconnected():
            return False
        if await given.watch.version(owner, job_id) != version:
            return True
    return False


@router.post("/{job_id}/cancel", status_code=202, summary="Discard the job", responses=schemas.TOLD)
def cancel_job(given: Given, owner: Tenant, job_id: JobId, if_match: IfMatch = None) -> Response:
    """The job, cancelled or on its way there."""
    return _tell(given, owner, job_id, if_match, commands.cancel_job)


@router.post("/{job_id}/stop", status_code=202, summary="Deliver the best so far", responses=schemas.TOLD)
def stop_job(given: Given, owner: Tenant, job_id: JobId, if_match: IfMatch = None) -> Response:
    """The job; what has been reached is evaluated and exported, and the job succeeds with `stopped_early`."""
    return _tell(given, owner, job_id, if_match, commands.stop_job)


@router.post("/{job_id}/pause", status_code=202, summary="Pause the job", responses=schemas.TOLD)
def pause_job(given: Given, owner: Tenant, job_id: JobId, if_match: IfMatch = None) -> Response:
    """The job; a running one writes a checkpoint and leaves its worker."""
    return _tell(given, owner, job_id, if_match, commands.pause_job)


@router.post("/{job_id}/resume", status_code=202, summary="Go on with a paused job", responses=schemas.TOLD)
def resume_job(given: Given, owner: Tenant, job_id: JobId, if_match: IfMatch = None) -> Response:
    """The job, waiting for a worker again; it goes on from its checkpoint."""
    return _tell(given, owner, job_id, if_match, commands.resume_job)


@router.post("/{job_id}/retry", status_code=201, summary="Submit the same job again", responses=schemas.RETRIED)
def retry_job(
    request: Request, given: Given, owner: Tenant, job_id: JobId, idempotency_key: IdempotencyKey = None
) -> Response:
    """A new job with `retry_of` and the same spec, name and labels. The old one must be over.

    422 if a network that it starts from or learns from was deleted meanwhile.
    """
    key = read_idempotency_key(request.headers)
    check_id("job", job_id)
    idempotency = None if key is None else (key, hashlib.sha256(b"").hexdigest())
    view, created = commands.retry_job(given.db, owner, job_id, idempotency=idempotency)
    return _made(given, view, created)


@router.delete("/{job_id}", status_code=204, summary="Remove the job", responses=schemas.REMOVED)
def delete_job(given: Given, owner: Tenant, job_id: JobId, if_match: IfMatch = None) -> Response:
    """Nothing. A running job is cancelled first; then its rows and its files go.

    409 while a job that has not finished starts from its network or learns from it.
    """
    check_id("job", job_id)
    _check_match(given, owner, job_id, if_match)
    commands.delete_job(given.db, owner, job_id)
    return Response(status_code=204)


@router.get("/{job_id}/metrics", summary="Curves", responses=schemas.METRICS)
def get_metrics(given: Given, owner: Tenant, job_id: JobId) -> Response:
    """Every series as [step, value] pairs in the order of steps."""
    return Json({"series": commands.read_metrics(given.db, owner, check_id("job", job_id))})


@router.get("/{job_id}/logs", summary="The trainer's log", responses=schemas.LOG)
def get_logs(given: Given, owner: Tenant, job_id: JobId) -> Response:
    """The newest 4 MiB, as plain text."""
    return PlainTextResponse(commands.read_log(given.db, owner, check_id("job", job_id)))


@router.get("/{job_id}/report", summary="Dense against pruned", responses=schemas.REPORT)
def get_report(given: Given, owner: Tenant, job_id: JobId) -> Response:
    """The report of a job that succeeded; 409 before it is over."""
    return Json(commands.read_report(given.db, owner, check_id("job", job_id)))


@router.get("/{job_id}/checkpoints", summary="Checkpoints", responses=schemas.CHECKPOINTS)
def list_checkpoints(given: Given, owner: Tenant, job_id: JobId) -> Response:
    """The kept checkpoints, newest first."""
    kept = commands.list_checkpoints(given.db, owner, check_id("job", job_id))
    return Json({"items": [checkpoint_document(checkpoint) for checkpoint in kept]})


def _document(given: Context, view: JobView) -> Document:
    return job_document(view, commands.queue_facts(given.db, view) if view.state == "queued" else None)


def _answer(given: Context, view: JobView, status_code: int = 200) -> Json:
    document = _document(given, view)
    answer = Json(document, status_code, {"ETag": etag_of(document), "Cache-Control": "no-cache"})
    if not view.terminal:
        answer.headers["Retry-After"] = str(POLL_S)
    return answer


def _look(given: Context, owner: str, job_id: str) -> tuple[str, Json]:
    view = commands.get_job(given.db, owner, job_id)
    return view.version, _answer(given, view)


def _made(given: Context, view: JobView, created: bool) -> Response:
    """The answer for a new job, or for one that its Idempotency-Key has made before."""
    if created:
        given.bell.ring(view.id)
    answer = _answer(given, view, 201 if created else 200)
    answer.headers["Location"] = f"/v1/jobs/{view.id}"
    if not created:
        answer.headers["Idempotent-Replayed"] = "true"
    return answer


def _tell(given: Context, owner: str, job_id: str, if_match: str | None, move: Move) -> Response:
    check_id("job", job_id)
    _check_match(given, owner, job_id, if_match)
    view = move(given.db, owner, job_id)
    if view.state == "queued":
        given.bell.ring(view.id)
    return _answer(given, view, 202)


def _check_match(given: Context, owner: str, job_id: str, if_match: str | None) -> None:
    if if_match is not None:
        check_match(if_match, _look(given, owner, job_id)[1].headers["etag"])
