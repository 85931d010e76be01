"""`/healthz` and `/readyz`: whether the process is alive, and whether it can do its work."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import text
from starlette.responses import Response

from app.api import responses
from app.api.context import RequestContext
from app.api.rendering import Json
from app.errors import Unavailable

router = APIRouter(tags=["operation"])


@router.get("/healthz", summary="Alive", responses=responses.HEALTH)
async def healthz() -> Response:
    """200 while the process answers; it asks nobody else."""
    return Json({"status": "ok"})


@router.get("/readyz", summary="Ready for work", responses=responses.HEALTH)
def readyz(context: RequestContext) -> Response:
    """200 while database and object store answer and the server is not stopping; else 503."""
    if context.stopping.is_set():
        raise Unavailable("the service is stopping")
    with context.db.read() as session:
        session.execute(text("SELECT 1"))
    context.storage.check()
    return Json({"status": "ready"})
