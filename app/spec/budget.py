"""How much of one cost a compression may leave."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from app.network.cost import CostMeasure
from app.validation.strict import Strict, fault

BudgetMeasure = CostMeasure | Literal["latency_ms"]
BUDGET_MEASURES: tuple[BudgetMeasure, ...] = (*get_args(CostMeasure), "latency_ms")
Amount = Annotated[int, Field(gt=0, le=2**53)] | Annotated[float, Field(gt=0, le=2**53)]


class Budget(Strict):
    """How much of one cost may be left: a fraction kept (0 < f <= 1, of the baseline) or an integer above 1."""

    macs: Annotated[Amount | None, Field(description="Multiply-accumulates of one input.")] = None
    params: Annotated[Amount | None, Field(description="Trainable elements.")] = None
    bytes: Annotated[Amount | None, Field(description="Size of pruned.safetensors.")] = None
    latency_ms: Annotated[
        float | None,
        Field(
            gt=0,
            le=1e6,
            description="Median time of one image in ONNX Runtime, one thread, on the worker; up to 1: fraction kept.",
        ),
    ] = None
    absolute: Annotated[bool, Field(description="latency_ms is in milliseconds even where it is 1 or less.")] = False

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        given = [(name, value) for name in BUDGET_MEASURES if (value := getattr(self, name)) is not None]
        if len(given) != 1:
            raise fault("state exactly one of: macs, params, bytes, latency_ms")
        name, value = given[0]
        if self.absolute and name != "latency_ms":
            raise fault(
                "a fraction is up to 1 and a number of units above it: absolute is for latency_ms", field="absolute"
            )
        if name != "latency_ms" and value > 1 and not isinstance(value, int):
            raise fault(
                "a budget is a fraction kept (0 < f <= 1) or an integer above 1", field=name, limit=1, value=value
            )
        return self

    @property
    def measure(self) -> BudgetMeasure:
        """Which cost is bounded."""
        return next(name for name in BUDGET_MEASURES if getattr(self, name) is not None)

    @property
    def cost_measure(self) -> CostMeasure | None:
        """The same, where it can be counted in a network; None: a latency, which only a worker can measure."""
        return None if self.measure == "latency_ms" else self.measure

    @property
    def amount(self) -> float:
        """The bound as it was stated: a fraction kept up to 1, else a number of units."""
        stated: float = getattr(self, self.measure)
        return stated

    def allowed(self, dense: int) -> int:
        """The largest cost allowed, where the baseline's is `dense`: a fraction is rounded down."""
        assert self.cost_measure is not None, "a latency is measured, not counted"
        return int(self.amount * dense) if self.amount <= 1 else int(self.amount)

    def allowed_ms(self, dense_ms: float) -> float:
        """The longest time allowed, in milliseconds, where the baseline takes `dense_ms`."""
        assert self.latency_ms is not None
        return self.latency_ms if self.absolute or self.latency_ms > 1 else self.latency_ms * dense_ms
