"""A term of the loss that drives whole channels to zero, before pruning takes the weakest (Fang et al., arXiv 2301.12900).

    term = GroupLasso(network).value()         # sum over classes of sqrt(size) * |all weights of the class|_2

A class is everything that is removed with a channel: the slices of producers and consumers, and the scales of norms.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from app.pruning.channel_classes import channel_classes
from worker.network import Network

SMALLEST_SQUARE = 1e-24  # below it a class counts as zero, where the root has no derivative


class GroupLasso:
    """The term over the classes of a network that may be removed; build another one after every surgery."""

    def __init__(self, network: Network) -> None:
        classes = channel_classes(network.graph)
        free = [c for c in classes.all().tolist() if c not in classes.pins]
        place = np.full(classes.slot_count, len(free), dtype=np.int64)  # pinned ones share the last place
        place[free] = np.arange(len(free))
        parameters = dict(network.named_parameters())
        sizes = np.zeros(len(free) + 1)
        self._count = len(free)
        self._parts: list[tuple[Tensor, int, Tensor]] = []
        for axis in classes.axes:
            if axis.tensor != "weight" or axis.role == "other":
                continue
            weight = parameters[f"{axis.layer}.weight"]
            places = place[axis.slots.runs(1)]
            if (places == len(free)).all():
                continue
            np.add.at(sizes, places, weight.numel() / len(places))
            self._parts.append((weight, axis.axis, torch.from_numpy(places).to(weight.device)))
        device = self._parts[0][0].device if self._parts else None
        self._factors = torch.from_numpy(np.sqrt(sizes[:-1])).to(device, torch.float32)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def value(self) -> Tensor:
        """The term, a scalar in the graph of the parameters; its gradient at a class of zeros is zero."""
        squares = torch.zeros(self._count + 1, device=self._factors.device)
        for weight, axis, places in self._parts:
            of_position = (weight * weight).movedim(axis, 0).flatten(1).sum(1) if weight.dim() > 1 else weight * weight
            squares = squares.index_add(0, places, of_position)
        return (self._factors * squares[:-1].clamp_min(SMALLEST_SQUARE).sqrt()).sum()
