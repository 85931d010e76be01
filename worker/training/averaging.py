"""An exponential moving average of a network: its weights and its running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from worker.network import Network, assign_tensors, floating_tensors, snapshot


class Average:
    """`a <- d * a + (1 - d) * w` after each step, over parameters and running statistics; starts as the network is.

    d = min(decay, (1 + n) / (10 + n)) at step n, as in TensorFlow's ExponentialMovingAverage: without this a short
    training's average would be mostly its initial weights. Running statistics are averaged alike, so the average can
    be evaluated as it is.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        self.tensors = snapshot(network)
        self._own = floating_tensors(network)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network as it is after step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(self._own.values()), 1 - decay)

    @contextmanager
    def inside(self, network: Network) -> Iterator[None]:
        """The network has the average's values inside the block, and its own again after it."""
        own = snapshot(network)
        assign_tensors(network, self.tensors)
        try:
            yield
        finally:
            assign_tensors(network, own)
