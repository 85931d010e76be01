"""`/` and `/jobs/{id}`: the web pages, made from the API's documents. Their own addresses serve all they need.

With a key set, browsers ask for it once (HTTP Basic, the key as password) and send it to these addresses, not to /v1.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from app.api.context import Context, RequestContext, Tenant
from app.api.parameters import After, Cursor, JobId, LastEventId, check_id, parse_last_event_id
from app.api.rendering import artifact_document, event_document, job_document
from app.api.routes.artifacts import ArtifactName, send_artifact
from app.api.routes.events import stream_events
from app.errors import NotFound
from app.jobs import queries
from app.jobs.artifacts import list_artifacts
from app.jobs.events import MOST_EVENTS, EventView, list_events, read_log
from app.web import pages

ROWS = 50
NEWEST_EVENTS = 200

router = APIRouter(include_in_schema=False)


@router.get("/")
def show_jobs(
    context: RequestContext, owner: Tenant, state: Annotated[str | None, Query()] = None, cursor: Cursor = None
) -> Response:
    """The newest jobs."""
    page, following = queries.list_jobs(context.db, owner, state=state, limit=ROWS, cursor=cursor)
    return _html(pages.jobs_page([job_document(job) for job in page], following, state))


@router.get("/jobs/{job_id}")
def show_job(context: RequestContext, owner: Tenant, job_id: JobId) -> Response:
    """One job."""
    view = queries.get_job(context.db, owner, check_id("job", job_id))
    queue = queries.queue_facts(context.db, view) if view.state == "queued" else None
    delivered = view.state == "succeeded"
    report = queries.read_report(context.db, owner, job_id) if delivered else None
    files = list_artifacts(context.db, owner, job_id) if delivered else []
    events = _newest_events(context, owner, job_id)
    return _html(
        pages.job_page(
            job_document(view, queue),
            report,
            [artifact_document(job_id, file) for file in files],
            [event_document(event) for event in events],
        )
    )


@router.get("/jobs/{job_id}/events")
def follow_events(
    context: RequestContext,
    owner: Tenant,
    job_id: JobId,
    after: After = 0,
    last_event_id: LastEventId = None,
) -> Response:
    """The stream of a job's events, for its page."""
    resumed = parse_last_event_id(last_event_id)
    return stream_events(context, owner, check_id("job", job_id), after if resumed is None else resumed)


@router.get("/jobs/{job_id}/artifacts/{name}")
def download_artifact(
    request: Request, context: RequestContext, owner: Tenant, job_id: JobId, name: ArtifactName
) -> Response:
    """A delivered file, for the job's page."""
    return send_artifact(request, context, owner, job_id, name)


@router.get("/jobs/{job_id}/logs")
def show_log(context: RequestContext, owner: Tenant, job_id: JobId) -> Response:
    """The trainer's log, for the job's page."""
    return PlainTextResponse(read_log(context.db, owner, check_id("job", job_id)))


@router.get("/assets/{name}")
def asset(name: str) -> Response:
    """A script or style of the pages; the names are a fixed list."""
    media_type = pages.ASSETS.get(name)
    if media_type is None:
        raise NotFound()
    content = (pages.ASSET_FOLDER / name).read_bytes()
    return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})


def _newest_events(context: Context, owner: str, job_id: str) -> list[EventView]:
    newest: list[EventView] = []
    while found := list_events(context.db, owner, job_id, after=newest[-1].seq if newest else 0, limit=MOST_EVENTS):
        newest = (newest + found)[-NEWEST_EVENTS:]
    return newest


def _html(html: str) -> Response:
    return HTMLResponse(html, headers={"Content-Security-Policy": pages.POLICY})
