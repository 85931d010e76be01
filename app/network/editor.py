"""A graph that is being rewritten: layers are added, changed and get other inputs; `graph()` checks the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from app.network.graph import Graph, build_graph
from app.network.layers.layer import Layer
from app.network.layers.names import INPUT, LONGEST_NAME, why_refused
from app.network.node import Limits

_LONGEST_NUMBER = 6  # digits that a fresh name may get at its end


class GraphEditor:
    """The layers of a graph, all with names and inputs, open to change. Existing names never change."""

    def __init__(self, graph: Graph) -> None:
        self._input_shape = graph.input_shape
        self._layers = {node.name: node.layer for node in graph.nodes}
        self._inputs = {node.name: list(node.inputs) for node in graph.nodes}
        self._readers: dict[str, list[str]] = {INPUT: [], **{node.name: [] for node in graph.nodes}}
        for node in graph.nodes:
            for name in dict.fromkeys(node.inputs):
                self._readers[name].append(node.name)
        # Each layer of the old graph with what was put before and after it: inserting searches one short list only.
        self._runs = {node.name: [node.name] for node in graph.nodes}
        self._run_of = {node.name: node.name for node in graph.nodes}
        self.changed = False

    def fresh_name(self, wanted: str) -> str:
        """`wanted`, or `wanted2`, `wanted3`, ... : the first that is free and may be a layer's name."""
        stem, number = wanted[: LONGEST_NAME - _LONGEST_NUMBER], 1
        name = stem
        while name in self._layers or why_refused(name) is not None:
            number += 1
            name = f"{stem}{number}"
        return name

    def update(self, name: str, **fields: Any) -> None:
        """Give layer `name` other values of some fields."""
        self._layers[name] = self._layers[name].model_copy(update=fields)
        self.changed = True

    def replace_layer(self, name: str, layer: Layer) -> None:
        """Put another layer, perhaps of another type, where layer `name` is; name and inputs stay."""
        self._layers[name] = layer
        self.changed = True

    def add_after(self, place: str, layer: Layer, wanted: str, inputs: Sequence[str]) -> str:
        """Add `layer` after layer `place`; it reads `inputs`, and nothing reads it yet. Its name, near `wanted`."""
        return self._add(place, 1, layer, wanted, inputs)

    def add_before(self, place: str, layer: Layer, wanted: str, inputs: Sequence[str]) -> str:
        """Add `layer` before layer `place`; it reads `inputs`, and nothing reads it yet. Its name, near `wanted`."""
        return self._add(place, 0, layer, wanted, inputs)

    def insert_after(self, name: str, chain: Iterable[tuple[Layer, str]]) -> str:
        """Insert a chain of (layer, name) between `name` and all that read it; the name of the chain's last layer."""
        readers, last = list(self._readers[name]), name
        for layer, wanted in chain:
            last = self.add_after(last, layer, wanted, [last])
        for reader in readers:
            self.redirect(reader, name, last)
        return last

    def redirect(self, reader: str, old: str, new: str) -> None:
        """Let `reader` read `new` wherever it read `old`."""
        self._inputs[reader] = [new if name == old else name for name in self._inputs[reader]]
        self._readers[old].remove(reader)
        if reader not in self._readers[new]:
            self._readers[new].append(reader)
        self.changed = True

    def graph(self, limits: Limits) -> Graph:
        """The graph of the layers as they are now.

        Raises:
            InvalidSpec: they exceed `limits`, or do not fit one another.
        """
        layers = [
            self._layers[name].model_copy(update={"name": name, "inputs": tuple(self._inputs[name])})
            for run in self._runs.values()
            for name in run
        ]
        return build_graph(layers, self._input_shape, limits=limits)

    def _add(self, place: str, offset: int, layer: Layer, wanted: str, inputs: Sequence[str]) -> str:
        name = self.fresh_name(wanted)
        old = self._run_of[place]
        self._runs[old].insert(self._runs[old].index(place) + offset, name)
        self._run_of[name] = old
        self._layers[name] = layer
        self._inputs[name] = list(inputs)
        self._readers[name] = []
        for source in dict.fromkeys(inputs):
            self._readers[source].append(name)
        self.changed = True
        return name
