"""A weight as outputs and inputs: whatever way it is stored, an output's inputs are those that it reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from app.network.blocks import WEIGHTED
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.pruning.weight_matrix import WeightMatrix, erk_axes, weight_matrix, why_dense
from app.spec.prune import Prune
from tests.support.networks.topologies import TOPOLOGIES, topology, trained


def one_layer(shape: tuple[int, ...], **layer: Any) -> Graph:
    before = [{"type": "flatten"}] if layer["type"] == "linear" else []
    return build_graph(read_layers([*before, layer]), shape)


LAYERS: list[tuple[tuple[int, ...], dict[str, Any], tuple[int, int, int, int]]] = [
    ((6, 1, 1), {"type": "linear", "out_features": 5}, (1, 5, 6, 1)),
    ((6, 5, 5), {"type": "conv", "out_channels": 8, "kernel_size": 3}, (1, 8, 6, 9)),
    ((6, 5, 5), {"type": "conv", "out_channels": 4, "kernel_size": [3, 1], "groups": 2}, (2, 2, 3, 3)),
    ((6, 5, 5), {"type": "conv", "out_channels": 12, "kernel_size": 3, "groups": "depthwise"}, (6, 2, 1, 9)),
    ((6, 9), {"type": "conv", "out_channels": 4, "kernel_size": 5}, (1, 4, 6, 5)),
    ((4, 3, 3, 3), {"type": "conv", "out_channels": 4, "kernel_size": 2, "groups": 2}, (2, 2, 2, 8)),
    ((6, 5, 5), {"type": "conv_transpose", "out_channels": 8, "kernel_size": 2}, (1, 8, 6, 4)),
    ((6, 5, 5), {"type": "conv_transpose", "out_channels": 8, "kernel_size": 2, "groups": 2}, (2, 4, 3, 4)),
    ((6, 5, 5), {"type": "conv_transpose", "out_channels": 6, "kernel_size": 2, "groups": "depthwise"}, (6, 1, 1, 4)),
]


@pytest.mark.parametrize(("shape", "layer", "axes"), LAYERS)
def test_a_row_holds_the_weights_through_which_an_output_reads_its_inputs(
    shape: tuple[int, ...], layer: dict[str, Any], axes: tuple[int, int, int, int]
) -> None:
    """Lets one input channel through alone: only the weights of its column can be seen at the outputs."""
    network = trained(one_layer(shape, **layer, bias=False)).double()
    node = network.graph.nodes[-1]
    matrix = weight_matrix(node)
    assert (matrix.groups, matrix.outputs, matrix.inputs, matrix.positions) == axes
    weight = network.get_parameter(f"{node.name}.weight").detach()
    assert matrix.elements == weight.numel()
    rows = matrix.rows(weight.numpy().ravel())
    for group in range(matrix.groups):
        for channel in range(matrix.inputs):
            image = torch.zeros(1, *shape, dtype=torch.float64)
            image[0, group * matrix.inputs + channel] = 1.0
            with torch.no_grad():
                out = network(image).reshape(matrix.groups, matrix.outputs, -1)
            blind = np.flatnonzero(np.abs(rows[group, :, channel]).sum(axis=1) == 0)
            assert not blind.size
            assert bool((out[group].abs().amax(dim=1) > 0).all())
            assert not bool(out[[other for other in range(matrix.groups) if other != group]].any())
            stripped = rows.copy()
            stripped[group, :, channel] = 0
            changed = torch.from_numpy(matrix.flat(stripped).reshape(weight.shape))
            with torch.no_grad():
                network.get_parameter(f"{node.name}.weight").copy_(changed)
                assert not bool(network(image).any())
                network.get_parameter(f"{node.name}.weight").copy_(weight)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_rows_and_back_is_the_weight_for_every_layer_of_every_topology(name: str) -> None:
    for node in topology(name).nodes:
        if node.type in WEIGHTED and node.shares is None:
            shape = node.tensors["weight"].shape
            values = np.arange(node.tensors["weight"].elements)
            matrix = weight_matrix(node)
            assert np.array_equal(matrix.flat(matrix.rows(values)), values)
            assert erk_axes(node)[2:] == shape[2:]
            assert erk_axes(node)[0] == node.shape[0]


def test_blocks_are_counted_with_ragged_ones_and_are_equal_only_where_none_is() -> None:
    matrix = WeightMatrix(2, 6, 5, 9, False)
    assert matrix.blocks(4, 4) == (2, 2)
    assert matrix.equal_blocks(4, 4) is None
    assert matrix.equal_blocks(3, 5) == 3 * 5 * 9
    assert matrix.equal_blocks(100, 100) == 6 * 5 * 9
    assert matrix.equal_blocks(2, 4) is None


def reason(shape: tuple[int, ...], step: dict[str, Any], **layer: Any) -> str | None:
    return why_dense(one_layer(shape, **layer).nodes[-1], Prune.model_validate({"type": "prune", **step}))


CONV = {"type": "conv", "out_channels": 8, "kernel_size": 3}


def test_a_layer_stays_dense_where_its_inputs_are_no_multiple_of_the_pattern_and_says_so() -> None:
    pattern = {"structure": "n:m", "pattern": "2:4"}
    assert reason((3, 8, 8), pattern, **CONV) == "2:4 on 3 input channels"
    assert reason((1, 8, 8), pattern, **CONV) == "2:4 on 1 input channel"
    assert reason((10, 1, 1), pattern, type="linear", out_features=4) == "2:4 on 10 input features"
    assert reason((8, 8, 8), pattern, **CONV | {"groups": 4}) == "2:4 on 2 input channels of each group"
    assert reason((8, 8, 8), pattern, **CONV | {"groups": "depthwise"}) == "2:4 on 1 input channel of each group"
    assert reason((8, 8, 8), pattern, **CONV | {"groups": 2}) is None
    assert reason((8, 8, 8), pattern, **CONV | {"type": "conv_transpose", "groups": 2}) is None
    assert reason((4, 8, 8), pattern, **CONV | {"type": "conv_transpose", "groups": 2}) is not None


def test_a_pattern_of_its_own_decides_for_its_layer() -> None:
    own = {"structure": "n:m", "pattern": "2:4", "overrides": {"conv1": {"pattern": "1:3"}}}
    assert reason((3, 8, 8), own, **CONV) is None
    assert reason((4, 8, 8), own, **CONV) == "1:3 on 4 input channels"


def test_one_block_stays_and_excluded_layers_stay() -> None:
    blocks = {"structure": "blocks", "block": (16, 16), "sparsity": 0.5}
    assert reason((8, 8, 8), blocks, **CONV) == "one block of 16 x 16 holds all of it"
    assert reason((8, 8, 8), blocks, **CONV | {"groups": 2}) is None
    assert reason((8, 8, 8), blocks | {"exclude": ("conv1",), "block": (2, 2)}, **CONV) == "excluded"
