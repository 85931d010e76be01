"""Optimizers: torch's own, to the bit, without torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.spec.job import Optimizer as OptimizerSpec
from tests.support.jobs.blobs import small_cnn
from worker.network import build_network
from worker.precision import Precision
from worker.training.optimizers import (
    build_optimizer,
    inner_weights,
    optimizer_tensors,
    orthogonal,
    restore_optimizer,
)

SPECS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0},
    "sgd-momentum-decay": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4},
    "sgd-nesterov": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "adam": {"name": "adam", "lr": 0.01},
    "adam-decay": {"name": "adam", "lr": 0.01, "weight_decay": 0.01, "betas": (0.8, 0.95), "eps": 1e-6},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
}


def torchs(parameters: list[Tensor], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """torch's optimizer of the same name and settings."""
    if spec.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=spec.lr,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
            foreach=False,
        )
    kind = torch.optim.AdamW if spec.name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, foreach=False)


@pytest.mark.parametrize("settings", SPECS.values(), ids=SPECS)
def test_steps_are_torchs_to_the_bit_also_while_the_rate_moves(settings: dict[str, Any]) -> None:
    spec = OptimizerSpec.model_validate(settings)
    ours, reference = build_network(small_cnn(), seed=0), build_network(small_cnn(), seed=0)
    for network in (ours, reference):
        Precision(torch.device("cpu"), None, channels_last=True).to_device(network)
    left, right = build_optimizer(ours, spec), torchs(list(reference.parameters()), spec)
    generator = torch.Generator().manual_seed(1)
    for step in range(7):
        rate = spec.lr * (1 - step / 10)
        left.param_groups[0]["lr"] = right.param_groups[0]["lr"] = rate
        for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
            gradient = torch.randn(mine.shape, generator=generator)
            mine.grad = torch.empty_like(mine).copy_(gradient).detach()
            other.grad = torch.empty_like(other).copy_(gradient).detach()
        left.step()
        right.step()
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, reference.get_parameter(name)), (name, step)


@pytest.mark.parametrize("settings", SPECS.values(), ids=SPECS)
def test_layers_with_a_factor_step_as_torchs_groups_with_that_rate(settings: dict[str, Any]) -> None:
    spec = OptimizerSpec.model_validate(settings)
    ours, reference = build_network(small_cnn(), seed=0), build_network(small_cnn(), seed=0)
    factors = {"conv1": 0.25, "batch_norm1": 0.0}
    named = dict(reference.named_parameters())
    groups = [[p for name, p in named.items() if name.startswith(layer)] for layer in (*factors, "linear1")]
    left = build_optimizer(ours, spec, factors)
    others = [(torchs(list(group), spec), factor) for group, factor in zip(groups, (0.25, 0.0, 1.0), strict=True)]
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        rate = spec.lr * (1 - step / 10)
        for group in left.param_groups:
            group["lr"] = rate
        for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        left.step()
        for optimizer, factor in others:
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, named[name]), (name, step)
    fresh = build_network(small_cnn(), seed=0)
    assert torch.equal(ours.get_parameter("batch_norm1.weight"), fresh.get_parameter("batch_norm1.weight"))


def test_parameters_that_do_not_train_are_not_the_optimizers() -> None:
    network = build_network(small_cnn(), seed=0)
    network.get_parameter("conv1.weight").requires_grad_(False)
    optimizer = build_optimizer(network, OptimizerSpec.model_validate(SPECS["adamw"]))
    assert all(parameter.requires_grad for parameter in optimizer.parameters)
    assert len(optimizer.parameters) == len(list(network.parameters())) - 1


def test_a_parameter_without_a_gradient_stays_and_joins_later() -> None:
    network = build_network(small_cnn(), seed=0)
    optimizer = build_optimizer(network, OptimizerSpec.model_validate(SPECS["sgd-nesterov"]))
    before = network.get_parameter("conv1.weight").detach().clone()
    network.get_parameter("linear1.bias").grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(network.get_parameter("conv1.weight"), before)
    assert set(optimizer_tensors(optimizer, network)) == {"linear1.bias/momentum_buffer"}
    network.get_parameter("conv1.weight").grad = torch.ones_like(before)
    optimizer.step()
    assert not torch.equal(network.get_parameter("conv1.weight"), before)


def test_memory_of_another_shape_is_refused() -> None:
    network = build_network(small_cnn(), seed=0)
    optimizer = build_optimizer(network, OptimizerSpec.model_validate(SPECS["sgd"]))
    with pytest.raises(RuntimeError, match=r"linear1.bias/momentum_buffer has shape \(4,\), its parameter \(3,\)"):
        restore_optimizer(optimizer, network, {"linear1.bias/momentum_buffer": torch.zeros(4)}, steps=1)


