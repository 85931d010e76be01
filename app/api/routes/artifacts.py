"""`/v1/jobs/{id}/artifacts`: what a job delivers, with its bytes."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from app.api import responses
from app.api.context import Context, RequestContext, Tenant
from app.api.downloads import StoredFile, answer_download
from app.api.parameters import JobId, check_id
from app.api.rendering import Json, artifact_document
from app.errors import NotFound
from app.jobs.artifacts import get_artifact, list_artifacts

ArtifactName = Annotated[str, Path(description="The file's name, as listed.")]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get("/{job_id}/artifacts", summary="Delivered files", responses=responses.ARTIFACTS)
def list_job_artifacts(context: RequestContext, owner: Tenant, job_id: JobId) -> Response:
    """The files of a job that succeeded; none before."""
    found = list_artifacts(context.db, owner, check_id("job", job_id))
    return Json({"items": [artifact_document(job_id, artifact) for artifact in found]})


@router.get("/{job_id}/artifacts/{name}", summary="One delivered file", responses=responses.FILE)
def get_job_artifact(
    request: Request, context: RequestContext, owner: Tenant, job_id: JobId, name: ArtifactName
) -> Response:
    """The bytes, whole or a `Range` of them; the ETag is their sha256."""
    return send_artifact(request, context, owner, job_id, name)


def send_artifact(request: Request, context: Context, owner: str, job_id: str, name: str) -> Response:
    """The answer with an artifact's bytes. Names are looked up among rows; no path is made from an address."""
    check_id("job", job_id)
    if not _NAME.fullmatch(name):
        raise NotFound("the job has no artifact with this name")
    artifact = get_artifact(context.db, owner, job_id, name)
    file = StoredFile(
        name=artifact.name,
        media_type=artifact.media_type,
        size_bytes=artifact.size_bytes,
        sha256=artifact.sha256,
        read=lambda start, end: context.storage.stream(artifact.key, start, end),
    )
    return answer_download(request, file)
