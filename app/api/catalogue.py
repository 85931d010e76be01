"""`/v1/presets` and `/v1/optimizations`: what the job language offers, each with its JSON schema and an example."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import APIRouter
from pydantic import TypeAdapter
from starlette.responses import Response

from app.api import answers
from app.api.documents import Document, Json
from app.spec.cost import cost
from app.spec.graph import build_graph
from app.spec.job import PresetModel
from app.spec.layers import AnyLayer
from app.spec.optimizations import OPTIMIZATIONS
from app.spec.presets import PRESETS, Preset, preset_layers

router = APIRouter(prefix="/v1", tags=["the job language"])

EXAMPLES: dict[str, Document] = {
    "prune": {"type": "prune", "structure": "channels", "budget": {"macs": 0.5}, "retrain": {"epochs": 3}},
    "regularization": {"type": "regularization", "l1": 1e-5, "l2": 1e-4},
    "batch_norm": {"type": "batch_norm"},
    "dropout": {"type": "dropout", "p": 0.3},
    "spatial_dropout": {"type": "spatial_dropout", "p": 0.1},
    "small_kernels": {"type": "small_kernels"},
    "deeper": {"type": "deeper", "times": 1},
    "residual": {"type": "residual"},
}


@router.get("/presets", summary="Networks by name", responses=answers.PRESETS)
def get_presets() -> Response:
    """Every preset, with its cost on the data it is known for."""
    return Json({"items": [_preset(preset.name) for preset in PRESETS.values()]})


@router.get("/optimizations", summary="Optimizations", responses=answers.OPTIMIZATIONS)
def get_optimizations() -> Response:
    """Every optimization, with the fields it takes."""
    return Json({"items": _optimizations()})


@cache
def _preset(name: str) -> Document:
    preset: Preset = PRESETS[name]
    layers = TypeAdapter(list[AnyLayer]).validate_python(preset_layers(name, preset.usual_shape, preset.usual_classes))
    spent = cost(build_graph(layers, preset.usual_shape, classes=preset.usual_classes))
    return {
        "name": name,
        "description": preset.description,
        "source": preset.source,
        "spatial_axes": list(preset.axes),
        "input_shape": list(preset.usual_shape),
        "classes": preset.usual_classes,
        "cost": {
            "params": spent.params,
            "nonzero_params": spent.nonzero_params,
            "macs": spent.macs,
            "bytes": spent.bytes,
        },
        "json_schema": PresetModel.model_json_schema(),
        "example": {"preset": name, "input_shape": list(preset.usual_shape), "width": 1.0},
    }


@cache
def _optimizations() -> list[dict[str, Any]]:
    return [
        {
            "type": (name := kind.model_fields["type"].default),
            "description": " ".join((kind.__doc__ or "").split()),
            "json_schema": kind.model_json_schema(),
            "example": EXAMPLES[name],
        }
        for kind in OPTIMIZATIONS
    ]
