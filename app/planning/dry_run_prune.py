"""What a prune step may name and ask for; what it does is in `dry_run_zeros.py` and `dry_run_channels.py`."""

from __future__ import annotations

from collections.abc import Iterator

from app.errors import Fault
from app.network.blocks import last_layers
from app.planning.dry_run_channels import plan_channels
from app.planning.dry_run_zeros import CHANNEL_FIELDS, plan_zeros
from app.planning.named_layers import exclusion_faults, why_unfit
from app.planning.planned_network import PlannedNetwork, PlannedStep
from app.spec.prune import Prune, PruneOverride, Structure
from app.validation.faults import pointer as pointer_to

_FOREIGN_FIELDS: dict[Structure, tuple[str, ...]] = {  # of overrides
    "weights": (*CHANNEL_FIELDS, "pattern"),
    "blocks": (*CHANNEL_FIELDS, "pattern", "threshold"),
    "n:m": (*CHANNEL_FIELDS, "sparsity", "threshold"),
    "channels": ("threshold", "pattern"),
}


def plan_prune(network: PlannedNetwork, step: Prune, pointer: str) -> PlannedStep:
    """What the step does. Raises InvalidSpec if nothing may be removed, or not as much as is asked for."""
    return (plan_zeros if step.zeros else plan_channels)(network, step, pointer)


def prune_faults(network: PlannedNetwork, step: Prune, pointer: str) -> Iterator[Fault]:
    """Layers that are named and are not there, or not fit; amounts that cannot be meant; a network without weights."""
    if not network.weighted:
        yield Fault(pointer, "the network has no convolution and no linear layer: nothing can be removed")
        return
    yield from exclusion_faults(network.graph, step.exclude, f"{pointer}/exclude", done="pruned")
    last = {network.graph[name].home for name in last_layers(network.graph)}
    for name, override in step.overrides.items():
        at = pointer + pointer_to("overrides", name)
        reason = why_unfit(network.graph, name, done="pruned")
        if reason is None and name in step.exclude:
            reason = f"{name} is excluded: it cannot have an override too"
        if reason is None and step.structure == "channels" and name in last and override.sparsity:
            reason = f"{name} gives the logits: its width is the number of classes and stays"
        if reason:
            yield Fault(at, reason)
        else:
            yield from _override_faults(step, override, at)
    if step.structure == "channels" and step.sparsity is not None and step.sparsity > step.max_sparsity:
        yield _above_most(step.sparsity, step.max_sparsity, pointer)


def _override_faults(step: Prune, override: PruneOverride, at: str) -> Iterator[Fault]:
    for name in _FOREIGN_FIELDS[step.structure]:
        value = getattr(override, name)
        if value is not None:
            yield Fault(f"{at}/{name}", f"has no meaning for structure {step.structure}", value=value)
    most = step.max_sparsity if override.max_sparsity is None else override.max_sparsity
    if step.structure == "channels" and override.sparsity is not None and override.sparsity > most:
        yield _above_most(override.sparsity, most, at)


def _above_most(sparsity: float, most: float, at: str) -> Fault:
    message = f"at most max_sparsity {most} of a group may be removed: raise max_sparsity or lower sparsity"
    return Fault(f"{at}/sparsity", message, limit=most, value=sparsity)
