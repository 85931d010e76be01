"""Everything that a job has reached: what a checkpoint holds, and how it is read back.

    network/<key>              the network as it is
    masks/<parameter>          bool
    kept/<what>/<key>          weights that later phases need: "baseline" (the trained dense network), "rewind/<epoch>"
    fit/optimizer/... fit/average/... fit/best/... fit/rng/...       the training in progress

and as JSON: phase (`stage`), step, the network's graph, the report so far, the position in the training. Random
numbers are derived from seeds (order, augmentation) or restored (torch's generator, for dropout); neither Python's nor
numpy's generator is used. A job that goes on from a checkpoint on the same kind of CPU with the same threads ends with
the same bits.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from app.errors import EspalierError
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.network.node import Limits
from app.planning.plan import Plan
from worker.checkpoint import Arrays, CheckpointRefused, LoadedCheckpoint, read_checkpoint
from worker.journal import Journal
from worker.network import Network, assign_tensors, build_network
from worker.precision import Precision
from worker.run.record import RunRecord
from worker.run.references import put_weights, start_notes
from worker.training.loop import Fit
from worker.training.masks import Masks
from worker.training.resume import fit_state, fit_tensors


@dataclass
class Suspended:
    """A training in progress as a checkpoint has it: for the stage that goes on with it."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


@dataclass
class Reached:
    """Where a job stands: before phase `stage`, or in its training `fit`. `passed` are the steps of finished phases."""

    network: Network
    record: RunRecord
    stage: int = 0
    passed: int = 0
    masks: Masks | None = None
    micro_batches: int = 1
    choice_parts: int = 1
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fit: Fit | None = None
    suspended: Suspended | None = None
    differs: str | None = None

    @property
    def step(self) -> int:
        """Optimizer steps, finished phases, rows and cuts: rises with everything that is worth a checkpoint."""
        return self.passed + (0 if self.fit is None else self.fit.position.step)

    def finish_stage(self) -> None:
        """Go on to the next phase; a training's masks stay."""
        self.passed = self.step + 1
        if self.fit is not None:
            self.masks = self.fit.masks
        self.fit = None
        self.record.curves.clear()
        self.stage += 1

    def capture(self) -> tuple[Arrays, dict[str, Any]]:
        """Copies of all tensors, on the host, and the JSON beside them. The fit's losses have been read."""
        tensors = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        for what, weights in self.kept.items():
            tensors |= {f"kept/{what}/{name}": tensor for name, tensor in weights.items()}
        masks = self.fit.masks if self.fit is not None else self.masks
        if masks is not None:
            tensors |= {f"masks/{name}": mask for name, mask in masks.state().items()}
        if self.fit is not None:
            tensors |= {f"fit/{name}": tensor for name, tensor in fit_tensors(self.fit).items()}
        state = {
            "stage": self.stage,
            "passed": self.passed,
            "step": self.step,
            "micro_batches": self.micro_batches,
            "choice_parts": self.choice_parts,
            "input_shape": list(self.network.graph.input_shape),
            "layers": self.network.graph.to_layers(),
            "ledger": self.record.document(),
            "fit": None if self.fit is None else fit_state(self.fit),
            "environment": environment(),
        }
        return {name: _on_host(tensor) for name, tensor in tensors.items()}, state


@dataclass(frozen=True)
class Origin:
    """What a job can always begin again from: its plan, the networks that it names, and which checkpoints are its own."""

    plan: Plan
    sources: Path | None
    precision: Precision
    spec_sha256: str
    data_sha256: str

    def start(self, *, micro_batches: int = 1, choice_parts: int = 1) -> Reached:
        """Before the first step: new weights from the job's seed, or those of its source where it has one."""
        network = build_network(self.plan.baseline, seed=self.plan.spec.training.seed)
        record, start = RunRecord(), self.plan.start
        if start is not None:
            put_weights(network, start.reference, self.sources, fresh=start.fresh)
            for sentence in start_notes(start, network):
                record.note(sentence)
        self.precision.to_device(network)
        return Reached(network, record, micro_batches=micro_batches, choice_parts=choice_parts)

    def resume(
        self, folder: Path | None, journal: Journal, *, micro_batches: int = 1, choice_parts: int = 1
    ) -> Reached:
        """What the checkpoint in `folder` holds; the start if there is none or, with an event, if it is refused.

        `micro_batches` and `choice_parts`: batches are cut so at least (see `Job`).
        """
        if folder is None:
            return self.start(micro_batches=micro_batches, choice_parts=choice_parts)
        try:
            checkpoint = read_checkpoint(folder, spec_sha256=self.spec_sha256)
            if checkpoint.state.get("data_sha256") != self.data_sha256:
                raise CheckpointRefused("the checkpoint was made from other data")
            reached = restore(checkpoint, self.precision)
        except CheckpointRefused as refused:
            message = f"{refused.message}: the job starts from the beginning"
            journal.event("checkpoint.corrupt", message, level="warn", code=refused.code)
            return self.start(micro_batches=micro_batches, choice_parts=choice_parts)
        reached.micro_batches = max(reached.micro_batches, micro_batches)
        reached.choice_parts = max(reached.choice_parts, choice_parts)
        if reached.differs is not None:
            message = f"this is not the machine of the last attempt ({reached.differs}): the bits will differ"
            journal.event("warning", message, level="warn")
        return reached


