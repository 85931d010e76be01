"""A trained network without some of its channels: the same function, physically smaller.

    smaller = shrink(network, classes, dropped)      # new graph, new parameters: the optimizer is built anew
    ema = shrink_tensors(ema, classes, dropped)      # anything else that carries the parameters' names
    with masked_in_place(network, classes, dropped): # to evaluate a cut that may not be made
        ...

A network without a class computes what the network computes in which everything of the class is zero: the producers'
slices, scale and bias of the norms, *and the consumers' slices* (`masked_reference`). Zeroing filters alone is not
enough: a batch norm turns their zeros into its bias, and a sigmoid or a non-zero padding turns zeros into something
else.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from app.pruning.channel_classes import Classes, shrink_graph
from worker.network import Network

CHECKED_INPUTS = 2
TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order, measured 1e-6 on the presets


def shrink(network: Network, classes: Classes, dropped: Collection[int]) -> Network:
    """The network without the `dropped` classes, on the same device, in the same mode; the given one stays as it is.

    `classes` are those of `network.graph`. Kept channels keep their order and their values. The result is compared
    with the masked network on random inputs: a difference is a fault of the rules, not of the user, and fails an
    assertion.
    """
    graph = shrink_graph(network.graph, dropped, classes)
    images_NCx = _random_images(network)
    # First, so that the masked copy is freed before the smaller network is built: with both it is 3.2 times the weights.
    expected_NK = _logits_of(masked_reference(network, classes, dropped), images_NCx)
    with torch.device("meta"):
        smaller = Network(graph)
    state = shrink_tensors(network.state_dict(), classes, dropped)
    expected = {key: tensor.shape for key, tensor in graph.tensors().items()}
    found = {key: tuple(state[key].shape) for key in expected}
    assert found == expected, f"surgery gave {found}, the graph says {expected}"
    smaller.load_state_dict(state, strict=True, assign=True)
    for (name, parameter), (old_name, old) in zip(smaller.named_parameters(), network.named_parameters(), strict=True):
        assert name == old_name
        parameter.requires_grad_(old.requires_grad)
    _check_same_logits(_logits_of(smaller, images_NCx), expected_NK)
    smaller.train(network.training)
    return smaller


def kept_channels(classes: Classes, dropped: Collection[int]) -> dict[str, Tensor]:
    """By node, for those that lose channels of their output: the numbers of those that stay, ascending."""
    kept = classes.kept(dropped).mask
    found = {name: kept[slots.runs(1)] for name, slots in classes.slots.items()}
    return {name: torch.from_numpy(np.flatnonzero(mask)) for name, mask in found.items() if not mask.all()}


def shrink_tensors(tensors: Mapping[str, Tensor], classes: Classes, dropped: Collection[int]) -> dict[str, Tensor]:
    """Copies of tensors that are named as the network's, without the indices of the `dropped` classes.

    Contiguous, of the same type, on the same device; a tensor that follows no channels is copied whole.
    """
    kept = classes.kept(dropped).mask
    result = {name: tensor.detach() for name, tensor in tensors.items()}
    for axis in classes.axes:
        key = f"{axis.layer}.{axis.tensor}"
        if key in result:
            places = torch.from_numpy(np.flatnonzero(kept[axis.slots.runs(1)])).to(result[key].device)
            if len(places) < result[key].shape[axis.axis]:
                result[key] = result[key].index_select(axis.axis, places)
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) if tensor.shape == tensors[name].shape else tensor
        for name, tensor in result.items()
    }


def masked_reference(network: Network, classes: Classes, dropped: Collection[int]) -> Network:
    """A copy of the network, of its shape, in which everything that belongs to the `dropped` classes is zero."""
    masked = copy.deepcopy(network)
    _zero(masked, classes, dropped)
    return masked


@contextmanager
def masked_in_place(network: Network, classes: Classes, dropped: Collection[int]) -> Iterator[None]:
    """Make the network its own `masked_reference` for a while; at the end every tensor is as it was, bit for bit.

    What else changes inside, such as statistics that are counted again or weights that are repaired, goes back too.
    """
    own = network.state_dict()
    before = {name: tensor.clone() for name, tensor in own.items()}
    try:
        _zero(network, classes, dropped)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(before[name])


@torch.no_grad()
def _zero(network: Network, classes: Classes, dropped: Collection[int]) -> None:
    kept = classes.kept(dropped).mask
    parameters = dict(network.named_parameters())
    for axis in classes.axes:
        key = f"{axis.layer}.{axis.tensor}"
        # running statistics stay: nothing depends on them after a scale and a bias of zero
        if key in parameters and not kept[axis.slots.ids].all():
            places = torch.from_numpy(np.flatnonzero(~kept[axis.slots.runs(1)])).to(parameters[key].device)
            parameters[key].index_fill_(axis.axis, places, 0.0)


def _random_images(network: Network) -> Tensor:
    parameter = next(network.parameters())
    generator = torch.Generator().manual_seed(0)
    images_NCx = torch.randn(CHECKED_INPUTS, *network.graph.input_shape, generator=generator)
    return images_NCx.to(device=parameter.device, dtype=parameter.dtype)


@torch.no_grad()
def _logits_of(network: Network, images_NCx: Tensor) -> Tensor:
    logits: Tensor = network.eval()(images_NCx)
    return logits


def _check_same_logits(found_NK: Tensor, expected_NK: Tensor) -> None:
    difference = (found_NK - expected_NK).abs().max()
    # Not `<=`: a network that overflows has no difference, and fails where it is evaluated.
    too_large = bool(difference > TOLERANCE * (1 + expected_NK.abs().max()))
    assert not too_large, f"the smaller network differs by {float(difference)}"
