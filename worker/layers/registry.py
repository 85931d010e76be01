"""The rule of every layer that a graph has as a node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.network.layers.layer import Layer
from app.network.node import Node
from worker.layers.activations import ACTIVATION_RULES
from worker.layers.convolutions import CONVOLUTION_RULES
from worker.layers.joins_and_views import JOIN_AND_VIEW_RULES
from worker.layers.normalization import NORM_RULES
from worker.layers.pooling import POOL_RULES
from worker.layers.rule import LayerRule

RULES: Mapping[type[Layer], LayerRule[Any]] = {
    rule.layer: rule for rule in (*CONVOLUTION_RULES, *NORM_RULES, *ACTIVATION_RULES, *POOL_RULES, *JOIN_AND_VIEW_RULES)
}


def rule_of(node: Node) -> LayerRule[Any]:
    """The rule of a node's layer."""
    return RULES[type(node.layer)]
