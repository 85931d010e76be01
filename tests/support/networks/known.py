"""All networks that are known by name: one for each topology, one for each trap, and the presets, narrow and small."""

from __future__ import annotations

from functools import cache

from app.network.graph import Graph
from app.network.presets.registry import PRESETS, preset_layers
from tests.support.jobs.specs import graph_of
from tests.support.networks.topologies import CLASSES, TOPOLOGIES, topology
from tests.support.networks.traps import TRAPS, trap

WIDTH = 0.25
SIZES = {1: (16,), 2: (8, 9), 3: (3, 4, 5)}  # unequal on the axes: mixed-up axes must show
NETWORKS = (*TOPOLOGIES, *TRAPS, *PRESETS)


@cache
def network_named(name: str) -> Graph:
    """The graph of one of `NETWORKS`."""
    if name in TOPOLOGIES:
        return topology(name)
    if name in TRAPS:
        return trap(name)
    preset = PRESETS[name]
    shape = (3, *(max(size, preset.smallest) for size in SIZES[preset.axes[-1]]))
    return graph_of(preset_layers(name, shape, CLASSES, WIDTH), shape, CLASSES)
