"""What pruning will do that sets weights to zero: how many zeros each layer will have, as far as that is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from app.errors import Fault, InvalidSpec
from app.network.node import Node
from app.planning.named_layers import MOST_NAMED, listed_reasons
from app.planning.planned_network import LayerPlan, PlannedNetwork, PlannedStep
from app.pruning.zeros import LayerZeros, dense_layers, planned_zeros
from app.spec.prune import Prune, Structure
from app.validation.faults import MOST_FAULTS
from app.validation.faults import pointer as pointer_to

CHANNEL_FIELDS = ("max_sparsity", "min_channels", "round_to")
"""Fields of a prune step and of its overrides that mean something for structure channels only."""
_ADVICE: dict[Structure, str] = {  # where no layer, or not the one that is named, can be pruned
    "weights": "",
    "n:m": "; N:M needs a number of inputs that M divides",
    "blocks": "; choose smaller blocks",
}


def plan_zeros(network: PlannedNetwork, step: Prune, pointer: str) -> PlannedStep:
    """The network with the zeros of `step`, and a row for each convolution and linear layer.

    Raises InvalidSpec if no layer can be pruned, or one with an override cannot.
    """
    nodes = [node for node in network.weighted if node.shares is None]
    dense = dense_layers(nodes, step)
    warnings = [*_misfit_warnings(network, nodes, dense, step, pointer), *_unused_fields(step, pointer)]
    found = planned_zeros([node for node in nodes if node.name not in dense], step, network.zeros, network.estimated)
    if found and all(plan.exact and plan.zeros == network.zeros.get(name, 0) for name, plan in found.items()):
        message = "removes nothing: what it would remove is zero already, or less than one weight or block"
        warnings.append(Fault(pointer, message))
    after = replace(
        network,
        zeros={**network.zeros, **{name: plan.zeros for name, plan in found.items() if plan.zeros is not None}},
        estimated=network.estimated | {name for name, plan in found.items() if not plan.exact},
    )
    return PlannedStep(after, tuple(_rows(network, dense, found, pointer)), tuple(warnings))


def _misfit_warnings(
    network: PlannedNetwork, nodes: list[Node], dense: Mapping[str, str], step: Prune, pointer: str
) -> list[Fault]:
    """Warnings where layers of estimated widths cannot be pruned: the widths of the trained network may be others.

    Raises InvalidSpec with the same sentences where widths are known.
    """
    faults = [_misfit(step, name, dense[name], pointer) for name in step.overrides if name in dense]
    if len(dense) == len(nodes):
        faults.append(_nothing_to_prune(step, dense, pointer))
    if faults and (not network.estimates_widths or set(dense.values()) == {"excluded"}):
        raise InvalidSpec(faults[:MOST_FAULTS])
    return [replace(fault, message=f"as estimated, {fault.message}") for fault in faults[:MOST_NAMED]]


def _rows(
    network: PlannedNetwork, dense: Mapping[str, str], found: Mapping[str, LayerZeros], pointer: str
) -> Iterator[LayerPlan]:
    """A row for each layer with weights of its own, then one for each that uses those of another."""
    for node in network.weighted:
        if node.shares is not None:
            continue
        count = node.tensors["weight"].elements
        before = count - network.zeros.get(node.name, 0)
        if node.name in dense:
            exact = node.name not in network.estimated
            yield LayerPlan(node.name, "keep", before, before, exact, dense[node.name], pointer)
        else:
            zeros, exact, reason = found[node.name]
            after = None if zeros is None else count - zeros
            yield LayerPlan(node.name, "mask", before, after, exact, reason, pointer)
    for node in network.weighted:
        if node.shares is not None:
            yield LayerPlan(node.name, "follow", None, None, True, f"uses the weights of {node.shares}", pointer)


def _misfit(step: Prune, name: str, reason: str, pointer: str) -> Fault:
    """What is wrong with an override for a layer that the step leaves as it is."""
    override = step.overrides[name]
    at = pointer + pointer_to("overrides", name)
    if override.pattern is not None:
        at += "/pattern"
    return Fault(at, f"does not fit {name}: {reason}{_ADVICE[step.structure]}", value=override.pattern)


def _nothing_to_prune(step: Prune, dense: Mapping[str, str], pointer: str) -> Fault:
    if set(dense.values()) == {"excluded"}:
        return Fault(f"{pointer}/exclude", "every layer with weights is excluded: nothing is left to prune")
    field = "pattern" if step.structure == "n:m" else "block"
    return Fault(f"{pointer}/{field}", f"no layer can be pruned: {listed_reasons(dense)}{_ADVICE[step.structure]}")


def _unused_fields(step: Prune, pointer: str) -> Iterator[Fault]:
    for name in CHANNEL_FIELDS:
        if getattr(step, name) != Prune.model_fields[name].default:
            yield Fault(f"{pointer}/{name}", f"has no meaning for structure {step.structure}: it is not used")
