"""What a file of 8-bit integers will have: which layers stay in float32, and on which processors the file is right."""

from __future__ import annotations

from collections.abc import Iterator

from app.compression.int8 import float_layers, integer_layers
from app.errors import Fault, InvalidSpec
from app.planning.named_layers import exclusion_faults, listed_reasons
from app.planning.planned_network import LayerPlan, PlannedNetwork, PlannedStep
from app.spec.quantize import Quantize


def quantize_faults(network: PlannedNetwork, step: Quantize, pointer: str) -> Iterator[Fault]:
    """A fault for each excluded layer that is not there or could not be quantized."""
    return exclusion_faults(network.graph, step.exclude, f"{pointer}/exclude", done="quantized")


def plan_quantize(network: PlannedNetwork, step: Quantize, pointer: str) -> PlannedStep:
    """A row for each layer that stays in float32. The network, and so its cost, stays as it is.

    Raises InvalidSpec if no layer can be computed in 8 bits.
    """
    left = float_layers(network.graph, step.exclude)
    if not integer_layers(network.graph, step.exclude):
        at = f"{pointer}/exclude" if integer_layers(network.graph) else pointer
        held = listed_reasons(left, "; ") or "none has weights"
        raise InvalidSpec([Fault(at, f"no layer can be computed in 8 bits: {held}")])
    rows = []
    for name, reason in left.items():
        width = network.graph[name].shape[0]
        rows.append(LayerPlan(name, "keep", width, width, True, f"stays in float32: {reason}", pointer))
    return PlannedStep(network, tuple(rows), tuple(_scheme_warnings(step, pointer)))


def _scheme_warnings(step: Quantize, pointer: str) -> Iterator[Fault]:
    if step.scheme == "int8_vnni":
        message = (
            "the 8-bit file will be right only on processors with VNNI or AMX, and on ARM, and be delivered only by "
            "a worker that has one; int8_static is right on every processor"
        )
        yield Fault(f"{pointer}/scheme", message, value=step.scheme)
