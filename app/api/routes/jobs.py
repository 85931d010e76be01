"""`/v1/jobs`: submit, list, read, change, remove. Each change is committed before its answer begins."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from app.api import responses
from app.api.bodies import JsonBytes, parse_json
from app.api.context import POLL_S, Context, RequestContext, Tenant, wait_for_stop
from app.api.downloads import matches_etag
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
from app.api.rendering import Json, checkpoint_document, etag_of, job_document
from app.api.submission import plan_job
from app.database.engine import Database
from app.jobs import artifacts, commands, queries
from app.jobs.events import read_log, read_metrics
from app.jobs.queries import JobView
from app.planning.plan import plan_answer
from app.spec.references import references_in

RETRY_AFTER_S = 2  # of a job that is not over

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
Change = Callable[[Database, str, str], JobView]


@router.post(
    "", status_code=201, summary="Submit a job", responses=responses.SUBMITTED, openapi_extra=responses.SPEC_BODY
)
def submit_job(
    request: Request, context: RequestContext, owner: Tenant, raw: JsonBytes, idempotency_key: IdempotencyKey = None
) -> Response:
    """A new job, queued. With an `Idempotency-Key` that was used before: the job of that time (200)."""
    key = read_idempotency_key(request.headers)
    plan = plan_job(context, owner, parse_json(raw).document)
    view, created = commands.submit_job(
        context.db,
        tenant=owner,
        spec=plan.spec.document(),
        name=plan.spec.name,
        labels=plan.spec.labels,
        idempotency=None if key is None else (key, hashlib.sha256(raw).hexdigest()),
        needs=references_in(plan.spec),
    )
    return _answer_submission(context, view, created)


@router.post(
    "/validate",
    summary="Try a job without submitting it",
    responses=responses.VALIDATED,
    openapi_extra=responses.SPEC_BODY,
)
def validate_job(context: RequestContext, owner: Tenant, raw: JsonBytes) -> Response:
    """What the job would be: layers, costs, memory, warnings. 200 exactly when a submit is 201; stores nothing."""
    return Json(plan_answer(plan_job(context, owner, parse_json(raw).document)))


@router.get("", summary="List jobs, newest first", responses=responses.JOBS)
def list_jobs(
    context: RequestContext,
    owner: Tenant,
    state: Annotated[str | None, Query(description="Only jobs in this state.")] = None,
    label: Annotated[str | None, Query(description="Only jobs with this label, as key:value.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """One page; `next_cursor` null is the end. More than 200 are cut to 200."""
    page, following = queries.list_jobs(
        context.db, owner, state=state, label=parse_label(label), limit=min(limit, queries.PAGE_LIMIT), cursor=cursor
    )
    return Json({"items": [job_document(job) for job in page], "next_cursor": following})


@router.get("/{job_id}", summary="One job", responses=responses.JOB)
async def get_job(
    request: Request,
    context: RequestContext,
    owner: Tenant,
    job_id: JobId,
    wait_s: WaitS = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The job. With `wait_s` the answer is held until it changes: from what If-None-Match names, else from now."""
    check_id("job", job_id)
    version, answer = await run_in_threadpool(_read_job, context, owner, job_id)
    seen = answer.headers["etag"]
    until = asyncio.get_running_loop().time() + (wait_s or 0)
    if if_none_match is None or matches_etag(if_none_match, seen):
        # a new event alone makes a new version of the row, but the same answer
        while answer.headers["etag"] == seen and "retry-after" in answer.headers:
            if not await _wait_for_change(request, context, owner, job_id, version, until):
                break
            version, answer = await run_in_threadpool(_read_job, context, owner, job_id)
    if matches_etag(if_none_match, answer.headers["etag"]):
        return Response(status_code=304, headers={"ETag": answer.headers["etag"]})
    return answer


async def _wait_for_change(
    request: Request, context: Context, owner: str, job_id: str, version: str, until: float
) -> bool:
    """Wait until the job's row changes; False when the time is over, the server stops or the client is gone.

    Holds no database session.
    """
    while (left := until - asyncio.get_running_loop().time()) > 0:
        if await wait_for_stop(context.stopping, min(POLL_S, left)) or await request.is_disconnected():
            return False
        if await context.versions.read_version(owner, job_id) != version:
            return True
    return False


@router.post("/{job_id}/cancel", status_code=202, summary="Discard the job", responses=responses.CHANGED)
def cancel_job(context: RequestContext, owner: Tenant, job_id: JobId, if_match: IfMatch = None) -> Response:
    """The job, cancelled or on its way there."""
    return _change_job(context, owner, job_id, if_match, commands.cancel_job)


@router.post("/{job_id}/stop", status_code=202, summary="Deliver the best so far", responses=responses.CHANGED)
def stop_job(context: RequestContext, owner: Tenant, job_id: JobId, if_match: IfMatch = None) -> Response:
    """The job; what has been reached is evaluated and exported, and the job succeeds with `stopped_early`."""
    return _change_job(context, owner, job_id, if_match, commands.stop_job)


