"""`/v1/jobs/{id}/events`: rows, as JSON or as server-sent events that a client resumes exactly after a reconnect.

Once a stream has begun it cannot become an error answer: every check comes before.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app.api import responses
from app.api.context import POLL_S, Context, RequestContext, Tenant, wait_for_stop
from app.api.downloads import StreamedResponse
from app.api.parameters import After, JobId, LastEventId, Limit, check_id, parse_last_event_id
from app.api.rendering import Json, event_document
from app.errors import JobNotFound, Unavailable
from app.jobs import queries
from app.jobs.events import MOST_EVENTS, EventView, list_events
from app.jobs.queries import JobView

RETRY_MS = 3000
KEEP_ALIVE_S = 15.0
LONGEST_STREAM_S = 15 * 60.0
TERMINAL_TYPES = frozenset({"job.succeeded", "job.failed", "job.cancelled"})

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get("/{job_id}/events", summary="What happened", responses=responses.EVENTS)
def get_events(
    request: Request,
    context: RequestContext,
    owner: Tenant,
    job_id: JobId,
    after: After = 0,
    limit: Limit = 200,
    last_event_id: LastEventId = None,
) -> Response:
    """Events after a number. With `Accept: text/event-stream` a stream, which ends after the job's last event."""
    check_id("job", job_id)
    resumed = parse_last_event_id(last_event_id)
    start = after if resumed is None else resumed
    if "text/event-stream" in request.headers.get("accept", ""):
        return stream_events(context, owner, job_id, start)
    found = list_events(context.db, owner, job_id, after=start, limit=min(limit, MOST_EVENTS))
    return Json({"items": [event_document(event) for event in found], "next_after": found[-1].seq if found else start})


def stream_events(context: Context, owner: str, job_id: str, start: int) -> Response:
    """The stream of a job's events above `start`. Raises JobNotFound, TooManyStreams."""
    job = queries.get_job(context.db, owner, job_id)
    context.streams.check_limit(job.tenant)
    return StreamedResponse(
        _write_counted(context, job, start), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )


async def _write_counted(context: Context, job: JobView, after: int) -> AsyncIterator[bytes]:
    with context.streams.count_stream(job.tenant):
        async for piece in _write_stream(context, job, after):
            yield piece


async def _write_stream(context: Context, job: JobView, after: int) -> AsyncIterator[bytes]:
    """`retry`, then each event once and in order; a comment after 15 s without one. Holds no database session."""
    yield b"retry: %d\n\n" % RETRY_MS
    began = spoke = time.monotonic()
    version, over = "", job.terminal
    while True:
        try:
            newest = version if over else await context.versions.read_version(job.tenant, job.id)
            events: list[EventView] = []
            if over or newest != version:
                events = await run_in_threadpool(list_events, context.db, job.tenant, job.id, after, MOST_EVENTS)
                if not events:  # a client that asks for events after the last must not wait for a job that is over
                    over = over or (await run_in_threadpool(queries.get_job, context.db, job.tenant, job.id)).terminal
                version = newest
        except JobNotFound:
            return
        except Unavailable:
            events = []  # the database is away: the stream stays open, and the client gets these events later
        for event in events:
            yield _write_event(event)
            after, spoke = event.seq, time.monotonic()
            over = over or event.type in TERMINAL_TYPES
        if (over and len(events) < MOST_EVENTS) or time.monotonic() - began > LONGEST_STREAM_S:
            return
        if time.monotonic() - spoke >= KEEP_ALIVE_S:
            spoke = time.monotonic()
            yield b": keep-alive\n\n"
        if len(events) < MOST_EVENTS and await wait_for_stop(context.stopping, POLL_S):
            return


def _write_event(event: EventView) -> bytes:
    """One event as its bytes in the stream. The JSON is ASCII with escapes: no line of it can end early."""
    data = json.dumps(event_document(event), separators=(",", ":"), allow_nan=False)
    return f"id: {event.seq}\nevent: {event.type}\ndata: {data}\n\n".encode()
