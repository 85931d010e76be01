"""What a layer reads at a position, and the weights that give wanted outputs: each kind of layer against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.network.node import Node
from worker.network import Network, build_network
from worker.pruning import normal_equations
from worker.pruning.normal_equations import (
    NormalEquations,
    assign_weights,
    choose_positions,
    input_rows,
    mask_of,
    output_rows,
    weights_of,
)

LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "linear": ((7,), {"type": "linear", "out_features": 4}),
    "conv 1-D": ((4, 9), {"type": "conv", "out_channels": 6, "kernel_size": 3, "padding": "same"}),
    "conv 2-D": (
        (4, 7, 6),
        {"type": "conv", "out_channels": 6, "kernel_size": [3, 2], "padding": [2, 1], "stride": [2, 1]},
    ),
    "even, same": ((2, 6, 6), {"type": "conv", "out_channels": 3, "kernel_size": 4, "padding": "same"}),
    "dilated": ((3, 9, 9), {"type": "conv", "out_channels": 5, "kernel_size": 3, "dilation": 2, "padding": "same"}),
    "conv 3-D": ((2, 4, 5, 3), {"type": "conv", "out_channels": 4, "kernel_size": [2, 3, 1], "padding": 1}),
    "no bias": ((3, 5, 5), {"type": "conv", "out_channels": 4, "kernel_size": 3, "bias": False}),
    "groups": ((4, 6, 6), {"type": "conv", "out_channels": 6, "kernel_size": 3, "groups": 2}),
    "depthwise": ((4, 6, 6), {"type": "conv", "out_channels": 8, "kernel_size": 3, "groups": "depthwise"}),
    "transposed": (
        (4, 5, 4),
        {
            **{"type": "conv_transpose", "out_channels": 6, "kernel_size": [3, 2], "stride": [2, 3], "padding": [1, 0]},
            **{"output_padding": [1, 2], "dilation": [1, 2], "groups": 2},
        },
    ),
}


def layer_named(name: str) -> tuple[Network, Node, Tensor]:
    """A network of the layer alone, its node and inputs."""
    shape, layer = LAYERS[name]
    layers = [layer] if len(shape) > 1 else [{"type": "flatten"}, layer]
    graph = build_graph(read_layers(layers), shape if len(shape) > 1 else (*shape, 1))
    network = build_network(graph, seed=0)
    node = graph.nodes[-1]
    if "bias" in node.uses:
        torch.nn.init.normal_(network.get_parameter(f"{node.name}.bias"), generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(40, *node.input_shapes[0], generator=torch.Generator().manual_seed(2))
    return network, node, inputs


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_rows_times_weights_are_the_outputs_of_the_layer(name: str) -> None:
    network, node, inputs = layer_named(name)
    module = network.get_submodule(node.name)
    outputs, weights = module(inputs), weights_of(node, module)
    for most in (5, 10_000):
        positions = choose_positions(node, len(inputs), most, torch.Generator().manual_seed(3))
        rows = input_rows(node, inputs, positions).double()
        if module.bias is not None:
            rows = torch.cat([rows, rows.new_ones((*rows.shape[:2], 1))], dim=2)
        expected = output_rows(outputs, positions, None, weights.shape[0]).double()
        torch.testing.assert_close(rows @ weights.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_the_solution_gives_back_the_weights_that_made_the_outputs(name: str) -> None:
    network, node, inputs = layer_named(name)
    module = network.get_submodule(node.name)
    wanted, right = module(inputs), weights_of(node, module)
    positions = choose_positions(node, len(inputs), 10_000, torch.Generator())
    equations = NormalEquations.of(node, bias=module.bias is not None)
    equations.add(input_rows(node, inputs, positions), output_rows(wanted, positions, None, len(right)))
    assert equations.error(right) < 1e-10 < equations.error(torch.zeros_like(right))
    found = equations.solve(torch.zeros_like(right), ridge=1e-12)
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)
    assign_weights(node, module, torch.zeros_like(right))
    assert not module(inputs).any()
    assign_weights(node, module, found)
    torch.testing.assert_close(module(inputs), wanted, rtol=1e-3, atol=1e-3)


def equations_of(name: str, seed: int = 5) -> tuple[NormalEquations, Tensor, Tensor]:
    """(equations with random targets, the rows of inputs with the bias's 1, targets)."""
    _, node, inputs = layer_named(name)
    positions = choose_positions(node, len(inputs), 10_000, torch.Generator())
    rows = input_rows(node, inputs, positions)
    bias = "bias" in node.uses
    equations = NormalEquations.of(node, bias=bias)
    width = equations.cross.shape[2]
    targets = torch.randn(rows.shape[0], rows.shape[1], width, generator=torch.Generator().manual_seed(seed))
    equations.add(rows, targets)
    full = rows.double()
    return equations, torch.cat([full, full.new_ones((*full.shape[:2], 1))], dim=2) if bias else full, targets.double()


def test_a_strong_ridge_keeps_the_start_and_fits_the_bias_alone() -> None:
    equations, rows, targets = equations_of("conv 2-D")
    start = torch.randn(1, 6, rows.shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = equations.solve(start, ridge=1e12)
    torch.testing.assert_close(found[:, :, :-1], start[:, :, :-1], rtol=1e-6, atol=1e-6)
    rest = targets - rows[:, :, :-1] @ start[:, :, :-1].transpose(1, 2)
    torch.testing.assert_close(found[0, :, -1], rest[0].mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["conv 2-D", "groups", "depthwise", "no bias", "transposed"])
def test_under_a_mask_each_output_is_fitted_on_its_own_support(name: str) -> None:
    equations, rows, targets = equations_of(name)
    network, node, _ = layer_named(name)
    module = network.get_submodule(node.name)
    weight = network.get_parameter(f"{node.name}.weight")
    mask = (torch.rand(weight.shape, generator=torch.Generator().manual_seed(7)) < 0.4).float()
    support = mask_of(node, module, mask)
    start = weights_of(node, module) * support
    found = equations.solve(start, ridge=1e-12, mask_GOF=support)
    assert not found[~support].any()
    for group in range(len(support)):
        for output in range(support.shape[1]):
            own = support[group, output]
            if own.any():
                expected = torch.linalg.lstsq(rows[group][:, own], targets[group][:, output, None]).solution[:, 0]
                torch.testing.assert_close(found[group, output, own], expected, rtol=1e-5, atol=1e-7)


def test_inputs_that_are_all_zero_keep_the_weights() -> None:
    _, node, inputs = layer_named("no bias")
    positions = choose_positions(node, len(inputs), 10_000, torch.Generator())
    equations = NormalEquations.of(node, bias=False)
    rows = input_rows(node, torch.zeros_like(inputs), positions)
    equations.add(rows, torch.ones(1, rows.shape[1], 4))
    start = torch.randn(1, 4, rows.shape[2], dtype=torch.float64)
    torch.testing.assert_close(equations.solve(start, ridge=1e-2), start)


@pytest.mark.parametrize("piece", [1, 700, 5000])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_that_are_gathered_in_pieces_give_the_same_sums(
    name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, node, inputs = layer_named(name)
    outputs = network.get_submodule(node.name)(inputs).detach()
    positions = choose_positions(node, len(inputs), 7, torch.Generator().manual_seed(0))
    whole, parts = (NormalEquations.of(node, bias="bias" in node.uses) for _ in range(2))
    whole.add_layer(node, inputs, positions, outputs)
    monkeypatch.setattr(normal_equations, "_CHUNK_BYTES", 8 * piece)
    parts.add_layer(node, inputs, positions, outputs)
    assert whole.rows == parts.rows == positions.numel()
    torch.testing.assert_close((parts.gram, parts.cross), (whole.gram, whole.cross))
    assert parts.squares == pytest.approx(whole.squares)
