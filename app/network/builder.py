"""Layers as they are sent, written out as nodes: names given, inputs found, containers unfolded, shapes computed."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from app.errors import Fault, InvalidSpec, JsonValue
from app.network.layers.activations import Hardsigmoid, ReLU, Sigmoid
from app.network.layers.containers import Repeat, Residual, SqueezeExcite
from app.network.layers.convolutions import Conv, Linear
from app.network.layers.joins_and_views import Add, Multiply, Pad
from app.network.layers.layer import Layer
from app.network.layers.names import INPUT, LONGEST_NAME, local_names, why_refused
from app.network.layers.normalization import BatchNorm
from app.network.layers.pooling import GlobalAvgPool, MaxPool
from app.network.layers.shapes import LayerFault, Shape, written
from app.network.layers.sharing import Shareable, as_at, disagreements
from app.network.node import Limits, Node

MOST_FAULTS = 100
_FEW_NAMES = 200  # with more, looking for a similar name takes longer than the rest

_TRACED_CIRCLES = 10  # looking for one goes over all layers
_LONGEST_CIRCLE = 6  # steps of a cycle that a message tells


class Scope:
    """One list of layers: the network's, or a container's. It sees the names of outer lists; the innermost counts."""

    def __init__(self, layers: Sequence[Layer], *, prefix: str, pointer: str, outer: Scope | None) -> None:
        self.layers = layers
        self.prefix = prefix
        self.pointer = pointer
        self.outer = outer
        self.names = local_names((layer.type, layer.name) for layer in layers)
        self.positions: dict[str, int] = {}
        for position, name in enumerate(self.names):
            self.positions.setdefault(name, position)
        self.outputs: dict[str, str] = {}
        """The node whose output a name stands for, once it is there."""
        self.position = 0
        """Of the layer that is being written out."""
        self._unnamed = Counter(layer.type for layer in layers if layer.name is None)

    def added(self, kind: str) -> str:
        """The full name of a layer that the container itself adds: counted on behind the unnamed ones."""
        self._unnamed[kind] += 1
        return f"{self.prefix}{kind}{self._unnamed[kind]}"

    def needs(self, position: int) -> Iterator[int]:
        """The positions of this list whose outputs the layer at `position` takes, as sent."""
        names = list(_references(self.layers[position]))
        if self.layers[position].inputs is None and position:
            yield position - 1
        yield from (self.positions[name] for name in names if name in self.positions)

    def circle(self, start: int, end: int) -> list[str] | None:
        """The names from `start` over what it takes to `end`, or None when `start` does not need `end`."""
        came: dict[int, int | None] = {start: None}
        waiting = [start]
        while waiting:
            position = waiting.pop()
            if position == end:
                path: list[str] = []
                step: int | None = end
                while step is not None:
                    path.append(self.names[step])
                    step = came[step]
                return path[::-1]
            for needed in self.needs(position):
                if needed not in came:
                    came[needed] = position
                    waiting.append(needed)
        return None


def _references(layer: Layer) -> Iterator[str]:
    yield from layer.inputs or ()
    if isinstance(layer, Residual | Repeat):
        for inner in layer.layers:
            yield from _references(inner)


class GraphBuilder:
    """Writes layers out. Goes on behind a fault with everything that does not depend on it."""

    def __init__(self, input_shape: Shape, limits: Limits) -> None:
        self.nodes: list[Node] = []
        self._faults: dict[str, Fault] = {}
        self._limits = limits
        self._shapes: dict[str, Shape | None] = {INPUT: tuple(input_shape)}
        self._outputs: dict[str, str] = {INPUT: INPUT}
        self._nodes: dict[str, Node] = {}
        self._taken: dict[str, tuple[str, bool]] = {}

    @property
    def faults(self) -> list[Fault]:
        """What is wrong, in the order of the layers; one fault per pointer."""
        return list(self._faults.values())

    def run(self, layers: Sequence[Layer], pointer: str) -> None:
        """Fills `nodes` and `faults`.

        Raises:
            InvalidSpec: there are 100 faults.
        """
        if not layers:
            self._fault(pointer, "a network needs at least one layer", limit=1, value=0)
        elif self._countable(layers, pointer, 0):
            self._list(Scope(layers, prefix="", pointer=pointer, outer=None), INPUT)

    def _fault(self, pointer: str, message: str, limit: JsonValue = None, value: JsonValue = None) -> None:
        self._faults.setdefault(pointer, Fault(pointer, message, limit, value))
        if len(self._faults) >= MOST_FAULTS:
            raise InvalidSpec(self.faults)

    def _countable(self, layers: Sequence[Layer], pointer: str, depth: int) -> int:
        """How many layers these become, at least, before anything is unfolded; 0 with a fault: too many, too deep."""
        if depth > self._limits.depth:
            message = f"containers stand in one another at most {self._limits.depth} deep"
            self._fault(pointer, message, limit=self._limits.depth, value=depth)
            return 0
        total = 0
        for position, layer in enumerate(layers):
            here = f"{pointer}/{position}"
            count = 1
            if isinstance(layer, Residual | Repeat):
                inner = self._countable(layer.layers, f"{here}/layers", depth + 1) if layer.layers else 1
                if inner == 0:
                    return 0
                count = inner * layer.times if isinstance(layer, Repeat) else inner + 1
                if count > self._limits.layers:
                    message = f"written out it has {count} layers, the limit is {self._limits.layers}"
                    field = "/times" if isinstance(layer, Repeat) else ""
                    self._fault(here + field, message, limit=self._limits.layers, value=count)
                    return 0
            total += count
        if total > self._limits.layers:
            self._fault(
                pointer,
                f"written out these are {total} layers, the limit is {self._limits.layers}",
                self._limits.layers,
                total,
            )
            return 0
        return total

    def _list(self, scope: Scope, source: str) -> str:
        """Writes out a list of layers; the name of the node whose output is the list's."""
        for position, layer in enumerate(scope.layers):
            scope.position = position
            pointer = f"{scope.pointer}/{position}"
            name = scope.prefix + scope.names[position]
            self._take(name, pointer, layer.name is not None)
            source = self._layer(layer, name, pointer, self._inputs(layer, scope, pointer, source), scope)
            scope.outputs.setdefault(scope.names[position], source)
            self._outputs.setdefault(name, source)
        return source

    def _layer(self, layer: Layer, name: str, pointer: str, inputs: tuple[str, ...] | None, scope: Scope) -> str:
        if not isinstance(layer, Residual | SqueezeExcite | Repeat):
            complete = self._with_shared(layer, inputs, pointer, scope)
            self._shapes[name] = None
            if complete is not None:
                self._node(name, complete, inputs, pointer, layer)
            return name
        if inputs is None:
            self._shapes[name] = None
            return name
        if isinstance(layer, SqueezeExcite):
            return self._squeeze_excite(layer, name, pointer, inputs[0])
        if not layer.layers:
            self._fault(f"{pointer}/layers", f"a {layer.type} holds at least one layer", limit=1, value=0)
            self._shapes[name] = None
            return name
        if isinstance(layer, Repeat):
            source = inputs[0]
            for turn in range(1, layer.times + 1):
                inner = Scope(layer.layers, prefix=f"{name}_{turn}_", pointer=f"{pointer}/layers", outer=scope)
                source = self._list(inner, source)
            return source
        return self._residual(layer, name, pointer, inputs[0], scope)

    def _take(self, name: str, pointer: str, named: bool) -> None:
        """Notes that a full name is used, with a fault when it cannot be."""
        reason = why_refused(name)
        if reason is not None and len(name) > LONGEST_NAME:
            self._fault(
                pointer, f"its full name, with the containers', has {len(name)} characters", LONGEST_NAME, len(name)
            )
        elif reason is not None:
            self._fault(f"{pointer}/name" if named else pointer, reason + ": choose another")
        if name not in self._taken:
            self._taken[name] = (pointer, named)
            return
        other, other_named = self._taken[name]
        if not named and other_named:
            other, pointer, named = pointer, other, True
        self._fault(
            f"{pointer}/name" if named else pointer,
            f"'{name}' is also the name of the layer at {other}: choose another",
        )

    def _inputs(self, layer: Layer, scope: Scope, pointer: str, before: str) -> tuple[str, ...] | None:
        """The nodes whose outputs the layer takes, or None with a fault."""
        count = 1 if layer.inputs is None else len(layer.inputs)
        if not layer.least_inputs <= count <= layer.most_inputs:
            wanted = "one input" if layer.most_inputs == 1 else "two or more inputs, named in `inputs`"
            message = f"{layer.type} takes {wanted}, not {count}"
            limit = layer.least_inputs if count < layer.least_inputs else layer.most_inputs
            self._fault(pointer if layer.inputs is None else f"{pointer}/inputs", message, limit, count)
            return None
        if layer.inputs is None:
            return (before,)
        found = [self._find(name, scope, f"{pointer}/inputs/{i}") for i, name in enumerate(layer.inputs)]
        known = tuple(name for name in found if name is not None)
        return known if len(known) == len(found) else None

    def _with_shared(self, layer: Layer, inputs: tuple[str, ...] | None, pointer: str, scope: Scope) -> Layer | None:
        """The layer with all fields of the one whose parameters it shares, if any; None with a fault."""
        if not isinstance(layer, Shareable) or layer.shares is None:
            return layer
        at = f"{pointer}/shares"
        if layer.shares == INPUT:
            self._fault(at, "the network's input has no parameters: name an earlier layer", value=INPUT)
            return None
        found = self._find(layer.shares, scope, at, _shared_too_early)
        owner = None if found is None else self._nodes.get(found)
        if owner is None:
            return None
        shape = None if inputs is None else self._shapes[inputs[0]]
        faults = list(disagreements(layer, owner, shape))
        for fault in faults:
            self._fault(f"{pointer}/{fault.field}", fault.message, fault.limit, fault.value)
        return None if faults else as_at(layer, owner)

    def _find(
        self,
        name: str,
        scope: Scope,
        pointer: str,
        not_yet: Callable[[str, Scope, Scope], str] | None = None,
    ) -> str | None:
        """The node that `name` stands for where a layer of `scope` takes it, or None with a fault.

        `not_yet` words it where the name is there, but not before the layer.
        """
        here: Scope | None = scope
        while here is not None:
            if name in here.outputs:
                return here.outputs[name]
            if name in here.positions:
                self._fault(pointer, (not_yet or self._not_yet)(name, here, scope))
                return None
            here = here.outer
        if name in self._outputs:
            return self._outputs[name]
        known = list(scope.positions) + list(self._outputs)
        near = difflib.get_close_matches(name, known, n=1) if len(known) <= _FEW_NAMES else []
        self._fault(pointer, f"there is no layer '{name}' before it" + (f": did you mean '{near[0]}'?" if near else ""))
        return None

    def _not_yet(self, name: str, holder: Scope, scope: Scope) -> str:
        """Why a name that `holder` has cannot be taken yet."""
        position = holder.position
        if holder.positions[name] == position:
            if holder is scope:
                return f"cycle: '{name}' takes its own output"
            return f"cycle: '{scope.prefix}{scope.names[scope.position]}' is inside '{name}' and takes its output"
        few = len(self._faults) < _TRACED_CIRCLES
        circle = holder.circle(holder.positions[name], position) if few else None
        if circle is not None:
            around = pairwise([holder.names[position], *circle])
            steps = [f"'{taker}' takes '{taken}'" for taker, taken in around]
            if len(steps) > _LONGEST_CIRCLE:
                steps = [*steps[: _LONGEST_CIRCLE - 1], "...", steps[-1]]
            return "cycle: " + ", ".join(steps)
        return f"'{name}' comes later: a layer takes the outputs of layers that stand before it"

    def _node(self, name: str, layer: Layer, inputs: tuple[str, ...] | None, pointer: str, sent: Layer) -> Shape | None:
        """Appends one node; its shape, or None with a fault. `sent` is the layer that stands at `pointer`."""
        shapes = [self._shapes[source] for source in inputs or ()]
        known = tuple(shape for shape in shapes if shape is not None)
        self._shapes[name] = None
        if inputs is None or len(known) < len(inputs):
            return None
        try:
            shape = layer.output_shape(known)
        except LayerFault as fault:
            at = f"{pointer}/{fault.field}" if fault.field in sent.model_fields_set else pointer
            self._fault(at, fault.message, fault.limit, fault.value)
            return None
        if len(shape) > 1 and shape[0] > self._limits.channels:
            message = f"'{name}' has {shape[0]} channels, the limit is {self._limits.channels}"
            self._fault(pointer, message, self._limits.channels, shape[0])
            return None
        cleared: dict[str, Any] = dict.fromkeys(layer.widths(known), None)
        plain = layer.model_copy(update={"name": None, "inputs": None} | cleared)
        self.nodes.append(Node(name, plain, inputs, known, shape, pointer))
        self._nodes.setdefault(name, self.nodes[-1])
        self._shapes[name] = shape
        return shape

    def _own(self, scope: Scope, layer: Layer, inputs: tuple[str, ...], pointer: str, sent: Layer) -> str:
        """Appends a node that a container adds by itself; its name."""
        name = scope.added(layer.type)
        self._take(name, pointer, False)
        self._node(name, layer, inputs, pointer, sent)
        self._outputs.setdefault(name, name)
        return name

    def _residual(self, layer: Residual, name: str, pointer: str, source: str, outer: Scope) -> str:
        inner = Scope(layer.layers, prefix=f"{name}_", pointer=f"{pointer}/layers", outer=outer)
        branch = self._list(inner, source)
        into, out = self._shapes[source], self._shapes[branch]
        if into is None or out is None:
            self._shapes[name] = None
            return name
        try:
            steps = shortcut_layers(layer.shortcut, into, out)
        except LayerFault as fault:
            at = f"{pointer}/shortcut" if "shortcut" in layer.model_fields_set else pointer
            self._fault(at, fault.message, fault.limit, fault.value)
            self._shapes[name] = None
            return name
        way = Scope((), prefix=f"{name}_shortcut_", pointer=pointer, outer=None)
        for step in steps:
            source = self._own(way, step, (source,), pointer, layer)
        return self._own(inner, Add(), (branch, source), pointer, layer)

    def _squeeze_excite(self, layer: SqueezeExcite, name: str, pointer: str, source: str) -> str:
        shape = self._shapes[source]
        if shape is None:
            self._shapes[name] = None
            return name
        scope = Scope((), prefix=f"{name}_", pointer=pointer, outer=None)
        gate = Sigmoid() if layer.gate == "sigmoid" else Hardsigmoid()
        narrow = Conv(out_channels=min(layer.waist(shape[0]), self._limits.channels), kernel_size=1)
        weights = source
        for step in (GlobalAvgPool(), narrow, ReLU(), Conv(out_channels=shape[0], kernel_size=1), gate):
            weights = self._own(scope, step, (weights,), pointer, layer)
        return self._own(scope, Multiply(), (source, weights), pointer, layer)


