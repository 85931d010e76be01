"""`/v1/weights`: safetensors files that jobs start from, checked while their sender waits; listed, read and removed."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app import weights
from app.api import responses
from app.api.context import RequestContext, Tenant
from app.api.parameters import Cursor, Limit, WeightsId, check_id, is_id
from app.api.rendering import Json
from app.api.uploads import receive_upload
from app.errors import InvalidCursor
from app.validation.strict import Text

router = APIRouter(prefix="/v1/weights", tags=["weights"])

Name = Annotated[Text, Query(description="What to call them; they are used by their id.")]


@router.post(
    "",
    status_code=201,
    summary="Upload weights",
    responses=responses.WEIGHTS_UPLOADED,
    openapi_extra=responses.UPLOAD_BODY,
)
async def upload_weights(request: Request, context: RequestContext, owner: Tenant, name: Name = "weights") -> Response:
    """The weights, whose safetensors file is the body: float32, float16, bfloat16 or float64, every value finite.

    A job starts from them with `"model": {..., "weights": "<id>"}`, tensors by layer name.
    """
    async with receive_upload(request, context) as received:
        view = await run_in_threadpool(
            weights.register_weights,
            context.db,
            context.storage,
            owner,
            received.path,
            name=name,
            size_bytes=received.size_bytes,
            sha256=received.sha256,
        )
    return Json(view.document(), 201, {"Location": f"/v1/weights/{view.id}"})


@router.get("", summary="List weights, newest first", responses=responses.WEIGHTS_PAGE)
def list_weights(context: RequestContext, owner: Tenant, limit: Limit = 50, cursor: Cursor = None) -> Response:
    """One page, without tensors; `next_cursor` null is the end. More than 200 are cut to 200."""
    if cursor is not None and not is_id("wt", cursor):
        raise InvalidCursor()
    page, following = weights.list_weights(context.db, owner, limit=min(limit, weights.PAGE_LIMIT), before=cursor)
    return Json({"items": [view.document() for view in page], "next_cursor": following})


@router.get("/{weights_id}", summary="One upload of weights", responses=responses.WEIGHTS)
def get_weights(context: RequestContext, owner: Tenant, weights_id: WeightsId) -> Response:
    """The weights with name, shape and dtype of each tensor."""
    return Json(weights.get_weights(context.db, owner, check_id("wt", weights_id)).document())


@router.delete("/{weights_id}", status_code=204, summary="Remove weights", responses=responses.REMOVED)
def delete_weights(context: RequestContext, owner: Tenant, weights_id: WeightsId) -> Response:
    """Remove the weights; 409 while a job that has not finished needs them."""
    weights.delete_weights(context.db, owner, check_id("wt", weights_id))
    return Response(status_code=204)
