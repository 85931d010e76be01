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

_TITLES = {
    "batch_norm": "Insert batch normalization",
    "dropout": "Insert dropout",
    "spatial_dropout": "Insert spatial dropout",
    "small_kernels": "Smaller kernels",
    "deeper": "More depth",
    "residual": "Residual connections",
    "regularization": "Regularization",
    "prune": "Prune weights or channels",
    "distill": "Learn from another network",
    "low_rank": "Low-rank layers",
    "separable": "Separable convolutions",
    "quantize": "8-bit integers",
}
_EXAMPLES: dict[str, dict[str, Any]] = {
    "distill": {"type": "distill", "teacher": "job_01JABCDEFGHJKMNPQRSTVWXYZ0", "alpha": 0.7, "temperature": 4.0},
    "low_rank": {"type": "low_rank", "budget": {"macs": 0.5}},
    "separable": {"type": "separable"},
    "quantize": {"type": "quantize", "scheme": "int8_static", "max_accuracy_drop": 0.01},
    "batch_norm": {"type": "batch_norm"},
    "dropout": {"type": "dropout", "p": 0.3},
    "spatial_dropout": {"type": "spatial_dropout", "p": 0.1},
    "small_kernels": {"type": "small_kernels"},
    "deeper": {"type": "deeper", "times": 2},
    "residual": {"type": "residual"},
    "regularization": {"type": "regularization", "l1": 1e-5, "l2": 1e-4},
    "prune": {
        "type": "prune",
        "structure": "channels",
        "criterion": "l2",
        "budget": {"macs": 0.5},
        "schedule": {"name": "one_shot"},
        "retrain": {"epochs": 3, "policy": "lr_rewind"},
    },
}
_MORE_EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "low_rank": [{"type": "low_rank", "rank": 16}, {"type": "low_rank", "energy": 0.7, "exclude": ["conv1"]}],
    "quantize": [{"type": "quantize", "scheme": "int8_vnni"}],
    "regularization": [{"type": "regularization", "group_lasso": 1e-4}, {"type": "regularization", "bn_l1": 1e-4}],
    "prune": [
        {"type": "prune", "budget": {"latency_ms": 0.6}, "criterion": "taylor"},
        {
            "type": "prune",
            "budget": {"params": 0.4},
            "schedule": {"name": "iterative", "steps": 3},
            "overrides": {"conv1": {"max_sparsity": 0.5}},
            "retrain": {"epochs": 2, "distillation": {"alpha": 0.7, "temperature": 4.0}},
        },
        {"type": "prune", "sparsity": 0.9, "criterion": "lamp", "schedule": {"name": "cubic"}},
        {"type": "prune", "sparsity": 0.9, "criterion": "erk", "overrides": {"conv1": {"sparsity": 0.5}}},
        {"type": "prune", "structure": "n:m", "pattern": "2:4"},
        {"type": "prune", "structure": "blocks", "block": [4, 4], "sparsity": 0.5},
    ],
}


def optimization_catalogue() -> list[dict[str, Any]]:
    """One `{type, title, description, schema, example, examples}` for each optimization, in the order they apply in.

    `examples` has `example` and, where one is not enough, further ones.
    """
    return deepcopy(_optimizations())


def preset_catalogue() -> list[dict[str, Any]]:
    """One entry for each preset: what it takes, its source, and its cost for the data it is known for."""
    return deepcopy(_presets())


@cache
def _optimizations() -> list[dict[str, Any]]:
    entries = []
    for part in OPTIMIZATIONS:
        kind = part.model_fields["type"].default
        schema = part.model_json_schema()
        description = schema.pop("description")
        entry = {"type": kind, "title": _TITLES[kind], "description": description, "schema": schema}
        example = _EXAMPLES[kind]
        entries.append({**entry, "example": example, "examples": [example, *_MORE_EXAMPLES.get(kind, [])]})
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
