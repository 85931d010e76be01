"""What the service offers, for people and forms: optimizations with JSON schema and example, presets with cost."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

from app.network.cost import cost
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.network.presets.registry import PRESETS, preset_layers
from app.spec.optimizations import OPTIMIZATIONS


def optimization_catalogue() -> list[dict[str, Any]]:
    """One `{type, title, description, schema, example, examples}` for each optimization, in the order they apply in.

    `examples` has `example` and, where one is not enough, further ones.
    """
    return deepcopy(_optimizations())


def preset_catalogue() -> list[dict[str, Any]]:
    """One entry for each preset: its inputs, its source, and its cost for the data it is known for."""
    return deepcopy(_presets())


@cache
def _optimizations() -> list[dict[str, Any]]:
    entries = []
    for part in OPTIMIZATIONS:
        schema = part.model_json_schema()
        entries.append(
            {
                "type": part.kind(),
                "title": part.title,
                "description": schema.pop("description"),
                "schema": schema,
                "example": part.examples[0],
                "examples": [*part.examples],
            }
        )
    return entries


@cache
def _presets() -> list[dict[str, Any]]:
    entries = []
    for preset in PRESETS.values():
        layers = read_layers(preset_layers(preset.name, preset.usual_shape, preset.usual_classes))
        graph = build_graph(layers, preset.usual_shape, classes=preset.usual_classes)
        entries.append(
            {
                "name": preset.name,
                "description": preset.description,
                "source": preset.source,
                "spatial_axes": list(preset.axes),
                "smallest_size": preset.smallest,
                "input_shape": list(preset.usual_shape),
                "classes": preset.usual_classes,
                "layers": len(graph.nodes),
                "cost": cost(graph).document(),
                "example": {"preset": preset.name, "input_shape": list(preset.usual_shape), "width": 1.0},
            }
        )
    return entries
