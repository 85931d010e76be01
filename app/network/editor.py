"""A graph that is being rewritten: layers come in, change and get other inputs; `graph()` checks the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from app.network.graph import Graph, Limits, build_graph
from app.network.layers.names import INPUT, LONGEST_NAME, why_refused
from app.network.layers.registry import Layer


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
        # each layer of the old graph with what was put before and behind it: inserting looks at one short list only
        self._places = {node.name: [node.name] for node in graph.nodes}
        self._place_of = {node.name: node.name for node in graph.nodes}
        self.changed = False

    def fresh_name(self, wish: str) -> str:
        """`wish`, or `wish2`, `wish3`, ... : the first that is free and may be a layer's name."""
        stem, number = wish[: LONGEST_NAME - 6], 1
        name = stem
        while name in self._layers or why_refused(name) is not None:
            number += 1
            name = f"{stem}{number}"
        return name

    def update(self, name: str, **fields: Any) -> None:
        """Gives layer `name` other values of some fields."""
        self._layers[name] = self._layers[name].model_copy(update=fields)
        self.changed = True

    def replace_layer(self, name: str, layer: Layer) -> None:
        """Puts another layer, perhaps of another type, in the place of layer `name`."""
        self._layers[name] = layer
        self.changed = True

    def add_behind(self, place: str, layer: Layer, name: str, inputs: Sequence[str]) -> str:
        """The name that `layer` got, near `name`: it stands behind `place` and reads `inputs`; nothing reads it yet."""
        return self._add(place, 1, layer, name, inputs)

    def add_before(self, place: str, layer: Layer, name: str, inputs: Sequence[str]) -> str:
        """As `add_behind`, before layer `place`."""
        return self._add(place, 0, layer, name, inputs)

    def insert_behind(self, name: str, chain: Iterable[tuple[Layer, str]]) -> str:
        """Lays a chain of (layer, name) between `name` and all that read it; the name of the chain's last layer."""
        readers, last = list(self._readers[name]), name
        for layer, wish in chain:
            last = self.add_behind(last, layer, wish, [last])
        for reader in readers:
            self.redirect(reader, name, last)
        return last

    def redirect(self, reader: str, old: str, new: str) -> None:
        """Lets `reader` read `new` wherever it read `old`."""
        self._inputs[reader] = [new if name == old else name for name in self._inputs[reader]]
        self._readers[old].remove(reader)
        if reader not in self._readers[new]:
            self._readers[new].append(reader)
        self.changed = True

    def graph(self, limits: Limits) -> Graph:
        """The graph of the layers as they are now.

        Raises InvalidSpec if they go beyond `limits`.
        """
        layers = [
            self._layers[name].model_copy(update={"name": name, "inputs": tuple(self._inputs[name])})
            for place in self._places.values()
            for name in place
        ]
        return build_graph(layers, self._input_shape, limits=limits)

    def _add(self, place: str, offset: int, layer: Layer, wish: str, inputs: Sequence[str]) -> str:
        name = self.fresh_name(wish)
        home = self._place_of[place]
        self._places[home].insert(self._places[home].index(place) + offset, name)
        self._place_of[name] = home
        self._layers[name] = layer
        self._inputs[name] = list(inputs)
        self._readers[name] = []
        for source in dict.fromkeys(inputs):
            self._readers[source].append(name)
        self.changed = True
        return name
