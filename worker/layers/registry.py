"""The rule of every layer that a graph has as a node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.network.layers.layer import Layer
from app.network.node import Node
from worker.layers.activations import ACTIVATIONS
from worker.layers.convolutions import CONVOLUTIONS
from worker.layers.joins_and_views import JOINS_AND_VIEWS
from worker.layers.normalization import NORMS
from worker.layers.pooling import POOLS
from worker.layers.rule import LayerRule

RULES: Mapping[type[Layer], LayerRule[Any]] = {
    rule.layer: rule for rule in (*CONVOLUTIONS, *NORMS, *ACTIVATIONS, *POOLS, *JOINS_AND_VIEWS)
}


def rule_of(node: Node) -> LayerRule[Any]:
    """The rule of a node's layer."""
    return RULES[type(node.layer)]