def _shared_too_early(name: str, holder: Scope, scope: Scope) -> str:
    """Why the parameters of a layer that `holder` has cannot be shared yet."""
    if holder is scope and holder.positions[name] == holder.position:
        return f"'{name}' cannot share its own parameters: name an earlier layer"
    return f"'{name}' comes later: a layer shares the parameters of a layer that stands before it"


def shortcut_layers(kind: str, into: Shape, out: Shape) -> list[Layer]:
    """The layers that bring a residual's input of shape `into` to the shape `out` of its branch; none is the identity.

    Raises:
        LayerFault: this kind of shortcut cannot.
    """
    if into == out and kind != "projection":
        return []
    both = f"the branch gives {written(out)}, the input is {written(into)}"
    numbers: dict[str, Any] = {"limit": list(into), "value": list(out)}
    if kind == "identity":
        raise LayerFault("shortcut", f'{both}: "identity" needs equal shapes, use "projection" or "pad"', **numbers)
    if len(into) != len(out):
        raise LayerFault("shortcut", f"{both}: no shortcut changes the number of axes", **numbers)
    strides = [_stride(before, after) for before, after in zip(into[1:], out[1:], strict=True)]
    if None in strides:
        raise LayerFault("shortcut", f"{both}: no stride of a 1x1 window leads from one size to the other", **numbers)
    steps = tuple(stride for stride in strides if stride is not None)
    stride = steps[0] if len(set(steps)) == 1 else steps
    if kind != "pad":
        wide = (
            Conv(out_channels=out[0], kernel_size=1, stride=stride, bias=False)
            if steps
            else Linear(out_features=out[0], bias=False)
        )
        return [wide, BatchNorm()]
    if out[0] < into[0]:
        raise LayerFault("shortcut", f'{both}: "pad" can only add channels, use "projection"', **numbers)
    layers: list[Layer] = []
    if any(step > 1 for step in steps):
        layers.append(MaxPool(kernel_size=1, stride=stride))
    if out[0] > into[0]:
        front = (out[0] - into[0]) // 2
        layers.append(Pad(padding=(0, 0) * len(steps) + (front, out[0] - into[0] - front)))
    return layers


def _stride(before: int, after: int) -> int | None:
    """The smallest stride with which a window of one position makes `after` positions of `before`, or None."""
    stride = (before - 1) // after + 1
    return stride if after <= before and (before - 1) // stride + 1 == after else None
