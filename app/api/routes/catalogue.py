"""`/v1/presets` and `/v1/optimizations`: what the job language offers, each with its JSON schema and an example."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from app.api import responses
from app.api.rendering import Json
from app.spec.catalogue import optimization_catalogue, preset_catalogue
from app.spec.model import PresetModel

router = APIRouter(prefix="/v1", tags=["the job language"])


@router.get("/presets", summary="Networks by name", responses=responses.PRESETS)
def get_presets() -> Response:
    """Every preset, with its cost on the data it is known for."""
    schema = _preset_schema()
    return Json({"items": [entry | {"schema": schema} for entry in preset_catalogue()]})


@router.get("/optimizations", summary="Optimizations", responses=responses.OPTIMIZATIONS)
def get_optimizations() -> Response:
    """Every optimization, with the fields it takes, in the order in which they apply."""
    return Json({"items": optimization_catalogue()})


@cache
def _preset_schema() -> dict[str, Any]:
    return PresetModel.model_json_schema()
