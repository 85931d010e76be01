"""The mean absolute output of each channel over images, float64 on the CPU.

Axes: N batch, C channels, x spatial.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app.errors import Diverged
from app.network.blocks import block_of
from app.pruning.channel_classes import Classes
from app.pruning.channel_rules import FloatArray
from worker.network import Network, calls_of
from worker.pruning.eval_mode import eval_mode


def mean_activations(network: Network, classes: Classes, batches: Iterable[tuple[Tensor, Tensor]]) -> FloatArray:
    """By class number: the mean over producers, images and positions of the absolute output, in eval mode.

    The output of a producer (a convolution or linear layer, at each place that it has in the network) is taken after
    the normalisation and the activation that alone read it (`block_of`): what the next layers read. Molchanov et
    al., arXiv 1611.06440.

    Raises:
        Diverged: An output is not finite.
    """
    owners = dict.fromkeys(axis.layer for axis in classes.axes if axis.role == "out")
    producers = [place.name for owner in owners for place in network.graph.places(owner)]
    totals: dict[str, Tensor] = {}
    images = 0
    hooks = [_add_outputs(network, name, totals) for name in producers]
    try:
        with eval_mode(network), torch.no_grad():
            for images_NCx, _ in batches:
                network(images_NCx)
                images += len(images_NCx)
    finally:
        for hook in hooks:
            hook.remove()
    sums, contributions = np.zeros(classes.slot_count), np.zeros(classes.slot_count, dtype=np.int64)
    for name in producers:
        slots = classes.slots[name]
        means = totals[name].cpu().numpy() / max(1, images)
        if not np.isfinite(means).all():
            raise Diverged(f"an output of {name} is not finite, so activation cannot rank the channels")
        np.add.at(sums, slots.ids, means.reshape(-1, slots.repeat).mean(axis=1))
        np.add.at(contributions, slots.ids, 1)
    return sums / np.maximum(contributions, 1)


def _add_outputs(network: Network, name: str, totals: dict[str, Tensor]) -> Any:
    """Hook the producer `name`: add its mean absolute output over positions, by channel, to `totals` for each image."""
    block = block_of(network.graph, network.graph[name])
    last = block.norm or block.conv
    # applied here: the network may pool before it activates
    apply = None if block.activation is None else network.get_submodule(block.activation.home)
    turns = itertools.cycle(calls_of(network, last.home))  # a module that is shared is called once for each place

    def hook(module: nn.Module, inputs: Any, output_NCx: Tensor) -> None:
        if next(turns) != last.name:
            return
        answer_NCx = output_NCx if apply is None else apply.forward(output_NCx)
        found_C = answer_NCx.double().abs().flatten(2).mean(2) if answer_NCx.dim() > 2 else answer_NCx.double().abs()
        total_C = found_C.sum(0)
        totals[name] = totals[name] + total_C if name in totals else total_C

    return network.get_submodule(last.home).register_forward_hook(hook)
