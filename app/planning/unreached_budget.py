"""Budgets that cannot be reached, and budgets that the network meets already, as sentences."""

from __future__ import annotations

import math

from app.errors import Fault
from app.network.cost import Cost
from app.pruning.budget import BudgetUnreachable
from app.spec.budget import Budget
from app.spec.low_rank import LowRank
from app.spec.prune import Prune


def unreachable_fault(step: Prune | LowRank, exc: BudgetUnreachable, pointer: str) -> Fault:
    """The fault of a step whose budget is out of reach, with the lowest that is not."""
    if step.budget is None or exc.measure is None or exc.floor is None or exc.dense is None:
        return Fault(pointer, str(exc))
    value = step.budget.amount
    # rounded up, so that the limit is a budget that can be sent
    limit = math.ceil(exc.floor / exc.dense * 1e4) / 1e4 if value <= 1 else exc.floor
    message = f"the budget cannot be reached; the lowest reachable is {limit}: {exc}"
    return Fault(f"{pointer}/budget/{exc.measure}", message, limit=limit, value=value)


def why_within(budget: Budget, now: Cost, baseline: Cost) -> str:
    """Why a budget asks for nothing: the network has no more than it allows."""
    measure = budget.cost_measure
    assert measure is not None, "a latency is measured, not counted"
    return f"the network has {now.of(measure)} {measure} and the budget allows {budget.allowed(baseline.of(measure))}"
