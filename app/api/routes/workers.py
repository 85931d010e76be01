"""`/v1/workers`: who is alive and what it runs."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from app.api import responses
from app.api.rendering import Json, worker_document
from app.api.routes.jobs import RequestContext
from app.jobs.workers import list_workers

router = APIRouter(prefix="/v1/workers", tags=["operation"])


@router.get("", summary="Workers", responses=responses.WORKERS)
def get_workers(context: RequestContext) -> Response:
    """Every worker that did not say good-bye, oldest first; `alive` if it was heard of in the last 30 s."""
    return Json({"items": [worker_document(worker) for worker in list_workers(context.db)]})
