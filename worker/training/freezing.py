"""Layers that a training leaves as they are: no gradient, no step, no decay, and batch norm with the statistics it has.

Frozen means: not trained. Pruning may still remove channels of a frozen layer, or set weights of it to zero, unless it
is excluded there.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.nn.modules.batchnorm import _BatchNorm

from worker.network import Network
from worker.training.optimizers import layer_of


def freeze(network: Network, frozen: Collection[str]) -> None:
    """Ask for gradients of every layer but the `frozen` ones, by name; a name that the network has not is ignored."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(layer_of(name) not in frozen)


def train_mode(network: Network, frozen: Collection[str]) -> None:
    """The network's mode for training: batch norms among the `frozen` layers use and keep their running statistics."""
    network.train()
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and name in frozen:
            module.eval()
