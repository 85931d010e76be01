"""One list of layers while a graph is built, and which names a layer of it may use."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from app.network.graph_faults import GraphFaults
from app.network.layers.containers import Repeat, Residual
from app.network.layers.layer import Layer
from app.network.layers.names import INPUT, LONGEST_NAME, local_names, why_refused

MOST_COMPARED = 200  # with more names, looking for a similar one takes longer than everything else

_MOST_TRACED = 10  # cycles whose steps a message names: looking for one visits all layers
_LONGEST_CYCLE = 6  # steps of a cycle that a message names


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
        """The node whose output a name stands for, once that node is built."""
        self.position = 0
        """Of the layer that is being written out."""
        self._unnamed = Counter(layer.type for layer in layers if layer.name is None)

    @property
    def current(self) -> str:
        """The name, in this list, of the layer that is being written out."""
        return self.names[self.position]

    def next_name(self, kind: str) -> str:
        """A full name for a layer of this type that the container itself adds: counted on after the unnamed ones."""
        self._unnamed[kind] += 1
        return f"{self.prefix}{kind}{self._unnamed[kind]}"

    def positions_read(self, position: int) -> Iterator[int]:
        """The positions of this list whose outputs the layer at `position` takes, as sent."""
        names = list(_references(self.layers[position]))
        if self.layers[position].inputs is None and position:
            yield position - 1
        yield from (self.positions[name] for name in names if name in self.positions)

    def path(self, start: int, end: int) -> list[str] | None:
        """The names from `start` over what it takes to `end`, or None when `start` does not need `end`."""
        came: dict[int, int | None] = {start: None}
        waiting = [start]
        while waiting:
            position = waiting.pop()
            if position == end:
                return self._names_back(came, end)
            for needed in self.positions_read(position):
                if needed not in came:
                    came[needed] = position
                    waiting.append(needed)
        return None

    def _names_back(self, came: dict[int, int | None], end: int) -> list[str]:
        names: list[str] = []
        step: int | None = end
        while step is not None:
            names.append(self.names[step])
            step = came[step]
        return names[::-1]


def _references(layer: Layer) -> Iterator[str]:
    yield from layer.inputs or ()
    if isinstance(layer, Residual | Repeat):
        for inner in layer.layers:
            yield from _references(inner)


WhyNotYet = Callable[[str, Scope, Scope], str]
"""Why the layer of a name, which the first scope has, cannot be used yet by the present layer of the second."""


class NameTable:
    """The full names of a network so far, and the nodes that they stand for."""

    def __init__(self, faults: GraphFaults) -> None:
        self._faults = faults
        self._outputs: dict[str, str] = {INPUT: INPUT}
        self._reserved: dict[str, tuple[str, bool]] = {}

    def set_output(self, name: str, node: str) -> None:
        """Let `name` stand for the output of `node`, unless it stands for another one already."""
        self._outputs.setdefault(name, node)

    def reserve(self, name: str, pointer: str, named: bool) -> None:
        """Note that the layer at `pointer` has this full name, with a fault when it cannot have it.

        `named`: the user gave it the name.
        """
        self._check(name, pointer, named)
        if name not in self._reserved:
            self._reserved[name] = (pointer, named)
            return
        other, other_named = self._reserved[name]
        if not named and other_named:
            other, pointer, named = pointer, other, True
        at = f"{pointer}/name" if named else pointer
        self._faults.add(at, f"'{name}' is also the name of the layer at {other}: choose another")

    def _check(self, name: str, pointer: str, named: bool) -> None:
        reason = why_refused(name)
        if reason is None:
            return
        if len(name) > LONGEST_NAME:
            message = f"its full name, with those of its containers, has {len(name)} characters"
            self._faults.add(pointer, message, LONGEST_NAME, len(name))
        else:
            self._faults.add(f"{pointer}/name" if named else pointer, reason + ": choose another")

    def resolve(self, name: str, scope: Scope, pointer: str, why_not_yet: WhyNotYet | None = None) -> str | None:
        """The node that `name` stands for where the present layer of `scope` uses it, or None with a fault.

        `why_not_yet` words the fault where there is a layer of this name, but not before that layer.
        """
        here: Scope | None = scope
        while here is not None:
            if name in here.outputs:
                return here.outputs[name]
            if name in here.positions:
                self._faults.add(pointer, (why_not_yet or self._input_too_early)(name, here, scope))
                return None
            here = here.outer
        if name in self._outputs:
            return self._outputs[name]
        known = list(scope.positions) + list(self._outputs)
        near = difflib.get_close_matches(name, known, n=1) if len(known) <= MOST_COMPARED else []
        guess = f": did you mean '{near[0]}'?" if near else ""
        self._faults.add(pointer, f"there is no layer '{name}' before it{guess}")
        return None

    def _input_too_early(self, name: str, holder: Scope, scope: Scope) -> str:
        """Why the output of a layer that `holder` has cannot be taken yet."""
        if holder.positions[name] == holder.position:
            if holder is scope:
                return f"cycle: '{name}' takes its own output"
            return f"cycle: '{scope.prefix}{scope.current}' is inside '{name}' and takes its output"
        traced = len(self._faults) < _MOST_TRACED
        path = holder.path(holder.positions[name], holder.position) if traced else None
        if path is None:
            return f"'{name}' comes later: a layer takes the outputs of layers before it"
        steps = [f"'{taker}' takes '{taken}'" for taker, taken in pairwise([holder.current, *path])]
        if len(steps) > _LONGEST_CYCLE:
            steps = [*steps[: _LONGEST_CYCLE - 1], "...", steps[-1]]
        return "cycle: " + ", ".join(steps)


def shared_too_early(name: str, holder: Scope, scope: Scope) -> str:
    """Why the parameters of a layer that `holder` has cannot be shared yet."""
    if holder is scope and holder.positions[name] == holder.position:
        return f"'{name}' cannot share its own parameters: name an earlier layer"
    return f"'{name}' comes later: a layer shares the parameters of a layer before it"
