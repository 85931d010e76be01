"""A network in eval mode for a while: what is measured for pruning is what the finished network does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from worker.network import Network


@contextmanager
def eval_mode(network: Network) -> Iterator[None]:
    """Set every module to eval mode, and each back to its own mode at the end: frozen ones may differ from the rest."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
