"""What a cut costs after repair, nearly for nothing: the layers that read removed channels are fitted in closed form.

    repair = ConsumerRepair(network, batches, frozen=frozen)       # one forward pass of the network as it is
    ...                                                            # zero some classes of channels in the network
    repair.apply(network, classes, dropped)                        # no forward pass

Where one group of channels alone is cut, what its readers still get is what they got before. With the Gram matrix A of a
reader's inputs, its weights W and the features S that are left, the ridge least squares of `reconstruction.py` is
W' = (A_SS + r)^-1 (A_S. W + r W_S): for loss curves, which try many cuts of one network and repair none for good. Behind a sum
of channels, some of which follow the cut, it is near rather than exact: what the first reader gives is then repaired, not the same.

Axes: those of `normal_equations.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from app.network.blocks import WEIGHTED
from app.network.layers.names import INPUT
from app.network.node import Node
from app.pruning.channel_classes import Classes
from app.pruning.channel_rules import BoolArray
from worker.network import Network, run_step, steps_of
from worker.precision import full_float32
from worker.pruning.eval_mode import eval_mode
from worker.pruning.normal_equations import (
    MOST_FEATURES,
    NormalEquations,
    NoSolution,
    assign_weights,
    choose_positions,
    feature_count,
    mask_of,
    rows_within,
    weights_of,
)

RIDGE = 1e-2
MOST_BYTES = 512 << 20
"""Of all Gram matrices; layers that come later have none."""
MOST_ROWS = 20_000
MOST_PRODUCTS = 10e9
"""Of one layer's Gram matrix, but two rows for each feature: a quarter of a second, at most one."""


class ConsumerRepair:
    """The weights of a network's layers and the Gram matrices of their inputs, as they are before any cut."""

    @torch.no_grad()
    def __init__(
        self, network: Network, batches: Iterable[Tensor], *, frozen: Collection[str] = (), seed: int = 0
    ) -> None:
        """Look at `batches` of images N x C x ... once; the network stays as it is. `frozen` layers are not repaired.

        Nor are those of more than `MOST_FEATURES` inputs of one output: they would take seconds for each cut.
        """
        self._weights: dict[str, Tensor] = {}
        self._equations: dict[str, NormalEquations] = {}
        places = self._choose_layers(network, frozen)
        images = list(batches)
        count = sum(len(images_NCx) for images_NCx in images)
        generator = torch.Generator().manual_seed(seed)
        with eval_mode(network), full_float32():
            for images_NCx in images:
                values = {INPUT: images_NCx}
                for step in steps_of(network):
                    node = network.graph[step.output]
                    if node.name in places:
                        self._add(node, values[node.inputs[0]], count, generator)
                    run_step(network, step, values)

    def _choose_layers(self, network: Network, frozen: Collection[str]) -> set[str]:
        """Make room for every layer that can be repaired; the nodes that use one."""
        places: set[str] = set()
        left = MOST_BYTES
        for node in network.graph.nodes:
            if node.type not in WEIGHTED or node.shares is not None or node.name in frozen:
                continue
            module = network.get_submodule(node.name)
            weights = weights_of(node, module)
            size = 8 * weights.shape[0] * weights.shape[2] ** 2
            if feature_count(node) > MOST_FEATURES or size > left:
                continue
            left -= size
            self._weights[node.name] = weights
            bias = module.bias is not None
            self._equations[node.name] = NormalEquations.of(node, bias=bias, outputs=0, device=weights.device)
            places |= {place.name for place in network.graph.places(node.name)}
        return places

    def _add(self, node: Node, inputs_NCx: Tensor, images: int, generator: torch.Generator) -> None:
        groups, features = self._weights[node.home].shape[0], feature_count(node)
        rows = rows_within(features, groups, most=MOST_ROWS, products=MOST_PRODUCTS)
        positions_NM = choose_positions(node, len(inputs_NCx), max(1, rows // images), generator)
        self._equations[node.home].add_layer(node, inputs_NCx, positions_NM, None)

    @torch.no_grad()
    def apply(
        self, network: Network, classes: Classes, dropped: Collection[int], *, ridge: float = RIDGE
    ) -> tuple[str, ...]:
        """Fit the layers that read channels of the `dropped` classes to what they gave before; the names of these layers.

        `network` has the shape of the one that was looked at, and everything that belongs to the `dropped` classes is
        zero in it and stays zero. Of layers that are fitted, weight and bias change in place, of others nothing.
        `classes` are those of its graph.
        """
        kept = classes.kept(dropped).mask
        readers = [
            axis.layer
            for axis in classes.axes
            if axis.role == "in" and axis.tensor == "weight" and not kept[axis.slots.runs(1)].all()
        ]
        fitted = []
        for name in dict.fromkeys(readers):
            if name in self._weights and self._fit(network, classes, kept, name, ridge):
                fitted.append(name)
        return tuple(fitted)

    def _fit(self, network: Network, classes: Classes, kept: BoolArray, name: str, ridge: float) -> bool:
        node, module = network.graph[name], network.get_submodule(name)
        weight = network.get_parameter(f"{name}.weight")
        alive = torch.ones_like(weight)
        for axis in classes.axes:
            if axis.layer == name and axis.tensor == "weight" and axis.role == "in":
                alive.index_fill_(axis.axis, _removed(kept[axis.slots.runs(1)], weight), 0.0)
        support_GF = mask_of(node, module, alive)[:, 0]
        try:
            assign_weights(node, module, self._solution(name, support_GF, ridge))
        except NoSolution:
            return False
        for axis in classes.axes:
            if axis.layer == name:
                tensor = network.get_parameter(f"{name}.{axis.tensor}")
                tensor.index_fill_(axis.axis, _removed(kept[axis.slots.runs(1)], tensor), 0.0)
        return True

    def _solution(self, name: str, support_GF: Tensor, ridge: float) -> Tensor:
        """G x O x F: what gives the outputs of the whole layer on the features that are left, zero elsewhere."""
        whole_GOF, equations = self._weights[name], self._equations[name]
        start_GOF = whole_GOF * support_GF[:, None]
        gram_GFF = equations.gram
        wanted = NormalEquations(gram_GFF, gram_GFF @ whole_GOF.transpose(1, 2), equations.bias)
        return wanted.solve(start_GOF, ridge=ridge, mask_GOF=support_GF[:, None].expand_as(whole_GOF))


def _removed(kept: BoolArray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(~kept)).to(like.device)
