"""What users upload: data sets and weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.schemas.answer import Answer

_SHA256 = Field(pattern="^[0-9a-f]{64}$")


class DatasetProblemSchema(Answer):
    """What is wrong with one file of an upload."""

    file: str
    message: str


class DatasetSchema(Answer):
    """An uploaded data set."""

    id: str
    name: str
    state: Literal["checking", "ready", "rejected"]
    format: str
    splits: dict[str, int] | None
    classes: list[str]
    shape: list[int] | None
    size_bytes: int
    sha256: str | None
    problems: list[DatasetProblemSchema]


class DatasetsSchema(Answer):
    """Uploaded data sets."""

    items: list[DatasetSchema]


class TensorSchema(Answer):
    """One tensor of uploaded weights."""

    name: str
    shape: list[int]
    dtype: str = Field(description="float32, float16, bfloat16 or float64.")


class WeightsHeadSchema(Answer):
    """Uploaded weights without their tensors."""

    id: str
    name: str
    sha256: str = _SHA256
    size_bytes: int
    created_at: str


class WeightsSchema(WeightsHeadSchema):
    """Uploaded weights."""

    tensors: list[TensorSchema]


class WeightsPageSchema(Answer):
    """A page of uploaded weights."""

    items: list[WeightsHeadSchema]
    next_cursor: str | None
