"""`/v1/jobs/{id}/events`: rows, as JSON or as server-sent events that a reconnecting client resumes exactly.

Once a stream has begun there is no error answer any more: every check comes before.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app.api import responses
from app.api.context import LOOK_S, Context, pause
from app.api.downloads import StreamedResponse
from app.api.parameters import After, JobId, LastEventId, Limit, check_id, parse_last_event_id
from app.api.rendering import Json, event_document
from app.api.routes.jobs import RequestContext, Tenant
from app.errors import JobNotFound, TooManyStreams, Unavailable
from app.jobs import queries
from app.jobs.events import MOST_EVENTS, EventView, list_events
from app.jobs.queries import JobView

RETRY_MS = 3000
KEEP_ALIVE_S = 15.0
LONGEST_STREAM_S = 15 * 60.0
STREAMS_PER_TENANT = 20
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
        return stream_events(request, context, owner, job_id, start)
    found = list_events(context.db, owner, job_id, after=start, limit=min(limit, MOST_EVENTS))
    return Json({"items": [event_document(event) for event in found], "next_after": found[-1].seq if found else start})


def stream_events(request: Request, context: Context, owner: str, job_id: str, start: int) -> Response:
    """The stream of a job's events above `start`. Raises JobNotFound, TooManyStreams."""
    view = queries.get_job(context.db, owner, job_id)
    streams: Streams = request.app.state.streams
    return StreamedResponse(
        streams.follow(context, view, start),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )


class Streams:
    """The open streams of one application, counted by tenant."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def follow(self, context: Context, job: JobView, after: int) -> AsyncIterator[bytes]:
        """The stream of a job's events above `after`. Raises TooManyStreams."""
        if self._open[job.tenant] >= STREAMS_PER_TENANT:
            raise TooManyStreams(
                f"{STREAMS_PER_TENANT} event streams are open, the most there may be: close one, or poll"
            )
        return self._counted(context, job, after)

    async def _counted(self, context: Context, job: JobView, after: int) -> AsyncIterator[bytes]:
        self._open[job.tenant] += 1
        try:
            async for piece in _stream(context, job, after):
                yield piece
        finally:
            self._open[job.tenant] -= 1


async def _stream(context: Context, job: JobView, after: int) -> AsyncIterator[bytes]:
    """`retry`, then each event once and in order; a comment after 15 s of silence. Holds no database session."""
    yield b"retry: %d\n\n" % RETRY_MS
    began = spoke = time.monotonic()
    version, over = "", job.terminal
    while True:
        try:
            newest = version if over else await context.watch.version(job.tenant, job.id)
            events: list[EventView] = []
            if over or newest != version:
                events = await run_in_threadpool(list_events, context.db, job.tenant, job.id, after, MOST_EVENTS)
                if not events:  # a client that asks behind the end must not wait for a job that is over
                    over = over or (await run_in_threadpool(queries.get_job, context.db, job.tenant, job.id)).terminal
                version = newest
        except JobNotFound:
            return
        except Unavailable:
            events = []  # the database is away: the client keeps its stream and gets what it missed
        for event in events:
            yield _written(event)
            after, spoke = event.seq, time.monotonic()
            over = over or event.type in TERMINAL_TYPES
        if (over and len(events) < MOST_EVENTS) or time.monotonic() - began > LONGEST_STREAM_S:
            return
        if time.monotonic() - spoke >= KEEP_ALIVE_S:
            spoke = time.monotonic()
            yield b": keep-alive\n\n"
        if len(events) < MOST_EVENTS and await pause(context.stopping, LOOK_S):
            return


def _written(event: EventView) -> bytes:
    """One event on the wire. JSON with escapes only: no line of it can end early."""
    data = json.dumps(event_document(event), separators=(",", ":"), allow_nan=False)
    return f"id: {event.seq}\nevent: {event.type}\ndata: {data}\n\n".encode()
