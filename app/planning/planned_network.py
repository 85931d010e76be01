"""What a dry run knows of a network at one point of a job, and what one optimization does to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from app.errors import Fault
from app.network.blocks import WEIGHTED
from app.network.cost import Cost, cost
from app.network.graph import Graph
from app.network.node import Node

Action = Literal["narrow", "follow", "keep", "mask", "insert", "replace"]


@dataclass(frozen=True)
class LayerPlan:
    """What one optimization does to one layer.

    `before` and `after` are widths (output channels or features); for `mask` non-zero weights; for `follow` input
    widths. None: not known before training, no layer on that side, or no weights of its own. `exact` is False where it
    depends on trained weights.
    """

    layer: str
    action: Action
    before: int | None
    after: int | None
    exact: bool
    reason: str
    optimization: str | None = None


@dataclass(frozen=True)
class PlannedNetwork:
    """The network as planned after some of the optimizations: what the next one finds."""

    graph: Graph
    baseline: Cost
    """What the network costs that is trained: fractions of budgets refer to it."""
    zeros: Mapping[str, int] = field(default_factory=dict)
    """Layer -> zeros of its weight, as far as they are known before training."""
    floor: Cost | None = None
    """The cost with everything at its smallest that the last removal could leave; None: nothing was removed."""
    estimated: frozenset[str] = frozenset()
    """Layers whose width, or number of zeros, is an estimate."""
    possible: frozenset[str] = frozenset()
    """Names that layers will have or not, as the trained weights decide."""
    estimates_widths: bool = False
    """Whether the widths of `graph` are estimates."""

    @property
    def cost(self) -> Cost:
        """The cost of the network; zeros that depend on trained weights are not counted."""
        whole = cost(self.graph)
        return Cost(whole.params, whole.params - sum(self.zeros.values()), whole.macs, whole.bytes)

    @property
    def weighted(self) -> list[Node]:
        """The convolutions and linear layers, in order."""
        return weighted_layers(self.graph)


@dataclass(frozen=True)
class PlannedStep:
    """What one optimization does: the network after it, a row for each layer that it concerns, warnings."""

    network: PlannedNetwork
    rows: tuple[LayerPlan, ...] = ()
    warnings: tuple[Fault, ...] = ()


def weighted_layers(graph: Graph) -> list[Node]:
    """The convolutions and linear layers of a graph, in order."""
    return [node for node in graph.nodes if node.type in WEIGHTED]
