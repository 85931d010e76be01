"""`/v1/workers`: which workers are alive and what they run."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from app.api import responses
from app.api.context import RequestContext
from app.api.rendering import Json, worker_document
from app.jobs.workers import list_workers

router = APIRouter(prefix="/v1/workers", tags=["operation"])


@router.get("", summary="Workers", responses=responses.WORKERS)
def get_workers(context: RequestContext) -> Response:
    """Every registered worker, oldest first; `alive` if it reported in the last 30 s."""
    return Json({"items": [worker_document(worker) for worker in list_workers(context.db)]})
