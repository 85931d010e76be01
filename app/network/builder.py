"""Layers as they are sent, written out as nodes: names given, inputs found, containers unfolded, shapes computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.errors import Fault
from app.network.graph_faults import GraphFaults
from app.network.layers.activations import Hardsigmoid, ReLU, Sigmoid
from app.network.layers.containers import Repeat, Residual, SqueezeExcite
from app.network.layers.convolutions import Conv
from app.network.layers.joins_and_views import Add, Multiply
from app.network.layers.layer import Layer
from app.network.layers.names import INPUT
from app.network.layers.pooling import GlobalAvgPool
from app.network.layers.shapes import LayerFault, Shape
from app.network.layers.sharing import Shareable
from app.network.node import Limits, Node
from app.network.residual_shortcut import shortcut_layers
from app.network.scope import NameTable, Scope, shared_too_early
from app.network.shared_parameters import disagreements, with_fields_of


class GraphBuilder:
    """Writes layers out as nodes. After a fault it goes on with everything that does not depend on it.

    A node that cannot be built has the shape None; what reads it is not built either, without a fault of its own.
    """

    def __init__(self, input_shape: Shape, limits: Limits) -> None:
        self.nodes: list[Node] = []
        self._limits = limits
        self._faults = GraphFaults()
        self._names = NameTable(self._faults)
        self._shapes: dict[str, Shape | None] = {INPUT: tuple(input_shape)}
        self._built: dict[str, Node] = {}

    @property
    def faults(self) -> list[Fault]:
        """What is wrong, in the order of the layers; one fault per pointer."""
        return self._faults.to_list()

    def write_network(self, layers: Sequence[Layer], pointer: str) -> None:
        """Fill `nodes` and `faults` with those of a network whose layers stand at `pointer`.

        Raises:
            InvalidSpec: there are 100 faults.
        """
        if not layers:
            self._faults.add(pointer, "a network needs at least one layer", limit=1, value=0)
        elif self._count_layers(layers, pointer, 0):
            self._write_list(Scope(layers, prefix="", pointer=pointer, outer=None), INPUT)

    # --- how many layers there will be ---

    def _count_layers(self, layers: Sequence[Layer], pointer: str, depth: int) -> int:
        """How many layers these become, at least, before anything is unfolded; 0 with a fault: too many, too deep."""
        if depth > self._limits.depth:
            message = f"containers can be nested at most {self._limits.depth} deep"
            self._faults.add(pointer, message, limit=self._limits.depth, value=depth)
            return 0
        total = 0
        for position, layer in enumerate(layers):
            count = self._count_layer(layer, f"{pointer}/{position}", depth)
            if count == 0:
                return 0
            total += count
        return self._within_limit(total, pointer, f"written out these are {total} layers")

    def _count_layer(self, layer: Layer, pointer: str, depth: int) -> int:
        if not isinstance(layer, Residual | Repeat):
            return 1
        inner = self._count_layers(layer.layers, f"{pointer}/layers", depth + 1) if layer.layers else 1
        if inner == 0:
            return 0
        if isinstance(layer, Residual):
            return self._within_limit(inner + 1, pointer, f"written out it has {inner + 1} layers")
        count = inner * layer.times
        return self._within_limit(count, f"{pointer}/times", f"written out it has {count} layers")

    def _within_limit(self, count: int, pointer: str, message: str) -> int:
        """`count`, or 0 with a fault when it is more than the limit."""
        limit = self._limits.layers
        if count <= limit:
            return count
        self._faults.add(pointer, f"{message}, the limit is {limit}", limit, count)
        return 0

    # --- layers as they are sent ---

    def _write_list(self, scope: Scope, source: str) -> str:
        """Write out a list of layers whose first reads `source`; the name of the node whose output is the list's."""
        for position, layer in enumerate(scope.layers):
            scope.position = position
            pointer = f"{scope.pointer}/{position}"
            name = scope.prefix + scope.current
            self._names.reserve(name, pointer, layer.name is not None)
            inputs = self._resolve_inputs(layer, scope, pointer, source)
            source = self._write_layer(layer, name, pointer, inputs, scope)
            scope.outputs.setdefault(scope.current, source)
            self._names.set_output(name, source)
        return source

    def _resolve_inputs(self, layer: Layer, scope: Scope, pointer: str, before: str) -> tuple[str, ...] | None:
        """The nodes whose outputs the layer takes, or None with a fault."""
        count = 1 if layer.inputs is None else len(layer.inputs)
        if not layer.least_inputs <= count <= layer.most_inputs:
            wanted = "one input" if layer.most_inputs == 1 else "two or more inputs, named in `inputs`"
            limit = layer.least_inputs if count < layer.least_inputs else layer.most_inputs
            at = pointer if layer.inputs is None else f"{pointer}/inputs"
            self._faults.add(at, f"{layer.type} takes {wanted}, not {count}", limit, count)
            return None
        if layer.inputs is None:
            return (before,)
        found = [self._names.resolve(name, scope, f"{pointer}/inputs/{i}") for i, name in enumerate(layer.inputs)]
        known = tuple(name for name in found if name is not None)
        return known if len(known) == len(found) else None

    def _write_layer(self, layer: Layer, name: str, pointer: str, inputs: tuple[str, ...] | None, scope: Scope) -> str:
        """Write out one layer; the name of the node whose output is the layer's."""
        if not isinstance(layer, Residual | SqueezeExcite | Repeat):
            complete = self._complete_shared(layer, inputs, pointer, scope)
            self._shapes[name] = None
            if complete is not None:
                self._append_node(name, complete, inputs, pointer, layer)
            return name
        if inputs is None:
            return self._give_up(name)
        if isinstance(layer, SqueezeExcite):
            return self._write_squeeze_excite(layer, name, pointer, inputs[0])
        if not layer.layers:
            self._faults.add(f"{pointer}/layers", f"a {layer.type} holds at least one layer", limit=1, value=0)
            return self._give_up(name)
        if isinstance(layer, Repeat):
            return self._write_repeat(layer, name, pointer, inputs[0], scope)
        return self._write_residual(layer, name, pointer, inputs[0], scope)

    def _give_up(self, name: str) -> str:
        """Note that a layer could not be written out; its name."""
        self._shapes[name] = None
        return name

    def _complete_shared(
        self, layer: Layer, inputs: tuple[str, ...] | None, pointer: str, scope: Scope
    ) -> Layer | None:
        """The layer with all fields of the one whose parameters it shares, if any; None with a fault."""
        if not isinstance(layer, Shareable) or layer.shares is None:
            return layer
        at = f"{pointer}/shares"
        if layer.shares == INPUT:
            self._faults.add(at, "the network's input has no parameters: name an earlier layer", value=INPUT)
            return None
        found = self._names.resolve(layer.shares, scope, at, shared_too_early)
        owner = None if found is None else self._built.get(found)
        if owner is None:
            return None
        shape = None if inputs is None else self._shapes[inputs[0]]
        faults = list(disagreements(layer, owner, shape))
        for fault in faults:
            self._faults.add(f"{pointer}/{fault.field}", fault.message, fault.limit, fault.value)
        return None if faults else with_fields_of(owner, layer)

    # --- containers ---

    def _write_repeat(self, layer: Repeat, name: str, pointer: str, source: str, outer: Scope) -> str:
        for turn in range(1, layer.times + 1):
            inner = Scope(layer.layers, prefix=f"{name}_{turn}_", pointer=f"{pointer}/layers", outer=outer)
            source = self._write_list(inner, source)
        return source

    def _write_residual(self, layer: Residual, name: str, pointer: str, source: str, outer: Scope) -> str:
        inner = Scope(layer.layers, prefix=f"{name}_", pointer=f"{pointer}/layers", outer=outer)
        branch = self._write_list(inner, source)
        into, out = self._shapes[source], self._shapes[branch]
        if into is None or out is None:
            return self._give_up(name)
        try:
            steps = shortcut_layers(layer.shortcut, into, out)
        except LayerFault as fault:
            at = f"{pointer}/shortcut" if "shortcut" in layer.model_fields_set else pointer
            self._faults.add(at, fault.message, fault.limit, fault.value)
            return self._give_up(name)
        shortcut = Scope((), prefix=f"{name}_shortcut_", pointer=pointer, outer=None)
        for step in steps:
            source = self._append_own_node(shortcut, step, (source,), pointer, layer)
        return self._append_own_node(inner, Add(), (branch, source), pointer, layer)

    def _write_squeeze_excite(self, layer: SqueezeExcite, name: str, pointer: str, source: str) -> str:
        shape = self._shapes[source]
        if shape is None:
            return self._give_up(name)
        scope = Scope((), prefix=f"{name}_", pointer=pointer, outer=None)
        gate = Sigmoid() if layer.gate == "sigmoid" else Hardsigmoid()
        narrow = Conv(out_channels=min(layer.waist(shape[0]), self._limits.channels), kernel_size=1)
        weights = source
        for step in (GlobalAvgPool(), narrow, ReLU(), Conv(out_channels=shape[0], kernel_size=1), gate):
            weights = self._append_own_node(scope, step, (weights,), pointer, layer)
        return self._append_own_node(scope, Multiply(), (source, weights), pointer, layer)

    # --- nodes ---

    def _append_own_node(self, scope: Scope, layer: Layer, inputs: tuple[str, ...], pointer: str, sent: Layer) -> str:
        """Append a node that a container adds by itself; its name."""
        name = scope.next_name(layer.type)
        self._names.reserve(name, pointer, False)
        self._append_node(name, layer, inputs, pointer, sent)
        self._names.set_output(name, name)
        return name

    def _append_node(self, name: str, layer: Layer, inputs: tuple[str, ...] | None, pointer: str, sent: Layer) -> None:
        """Append one node, or add a fault. `sent` is the layer that stands at `pointer`."""
        shapes = [self._shapes[source] for source in inputs or ()]
        known = tuple(shape for shape in shapes if shape is not None)
        self._shapes[name] = None
        if inputs is None or len(known) < len(inputs):
            return
        try:
            shape = layer.output_shape(known)
        except LayerFault as fault:
            at = f"{pointer}/{fault.field}" if fault.field in sent.model_fields_set else pointer
            self._faults.add(at, fault.message, fault.limit, fault.value)
            return
        if len(shape) > 1 and shape[0] > self._limits.channels:
            message = f"'{name}' has {shape[0]} channels, the limit is {self._limits.channels}"
            self._faults.add(pointer, message, self._limits.channels, shape[0])
            return
        cleared: dict[str, Any] = dict.fromkeys(layer.widths(known), None)
        plain = layer.model_copy(update={"name": None, "inputs": None} | cleared)
        self.nodes.append(Node(name, plain, inputs, known, shape, pointer))
        self._built.setdefault(name, self.nodes[-1])
        self._shapes[name] = shape
