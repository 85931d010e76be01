"""The root of every answer, and what several of them hold."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """The root of all answers. Clients ignore fields they do not know: more may come.

    A class `JobSchema` is `Job` in the OpenAPI document, and so in the clients that are generated from it.
    """

    model_config = ConfigDict(extra="allow")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        cls.__name__ = cls.__qualname__ = cls.__name__.removesuffix("Schema")
        super().__init_subclass__(**kwargs)


class CostSchema(Answer):
    """What a network costs; `bytes` is the size of its safetensors file."""

    params: int
    nonzero_params: int
    macs: int
    bytes: int


class MeasuresSchema(Answer):
    """`M`: what a network can do and costs, on the test part and on this worker; null: not measured."""

    accuracy: float | None
    loss: float | None
    params: int
    nonzero_params: int
    macs: int
    bytes: int
    latency_ms: dict[str, dict[str, dict[str, float]]] | None = Field(
        description="Runtime to batch size to p50 and p95."
    )


class LayerSchema(Answer):
    """A layer, and why it is as it is."""

    name: str
    reason: str
