"""A training in progress as a checkpoint has it: written down, and put back so that it goes on with the same bits.

The network and the masks are the caller's. Order and augmentation follow from seeds; torch's generator, for dropout, is
restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worker.network import snapshot
from worker.training.loop import Best, Fit, Position
from worker.training.optimizers import optimizer_tensors, restore_optimizer


def fit_tensors(fit: Fit) -> dict[str, Tensor]:
    """Every tensor that the fit needs to go on beside the network's and the masks': name -> tensor, not copies."""
    tensors = {f"optimizer/{path}": t for path, t in optimizer_tensors(fit.optimizer, fit.network).items()}
    if fit.average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in fit.average.tensors.items()}
    if fit.best is not None:
        tensors |= {f"best/{name}": tensor for name, tensor in fit.best.tensors.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if fit.precision.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(fit.precision.device)
    return tensors


def fit_state(fit: Fit) -> dict[str, Any]:
    """Everything else that the fit needs to go on, as JSON values."""
    assert not fit.unread_losses, "losses that were not read: call read_losses() first"
    best = fit.best
    return {
        "position": vars(fit.position).copy(),
        "stale_epochs": fit.stale_epochs,
        "mark": fit.mark,
        "best": None if best is None else {"epoch": best.epoch, "accuracy": best.accuracy, "loss": best.loss},
        "optimizer_steps": fit.optimizer.steps,
        "scaler": fit.scaler.state_dict(),
    }


def restore_fit(fit: Fit, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put the fit back to where `fit_tensors` and `fit_state` were taken."""
    fit.position = Position(**state["position"])
    fit.stale_epochs = state["stale_epochs"]
    fit.mark = state["mark"]
    fit.rate = fit.recipe.rate(fit.progress())
    memory = _below("optimizer/", tensors)
    restore_optimizer(fit.optimizer, fit.network, memory, steps=state["optimizer_steps"])
    if fit.average is not None:
        for name, tensor in _below("average/", tensors).items():
            fit.average.tensors[name].copy_(tensor)
    if state["best"] is not None:
        layout = snapshot(fit.network)
        values = {name: layout[name].copy_(tensor) for name, tensor in _below("best/", tensors).items()}
        fit.best = Best(tensors=values, **state["best"])
    if fit.scaler.is_enabled():
        fit.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(tensors["rng/cpu"])
    if fit.precision.device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], fit.precision.device)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
