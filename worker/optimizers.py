"""Optimizers by the job's names, and their memory as named tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from app.spec.job import Optimizer
from worker.network import Network


def build_optimizer(network: Network, optimizer: Optimizer) -> torch.optim.Optimizer:
    """A new optimizer, without memory, over all parameters; its rate is set before each step by the training loop."""
    parameters = list(network.parameters())
    if optimizer.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            nesterov=optimizer.nesterov,
            weight_decay=optimizer.weight_decay,
        )
    kind = torch.optim.AdamW if optimizer.name == "adamw" else torch.optim.Adam
    return kind(
        parameters, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: Network) -> dict[str, Tensor]:
    """What the optimizer remembers: `<parameter>/<key>` -> tensor, not copies; empty before the first step."""
    return {
        f"{name}/{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Give a new optimizer the memory that `optimizer_tensors` named.

    Tensors of a parameter's shape get its layout: the same values in another layout go through other kernels, which
    round otherwise.

    Raises KeyError for a parameter that the network does not have.
    """
    parameters = dict(network.named_parameters())
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        held = torch.empty_like(parameter, dtype=value.dtype) if value.shape == parameter.shape else value.clone()
        optimizer.state[parameter][key] = held.copy_(value).detach()
