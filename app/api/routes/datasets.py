"""`/v1/datasets`: uploads arrive as a stream, are checked in a child process, and are listed, read and removed."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Annotated, Literal

import structlog
from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app.api import responses
from app.api.context import Context, RequestContext, Tenant, wait_for_stop
from app.api.parameters import Cursor, DatasetId, Limit, check_id, is_id
from app.api.rendering import Json
from app.api.uploads import receive_upload, staging_folder, sweep_staging
from app.datasets import registry
from app.datasets.registry import DatasetView
from app.errors import InvalidCursor, Unavailable
from app.validation.strict import Text

log = structlog.get_logger("espalier.api")

RECHECK_S = 300.0
CHECK_S = 10.0  # how long an upload's answer waits for its check

router = APIRouter(prefix="/v1/datasets", tags=["data sets"])

Name = Annotated[Text, Query(description="What to call it; it is used by its id.")]
Format = Annotated[
    Literal["auto", "image_folder", "npz", "cifar", "idx"],
    Query(alias="format", description="auto: told from the names of the files."),
]


@router.post(
    "", status_code=201, summary="Upload a data set", responses=responses.UPLOADED, openapi_extra=responses.UPLOAD_BODY
)
async def upload_dataset(
    request: Request, context: RequestContext, owner: Tenant, name: Name = "upload", kind: Format = "auto"
) -> Response:
    """The data set, whose file is the body: `ready`, `rejected`, or `checking` if that takes longer than 10 s."""
    async with receive_upload(request, context) as received:
        view = await run_in_threadpool(
            registry.register_upload,
            context.db,
            context.storage,
            owner,
            received.path,
            name=name,
            kind=kind,
            size_bytes=received.size_bytes,
            sha256=received.sha256,
        )
    await _wait_for_check(asyncio.wrap_future(start_check(context, view.id)), context.stopping)
    view = await run_in_threadpool(registry.get_dataset, context.db, owner, view.id)
    return Json(view.document(), 201, {"Location": f"/v1/datasets/{view.id}"})


@router.get("", summary="List data sets, newest first", responses=responses.DATASETS)
def list_datasets(context: RequestContext, owner: Tenant, limit: Limit = 50, cursor: Cursor = None) -> Response:
    """One page; `next_cursor` null is the end. More than 200 are cut to 200."""
    if cursor is not None and not is_id("ds", cursor):
        raise InvalidCursor()
    page, following = registry.list_datasets(context.db, owner, limit=min(limit, registry.PAGE_LIMIT), before=cursor)
    return Json({"items": [view.document() for view in page], "next_cursor": following})


@router.get("/{dataset_id}", summary="One data set", responses=responses.DATASET)
def get_dataset(context: RequestContext, owner: Tenant, dataset_id: DatasetId) -> Response:
    """The data set; while it is `checking`, ask again."""
    view = registry.get_dataset(context.db, owner, check_id("ds", dataset_id))
    return Json(view.document(), headers=_retry_header(view))


@router.delete("/{dataset_id}", status_code=204, summary="Remove a data set", responses=responses.REMOVED)
def delete_dataset(context: RequestContext, owner: Tenant, dataset_id: DatasetId) -> Response:
    """Remove the data set; 409 while a job that has not finished uses it."""
    registry.delete_dataset(context.db, owner, check_id("ds", dataset_id))
    return Response(status_code=204)


def start_check(context: Context, dataset_id: str) -> Future[None]:
    """Start the check of an upload in a thread, which waits for its child process."""
    context.checking.add(dataset_id)
    check = context.checks.submit(
        registry.check_upload, context.db, context.storage, context.settings, dataset_id, stopping=context.closing
    )
    check.add_done_callback(lambda _: context.checking.discard(dataset_id))
    return check


async def check_until_stop(context: Context) -> None:
    """Check, until the server stops, uploads whose check was interrupted by a stop, a crash or an absent backend."""
    while True:
        await run_in_threadpool(_start_pending_checks, context)
        if await wait_for_stop(context.stopping, RECHECK_S):
            return


def _start_pending_checks(context: Context) -> None:
    sweep_staging(staging_folder(context))
    try:
        pending = registry.list_pending(context.db)
    except Unavailable as error:
        log.warning("uploads that wait for their check not read", reason=error.message)
        return
    for dataset_id in pending:
        if dataset_id not in context.checking:
            start_check(context, dataset_id).add_done_callback(_log_failure)


def _log_failure(check: Future[None]) -> None:
    """Log an error that no request answers with."""
    error = None if check.cancelled() else check.exception()
    if error is not None:
        log.error("check of an upload failed", error=repr(error))


def _retry_header(view: DatasetView) -> dict[str, str]:
    return {"Retry-After": "2"} if view.state == "checking" else {}


async def _wait_for_check(check: asyncio.Future[None], stopping: asyncio.Event) -> None:
    """Wait until the check ends, 10 s are over, or the server stops; in the latter cases the check goes on."""
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait((check, stop), timeout=CHECK_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
    if check.done():
        check.result()