def restore(checkpoint: LoadedCheckpoint, precision: Precision) -> Reached:
    """The state that `capture` wrote, on the device; its training is `suspended` until its phase goes on with it.

    Raises:
        CheckpointRefused: a graph that cannot be built, or a tensor whose name, shape or type is not the graph's.
    """
    state = checkpoint.state
    tensors = {name: torch.from_numpy(array) for name, array in checkpoint.arrays.items()}
    try:
        graph = build_graph(read_layers(state["layers"]), tuple(state["input_shape"]), limits=Limits.none())
        network = _network(graph, _below("network/", tensors), precision)
        kept: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _below("kept/", tensors).items():
            what, _, key = name.rpartition("/")
            kept.setdefault(what, {})[key] = tensor.to(precision.device)
        masks = _below("masks/", tensors)
        fit = state["fit"]
        return Reached(
            network=network,
            record=RunRecord.from_document(state["ledger"]),
            stage=state["stage"],
            passed=state["passed"],
            masks=place_masks(masks, network) if masks else None,
            micro_batches=state["micro_batches"],
            choice_parts=state.get("choice_parts", 1),  # checkpoints before 2026-11-25 have none
            kept=kept,
            suspended=None if fit is None else Suspended(_below("fit/", tensors), fit),
            differs=_what_differs(state["environment"]),
        )
    except torch.OutOfMemoryError:
        raise
    except (EspalierError, ValidationError, KeyError, TypeError, RuntimeError) as exc:
        raise CheckpointRefused(f"the checkpoint does not describe a network: {exc}") from exc


def place_masks(masks: Mapping[str, Tensor], network: Network) -> Masks:
    """Masks in the layout of the parameters that they belong to: other layouts give the same bits, slower."""
    parameters = dict(network.named_parameters())
    placed = {}
    for name, mask in masks.items():
        if parameters[name].shape != mask.shape:
            raise RuntimeError(f"the mask of {name} has shape {tuple(mask.shape)}, not {tuple(parameters[name].shape)}")
        placed[name] = torch.empty_like(parameters[name], dtype=torch.float32, requires_grad=False).copy_(mask)
    return Masks(placed)


def environment() -> dict[str, Any]:
    """What the bits of a training depend on besides the job: versions, threads, the processor's instructions."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def _what_differs(written: Mapping[str, Any]) -> str | None:
    here = environment()
    parts = [f"{name} {written.get(name)} -> {value}" for name, value in here.items() if written.get(name) != value]
    return ", ".join(parts) or None


def _network(graph: Graph, tensors: Mapping[str, Tensor], precision: Precision) -> Network:
    network = build_network(graph)
    own = network.state_dict()
    if foreign := own.keys() ^ tensors.keys():
        raise KeyError(f"tensors that are only on one side: {', '.join(sorted(foreign))}")
    if wrong := [name for name, tensor in tensors.items() if own[name].dtype != tensor.dtype]:
        raise RuntimeError(f"{wrong[0]} has type {tensors[wrong[0]].dtype}, not {own[wrong[0]].dtype}")
    assign_tensors(network, {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()})
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            own[name].copy_(tensor)
    precision.to_device(network)
    return network


def _on_host(tensor: Tensor) -> NDArray[Any]:
    return np.array(tensor.detach().cpu().numpy(), order="C", copy=True)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
