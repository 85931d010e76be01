"""What a dry run answers: the job as it would be."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.schemas.answer import Answer, CostSchema
from app.schemas.problem import FaultSchema


class LayerRowSchema(Answer):
    """One layer of a network."""

    name: str
    type: str
    output_shape: list[int]
    params: int
    macs: int


class PlanRowSchema(Answer):
    """What one optimization does to one layer; numbers are widths, of `mask` weights that are not zero."""

    layer: str
    action: Literal["narrow", "follow", "keep", "mask", "insert", "replace"]
    before: int | None
    after: int | None
    exact: bool = Field(description="false: an estimate, the trained weights decide.")
    reason: str
    optimization: str | None = Field(description="Pointer of the optimization.")


class PhaseSchema(Answer):
    """One stretch of the job."""

    phase: str
    epochs: int | None = None
    optimization: str | None = None


class PlanSchema(Answer):
    """What a job would be."""

    valid: Literal[True]
    plan_version: int
    layers: list[LayerRowSchema]
    given: CostSchema
    baseline: CostSchema = Field(description="After the rewrites: what is trained.")
    planned: CostSchema = Field(description="After the compressions.")
    floor: CostSchema | None = Field(description="The least that the last removal of channels could leave.")
    memory: dict[str, Any]
    estimate: dict[str, Any]
    plan: list[PlanRowSchema]
    phases: list[PhaseSchema]
    warnings: list[FaultSchema]
    spec: dict[str, Any] = Field(description="The job with every default filled in.")
