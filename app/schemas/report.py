"""The report of a finished job."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.schemas.answer import Answer, LayerSchema, MeasuresSchema
from app.spec.quantize import Scheme


class StepSchema(Answer):
    """One optimization of a finished job."""

    optimization: dict[str, Any]
    applied: bool
    before: MeasuresSchema
    after: MeasuresSchema
    layers: list[dict[str, Any]]
    seconds: float


class ClassRowSchema(Answer):
    """What became of one class; null: the test part has no example."""

    name: str
    baseline_accuracy: float | None
    final_accuracy: float | None
    change: float | None
    examples: int


class ProofSchema(Answer):
    """What a delivered file gave in a clean process; of the 8-bit file also the bound of its arithmetic."""

    max_abs_difference: float
    accuracy: float
    scheme: Scheme | None = Field(None, description="Of the 8-bit file.")
    largest_pair_sum: int | None = Field(
        None, description="The largest sum of two products of uint8 activations and the file's weights."
    )
    saturates_above: int | None = Field(None, description="What processors without VNNI cut such sums off at.")
    right_on: str | None = Field(None, description="The processors on which the file computes what was proven.")


class Int8Schema(MeasuresSchema):
    """The 8-bit file, delivered or not."""

    met: bool = Field(description="Whether it keeps to max_accuracy_drop, and so is delivered.")
    max_accuracy_drop: float
    accuracy_drop: float
    left_in_float32: list[LayerSchema]
    scheme: Scheme | None = None
    right_on: str | None = Field(None, description="The processors on which the file computes what was measured.")


class CutSchema(Answer):
    """A group of channels cut to one width: the accuracy right after it, and with batch norm recalibrated."""

    kept: float
    channels: int
    macs: int
    params: int
    after_cut: float
    after_recalibration: float


class GroupRowSchema(Answer):
    """A group of channels: the layers that lose them together, and a cut for each part that was asked for."""

    layers: list[str]
    channels: int
    points: list[CutSchema]


class SensitivityTableSchema(Answer):
    """What each group of channels costs when it alone is cut; nothing is trained again."""

    criterion: str
    measured_on: Literal["validation", "training", "test"] = Field(
        "test",
        description="The part of the data that was evaluated: validation, or training where that is empty. Tables of "
        "earlier versions were measured on test images.",
    )
    examples: int = Field(description="Images that were evaluated.")
    accuracy: float = Field(description="Of the whole network, on these images.")
    groups: list[GroupRowSchema]
    whole: list[LayerSchema]


class SparseFileSchema(Answer):
    """The size of the file without zeros beside that of the same weights with them."""

    name: str
    size_bytes: int
    dense_bytes: int


class ReportSchema(Answer):
    """Dense against compressed, step by step and class by class."""

    job_id: str
    baseline: MeasuresSchema
    final: MeasuresSchema
    steps: list[StepSchema]
    classes: list[ClassRowSchema]
    verification: dict[str, ProofSchema]
    environment: dict[str, Any]
    notes: list[str]
    int8: Int8Schema | None = Field(
        None, description="Where an 8-bit file was asked for, and the worker's processor computes its scheme."
    )
    sensitivity: SensitivityTableSchema | None = Field(None, description="Of a job of kind sensitivity.")
    sparse: SparseFileSchema | None = Field(None, description="Where weights were set to zero.")


class ReportFileSchema(ReportSchema):
    """report.json: what the API promises of a report, and what it holds besides."""

    attempt: int
    stopped_early: bool
    latency: dict[str, Any] = Field(description="How latencies were measured.")
    compressed_bytes: dict[str, int] = Field(description="Size of each file after gzip.")
    data: dict[str, Any]
    seconds: float = Field(description="Of all attempts.")
