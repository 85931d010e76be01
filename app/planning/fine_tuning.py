"""Which layers of a network do not train, and which train at a rate of their own.

A pattern is a layer's name, or a glob of names (`*`, `?`, `[...]`). Patterns are matched once, against the network that
the job trains: after the rewrites, before the first compression. A layer that a compression inserts, or
replaces by another, is new, so it trains, at the rate of all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from fnmatch import translate

from app.errors import Fault
from app.network.blocks import WEIGHTED
from app.network.graph import Graph
from app.network.layers.names import INPUT
from app.network.node import Node
from app.network.scope import MOST_COMPARED
from app.planning.planned_network import LayerPlan
from app.planning.warm_start import WarmStart, listed
from app.spec.job import Training
from app.validation.faults import pointer

FROZEN = "/training/frozen"
RATES = "/training/lr_factors"
MOST_SIMILAR = 3  # names that a message suggests
MOST_MATCHES = 200_000  # of globs with layers' names: a second
MOST_ADVICE = 20  # looking for similar names takes longer than everything else
_WILD = frozenset("*?[")  # what makes a name a glob


def frozen_layers(training: Training, graph: Graph) -> frozenset[str]:
    """Names of the layers of `graph` with parameters that `training` freezes."""
    return frozenset(_first_matches(training.frozen, _trained(graph)))


def rate_factors(training: Training, graph: Graph) -> dict[str, float]:
    """Layer -> factor on the learning rate, for layers of `graph` with another factor than 1; the first match wins."""
    found = _first_matches(tuple(training.lr_factors), _trained(graph))
    factors = {name: training.lr_factors[pattern] for name, pattern in found.items()}
    return {name: factor for name, factor in factors.items() if factor != 1}


def fine_tuning_faults(training: Training, graph: Graph) -> Iterator[Fault]:
    """Patterns that match nothing that could be trained, and a job that would train nothing."""
    names = _trained(graph)
    globs = sum(1 for pattern in (*training.frozen, *training.lr_factors) if set(pattern) & _WILD)
    if globs * len(names) > MOST_MATCHES:
        message = f"{globs} globs are too many for a network with {len(names)} layers that train: state fewer"
        yield Fault(FROZEN if training.frozen else RATES, message, limit=MOST_MATCHES // len(names), value=globs)
        return
    places = [(pattern, f"{FROZEN}/{position}") for position, pattern in enumerate(training.frozen)]
    places += [(pattern, RATES + pointer(pattern)) for pattern in training.lr_factors]
    advised, known = 0, set(names)
    for pattern, place in places:
        form = re.compile(translate(pattern))
        if pattern in known or any(form.match(name) for name in names):
            continue
        yield Fault(place, _why_nothing(form, pattern, graph, advise=advised < MOST_ADVICE), value=pattern[:64])
        advised += 1
    if training.frozen and names and len(frozen_layers(training, graph)) == len(names):
        yield Fault(FROZEN, f"leaves nothing to train: it names every layer with parameters ({len(names)})")


def fine_tuning_warnings(training: Training, graph: Graph, start: WarmStart | None) -> Iterator[Fault]:
    """A warning where frozen layers have weights that were never trained."""
    fresh = {node.name for node in graph.nodes} if start is None else set(start.fresh)
    untrained = sorted(frozen_layers(training, graph) & fresh)
    if untrained:
        yield Fault(FROZEN, f"keeps layers as they are drawn, untrained: {listed(untrained)}")


def frozen_norm_warnings(
    training: Training, graph: Graph, planned: Graph, rows: Sequence[LayerPlan]
) -> Iterator[Fault]:
    """A warning where frozen batch norms keep the statistics of inputs that a compression changes.

    `planned` is the network that is expected after all compressions, `rows` say what these do with each layer. A
    convolution that only becomes narrower gives its batch norm the same channels, fewer of them; one that reads fewer
    channels, or has zeros or a product in its place, gives it others.
    """
    frozen = frozen_layers(training, graph)
    rewritten = {row.layer for row in rows if row.action in ("mask", "replace")}
    changed: dict[str, bool] = {INPUT: False}
    for node in graph.nodes:
        mixes = node.type in WEIGHTED and not _is_depthwise(node)
        fewer = mixes and node.name in planned and planned[node.name].input_shapes != node.input_shapes
        changed[node.name] = node.home in rewritten or fewer or any(changed[name] for name in node.inputs)
    stale = [n.name for n in graph.nodes if n.type == "batch_norm" and n.home in frozen and changed[n.name]]
    if stale:
        yield Fault(
            FROZEN,
            "keeps the statistics of batch norms whose inputs are others after the compression, so that accuracy falls "
            f"further than with statistics counted again: {listed(stale)}",
        )


def _is_depthwise(node: Node) -> bool:
    return bool(getattr(node.layer, "groups", 1) == node.input_shapes[0][0])


def _why_nothing(form: re.Pattern[str], pattern: str, graph: Graph, *, advise: bool) -> str:
    matched = [node for node in graph.nodes if form.match(node.name)]
    if matched:
        sharer = next((node for node in matched if node.shares is not None), None)
        advice = "" if sharer is None else f" of their own: {sharer.name} shares those of {sharer.home}"
        return f"names only layers without parameters{advice}"
    names = _trained(graph)
    similar = (
        difflib.get_close_matches(pattern, names, n=MOST_SIMILAR) if advise and len(names) <= MOST_COMPARED else []
    )
    advice = f"; similar: {', '.join(similar)}" if similar else ""
    return f"matches no layer of the network that is trained{advice}"


def _trained(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.params]


def _first_matches(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Name -> the first pattern that it matches, for names that match one."""
    found: dict[str, str] = {}
    known = set(names)
    for pattern in patterns:
        if not set(pattern) & _WILD:
            found |= {pattern: pattern} if pattern in known and pattern not in found else {}
            continue
        form = re.compile(translate(pattern))
        found |= {name: pattern for name in names if name not in found and form.match(name)}
    return found