@router.post("/{job_id}/pause", status_code=202, summary="Pause the job", responses=responses.CHANGED)
def pause_job(context: RequestContext, owner: Tenant, job_id: JobId, if_match: IfMatch = None) -> Response:
    """The job; a running one writes a checkpoint, and its worker releases it."""
    return _change_job(context, owner, job_id, if_match, commands.pause_job)


@router.post("/{job_id}/resume", status_code=202, summary="Go on with a paused job", responses=responses.CHANGED)
def resume_job(context: RequestContext, owner: Tenant, job_id: JobId, if_match: IfMatch = None) -> Response:
    """The job, waiting for a worker again; it goes on from its checkpoint."""
    return _change_job(context, owner, job_id, if_match, commands.resume_job)


@router.post("/{job_id}/retry", status_code=201, summary="Submit the same job again", responses=responses.SUBMITTED)
def retry_job(
    request: Request, context: RequestContext, owner: Tenant, job_id: JobId, idempotency_key: IdempotencyKey = None
) -> Response:
    """A new job with `retry_of` and the same spec, name and labels. The old one must be over.

    422 if a network that it starts from or learns from was deleted meanwhile.
    """
    key = read_idempotency_key(request.headers)
    check_id("job", job_id)
    idempotency = None if key is None else (key, hashlib.sha256(b"").hexdigest())
    view, created = commands.retry_job(context.db, owner, job_id, idempotency=idempotency)
    return _answer_submission(context, view, created)


@router.delete("/{job_id}", status_code=204, summary="Remove the job", responses=responses.REMOVED)
def delete_job(context: RequestContext, owner: Tenant, job_id: JobId, if_match: IfMatch = None) -> Response:
    """Remove the job with its rows and its files; a running one is cancelled first.

    409 while a job that has not finished starts from its network or learns from it.
    """
    check_id("job", job_id)
    _check_match(context, owner, job_id, if_match)
    commands.delete_job(context.db, owner, job_id)
    return Response(status_code=204)


@router.get("/{job_id}/metrics", summary="Curves", responses=responses.METRICS)
def get_metrics(context: RequestContext, owner: Tenant, job_id: JobId) -> Response:
    """Every series as [step, value] pairs in the order of steps."""
    return Json({"series": read_metrics(context.db, owner, check_id("job", job_id))})


@router.get("/{job_id}/logs", summary="The trainer's log", responses=responses.LOG)
def get_logs(context: RequestContext, owner: Tenant, job_id: JobId) -> Response:
    """The newest 4 MiB, as plain text."""
    return PlainTextResponse(read_log(context.db, owner, check_id("job", job_id)))


@router.get("/{job_id}/report", summary="Dense against pruned", responses=responses.REPORT)
def get_report(context: RequestContext, owner: Tenant, job_id: JobId) -> Response:
    """The report of a job that succeeded; 409 before it is over."""
    return Json(queries.read_report(context.db, owner, check_id("job", job_id)))


@router.get("/{job_id}/checkpoints", summary="Checkpoints", responses=responses.CHECKPOINTS)
def list_checkpoints(context: RequestContext, owner: Tenant, job_id: JobId) -> Response:
    """The kept checkpoints, newest first."""
    kept = artifacts.list_checkpoints(context.db, owner, check_id("job", job_id))
    return Json({"items": [checkpoint_document(checkpoint) for checkpoint in kept]})


def _answer_job(context: Context, view: JobView, status_code: int = 200) -> Json:
    queue = queries.queue_facts(context.db, view) if view.state == "queued" else None
    document = job_document(view, queue)
    answer = Json(document, status_code, {"ETag": etag_of(document), "Cache-Control": "no-cache"})
    if not view.terminal:
        answer.headers["Retry-After"] = str(RETRY_AFTER_S)
    return answer


def _read_job(context: Context, owner: str, job_id: str) -> tuple[str, Json]:
    """The version of the job's row, and the answer that shows it."""
    view = queries.get_job(context.db, owner, job_id)
    return view.version, _answer_job(context, view)


def _answer_submission(context: Context, view: JobView, created: bool) -> Response:
    """The answer for a new job, or for one that its Idempotency-Key has made before."""
    if created:
        context.bell.ring(view.id)
    answer = _answer_job(context, view, 201 if created else 200)
    answer.headers["Location"] = f"/v1/jobs/{view.id}"
    if not created:
        answer.headers["Idempotent-Replayed"] = "true"
    return answer


def _change_job(context: Context, owner: str, job_id: str, if_match: str | None, change: Change) -> Response:
    """Run a command, and ring if the job is queued then; returns the answer with the job."""
    check_id("job", job_id)
    _check_match(context, owner, job_id, if_match)
    view = change(context.db, owner, job_id)
    if view.state == "queued":
        context.bell.ring(view.id)
    return _answer_job(context, view, 202)


def _check_match(context: Context, owner: str, job_id: str, if_match: str | None) -> None:
    if if_match is not None:
        check_match(if_match, _read_job(context, owner, job_id)[1].headers["etag"])