def test_a_training_step_does_not_load_torchs_compiler() -> None:
    program = """
import sys
from tests.support.jobs.blobs import BlobBatches, small_cnn
from app.spec.job import Training
from worker.training.learning_rate import learning_rate
from worker.network import build_network
from worker.precision import choose_precision
from worker.training.loop import Fit, Recipe

class Silent:
    def before_step(self, fit): pass
    def window(self, fit, window): pass
    def epoch_finished(self, fit, result): pass

settings = Training(epochs=1, gradient_clipping=1.0, ema_decay=0.9)
recipe = Recipe("training", 1, learning_rate(settings), settings, 0)
precision = choose_precision(settings, "cpu", spatial_axes=2)
network = build_network(small_cnn(), seed=0)
precision.to_device(network)
Fit(network, BlobBatches(), recipe, precision, validation=BlobBatches()).run(Silent())
assert "torch._dynamo" not in sys.modules
assert "sympy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_an_orthogonal_step_keeps_directions_and_makes_singular_values_equal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix) @ v.T
    assert torch.allclose(found, torch.diag(found.diagonal()), atol=1e-4)
    seen = found.diagonal()[values > values.max() / 50]
    assert 0.6 < seen.min() <= seen.max() < 1.3


def test_muon_is_torchs_on_inner_weights_and_sgd_on_the_others() -> None:
    spec = OptimizerSpec(name="muon", lr=0.1, weight_decay=0.0)
    layers: list[dict[str, Any]] = [
        {"type": "conv", "out_channels": 6, "kernel_size": 3},
        {"type": "batch_norm"},
        {"type": "conv", "out_channels": 9, "kernel_size": 3},
        {"type": "relu"},
        {"type": "conv", "out_channels": 9, "kernel_size": 1, "groups": 9},
        {"type": "global_avg_pool"},
        {"type": "flatten"},
        {"type": "linear", "out_features": 3},
    ]
    graph = build_graph(read_layers(layers), (1, 8, 8))
    networks = [build_network(graph, seed=0) for _ in range(3)]
    inner = sorted(inner_weights(networks[0].graph))
    assert inner == ["conv2.weight"], "not the first layer, a depthwise one, the class scores, a norm or a bias"
    ours, plain, reference = networks
    muon, sgd = build_optimizer(ours, spec), build_optimizer(plain, spec.model_copy(update={"name": "sgd"}))
    matrix = reference.get_parameter(inner[0]).detach().flatten(1).clone().requires_grad_()
    torchs_own = torch.optim.Muon([matrix], lr=0.05, weight_decay=0.0, momentum=0.9, nesterov=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for name, mine in ours.named_parameters():
            gradient = torch.randn(mine.shape, generator=generator)
            mine.grad, plain.get_parameter(name).grad = gradient, gradient.clone()
            if name == inner[0]:
                matrix.grad = gradient.flatten(1).clone()
        muon.step(), sgd.step(), torchs_own.step()  # type: ignore[func-returns-value]
    for name, mine in ours.named_parameters():
        assert torch.equal(mine, plain.get_parameter(name)) == (name != inner[0]), name
    moved = ours.get_parameter(inner[0]).detach().flatten(1) - reference.get_parameter(inner[0]).detach().flatten(1)
    assert moved.norm() > 0.1
    # torch's first velocity is a tenth of the gradient, ours the gradient: the direction is what counts
    assert (
        torch.nn.functional.cosine_similarity(
            moved.flatten(), (matrix.detach() - reference.get_parameter(inner[0]).detach().flatten(1)).flatten(), dim=0
        )
        > 0.9
    )


def test_muon_shrinks_inner_weights_by_a_stated_decay() -> None:
    layers = [{"type": "conv", "out_channels": 4, "kernel_size": 3} for _ in range(2)]
    ends = [{"type": "flatten"}, {"type": "linear", "out_features": 3}]
    graph = build_graph(read_layers([*layers, *ends]), (1, 8, 8))
    kept, shrunk = (build_network(graph, seed=0) for _ in range(2))
    for network, decay in ((kept, 0.0), (shrunk, 0.5)):
        optimizer = build_optimizer(network, OptimizerSpec(name="muon", lr=0.1, weight_decay=decay))
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = network.get_parameter("conv2.weight").detach().clone()
        optimizer.step()
    difference = kept.get_parameter("conv2.weight") - shrunk.get_parameter("conv2.weight")
    torch.testing.assert_close(difference.detach(), 0.5 * 0.05 * before)
