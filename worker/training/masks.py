"""Masks: which weights are zero, and how they stay zero while the network is trained.

    masks.apply(network); masks.mask_optimizer(optimizer, network)             # when (re)pruned
    ... loss.backward()
    masks.mask_gradients(network)            # before clipping: dead weights must not count in the norm
    ... optimizer.step()
    masks.apply(network)                     # +0.0, bit for bit
    ... ema.update()
    masks.mask_tensors(ema)

All four are needed: a masked gradient alone does not hold a weight at zero, because momentum, Adam's averages and the
average of the weights keep its past. Masking the weight alone does not either: its momentum stays alive, and it jumps when
the mask opens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from worker.network import Network


class StatefulOptimizer(Protocol):
    """An optimizer: torch's, or one that keeps its state in the same place."""

    @property
    def state(self) -> Mapping[Tensor, Mapping[str, Any]]:
        """Parameter -> key -> value: momentum, averages of gradients and of squares."""


class Masks:
    """For some parameters of a network, by name, a float32 tensor of their shape: 1 where a weight lives, else 0."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)
        # The parameter objects of the network seen last: walking its modules at every step would cost as much as the
        # masking itself.
        self._seen: weakref.ref[Network] | None = None
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([], [])

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __len__(self) -> int:
        return len(self._masks)

    def zeros(self) -> int:
        """How many weights are pruned."""
        return sum(mask.numel() - int(torch.count_nonzero(mask)) for mask in self._masks.values())

    def sizes(self) -> int:
        """How many weights the masks cover."""
        return sum(mask.numel() for mask in self._masks.values())

    @torch.no_grad()
    def apply(self, network: Network) -> None:
        """Set every pruned weight to +0.0. A weight that is not finite stays visible: zero times NaN is NaN."""
        parameters, masks = self._pairs_of(network)
        if parameters:
            torch._foreach_mul_(parameters, masks)
            torch._foreach_add_(parameters, 0.0)  # -0.0 + 0.0 = +0.0: the same bytes whatever sign the weight had

    @torch.no_grad()
    def mask_gradients(self, network: Network) -> None:
        """Set the gradients of pruned weights to zero; call it before clipping."""
        parameters, masks = self._pairs_of(network)
        pairs = [(p.grad, mask) for p, mask in zip(parameters, masks, strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [mask for _, mask in pairs])

    @torch.no_grad()
    def mask_optimizer(self, optimizer: StatefulOptimizer, network: Network) -> None:
        """Set the optimizer's state of pruned weights (momentum, averages of gradients and squares) to zero."""
        for parameter, mask in zip(*self._pairs_of(network), strict=True):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.copy_(torch.where(mask.to(value.device) != 0, value, torch.zeros_like(value)))

    @torch.no_grad()
    def mask_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Set pruned weights to +0.0, in place, in tensors that carry the parameters' names, such as an average."""
        for name, mask in self._masks.items():
            if name in tensors:
                value = tensors[name]
                value.copy_(torch.where(mask.to(value.device) != 0, value, torch.zeros_like(value)))

    def state(self) -> dict[str, Tensor]:
        """The masks as bool tensors on the CPU, by parameter name: one byte a weight in a checkpoint."""
        return {name: (mask != 0).cpu() for name, mask in self._masks.items()}

    def _pairs_of(self, network: Network) -> tuple[list[Tensor], list[Tensor]]:
        """(the masked parameters of the network, their masks)."""
        if self._seen is None or self._seen() is not network:
            parameters = dict(network.named_parameters())
            self._pairs = ([parameters[name] for name in self._masks], list(self._masks.values()))
            self._seen = weakref.ref(network)
        return self._pairs
