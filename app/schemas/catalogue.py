"""What a job can ask for by name."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from app.schemas.answer import Answer, CostSchema


class PresetSchema(Answer):
    """A network by name."""

    name: str
    description: str
    source: str
    input_shape: list[int]
    classes: int
    cost: CostSchema
    schema_: dict[str, Any] = Field(alias="schema")
    example: dict[str, Any]


class PresetsSchema(Answer):
    """Networks by name."""

    items: list[PresetSchema]


class OptimizationSchema(Answer):
    """An optimization a job may ask for."""

    type: str
    title: str
    description: str
    schema_: dict[str, Any] = Field(alias="schema")
    example: dict[str, Any]
    examples: list[dict[str, Any]]


class OptimizationsSchema(Answer):
    """Optimizations."""

    items: list[OptimizationSchema]
