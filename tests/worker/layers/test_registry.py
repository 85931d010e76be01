"""A layer is known everywhere or nowhere: rules of the worker, channels, 8 bits, samples of the tests."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest
from torch import nn

from app.compression.int8 import FLOAT_REASONS
from app.network.blocks import WEIGHTED
from app.network.graph import build_graph
from app.network.layers.activations import Activation
from app.network.layers.layer import Layer
from app.network.layers.registry import COMPUTED, CONTAINERS, LAYERS, read_layers
from app.pruning import channel_rules
from tests.support.networks.layer_samples import SAMPLES, input_shape
from worker.layers.registry import RULES, rule_of


class Whiten(Layer):
    """A layer that nobody has entered anywhere."""

    type: Literal["whiten"] = "whiten"


def missing_entries(kind: type[Layer]) -> list[str]:
    """What a layer lacks before jobs can have it; containers are written out as other layers and need a sample only."""
    name = kind.model_fields["type"].default
    entries = {"sample": name in SAMPLES}
    if kind not in CONTAINERS:
        entries |= {
            "rule of the worker": kind in RULES,
            "channel rule": name in channel_rules.RULES,
            "8-bit entry": name in FLOAT_REASONS,
        }
    return [entry for entry, there in entries.items() if not there]


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_of_the_language_has_all_its_entries(kind: str) -> None:
    assert missing_entries(LAYERS[kind]) == []


def test_a_layer_without_entries_is_noticed() -> None:
    assert missing_entries(Whiten) == ["sample", "rule of the worker", "channel rule", "8-bit entry"]


def test_every_activation_states_the_gain_of_the_weights_before_it() -> None:
    silent = [name for name, kind in LAYERS.items() if issubclass(kind, Activation) and "gain" not in vars(kind)]
    assert silent == []


def test_no_table_knows_a_layer_that_the_language_does_not_have() -> None:
    names = {kind.model_fields["type"].default for kind in COMPUTED}
    assert set(RULES) == set(COMPUTED)
    assert names == set(channel_rules.RULES) == set(FLOAT_REASONS)
    assert set(SAMPLES) == set(LAYERS)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if LAYERS[kind] in COMPUTED])
def test_a_rule_makes_a_module_whose_tensors_are_those_that_the_source_makes_an_attribute_for(kind: str) -> None:
    for axes in (1, 2, 3):
        for layers in SAMPLES[kind](axes):
            graph = build_graph(read_layers(layers), input_shape(axes))
            for node in (node for node in graph.nodes if node.type == kind):
                rule = rule_of(node)
                module = rule.module(node.layer, node)
                assert isinstance(module, nn.Module)
                assert bool(list(module.parameters())) == (rule.attribute is not None) == bool(node.tensors)


def test_the_layers_that_multiply_have_a_fan_in_and_no_others() -> None:
    names = {kind.model_fields["type"].default for kind, rule in RULES.items() if rule.fan_in is not None}
    assert names == WEIGHTED


def test_networks_are_built_without_the_onnx_package() -> None:
    program = "import sys, worker.network; print('onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
