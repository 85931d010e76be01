"""Whether the layers that an optimization names are there and can be meant, and what to name instead."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice

from app.errors import Fault
from app.network.blocks import WEIGHTED
from app.network.graph import Graph
from app.network.scope import MOST_COMPARED
from app.planning.planned_network import weighted_layers
from app.spec.optimizations import Optimization
from app.validation.faults import pointer as pointer_to

MOST_NAMED = 20  # layers that one message lists


def listed_reasons(reasons: Mapping[str, str], separator: str = ", ", most: int | None = MOST_NAMED) -> str:
    """Layers with why each stays as it is, as words: at most `most` of them (None: all); empty for none."""
    return separator.join(f"{name} ({reason})" for name, reason in islice(reasons.items(), most))


def exclusion_faults(graph: Graph, exclude: Iterable[str], pointer: str, *, done: str) -> Iterator[Fault]:
    """A fault for each name in the list at `pointer` that is no layer which could be `done` ("pruned")."""
    for position, name in enumerate(exclude):
        if reason := why_unfit(graph, name, done=done):
            yield Fault(f"{pointer}/{position}", reason, value=name)


def possible_name_faults(possible: Collection[str], step: Optimization, pointer: str) -> Iterator[Fault]:
    """A fault for each name in `step` of which the trained weights will decide whether a layer has it."""
    for field in ("exclude", "layers", "overrides"):
        for position, name in enumerate(getattr(step, field, None) or ()):
            if name in possible:
                at = pointer + pointer_to(field, name if field == "overrides" else position)
                message = f"whether there will be a layer {name} depends on the trained weights: name the layer it is a part of"
                yield Fault(at, message, value=name)


def why_unfit(graph: Graph, name: str, *, done: str) -> str | None:
    """Why `name` cannot be excluded or overridden where layers are `done` ("pruned"); None if it can."""
    if name not in graph:
        return f"is not the name of a layer; {_advice(graph, name)}"
    node = graph[name]
    if node.type not in WEIGHTED:
        return f"is a {node.type} layer: only convolutions and linear layers are {done}"
    return None if node.shares is None else f"has the weights of {node.shares}, which it shares: name {node.shares}"


def _advice(graph: Graph, name: str) -> str:
    names = [node.name for node in weighted_layers(graph)][:MOST_COMPARED]
    similar = difflib.get_close_matches(name, names, n=1)
    if similar:
        return f"did you mean {similar[0]}?"
    return f"layers are: {', '.join(names[:MOST_NAMED])}" + ", ..." * (len(names) > MOST_NAMED)
