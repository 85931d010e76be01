"""What a run does for each optimization, and what the report says about it: a handler for each, found in `HANDLERS`.

A handler of a rewrite or of a term of the training only reports: the plan has rewritten the graph, and trainings read
their terms from the job. Handlers of compressions also remove.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from app.network.cost import cost
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.network.node import Limits
from app.spec.low_rank import LowRank, Separable
from app.spec.optimizations import (
    Compression,
    Deeper,
    Distill,
    InsertBatchNorm,
    InsertDropout,
    InsertShortcuts,
    InsertSpatialDropout,
    Regularization,
    SmallKernels,
)
from app.spec.prune import Prune
from app.spec.quantize import Quantize
from worker.compression.low_rank import loss_note, replace_trained_layers, replaced_rows
from worker.pruning.schedules import PruningRound, rewind_epoch
from worker.run.job import Job
from worker.run.record import StepRecord
from worker.run.removal import Removed, cut_channels, cut_weights, layer_rows
from worker.run.report import Measures, Row, measures_of_cost


@dataclass(frozen=True)
class Ending:
    """What is known after all stages: measures of the delivered network, and the row of the 8-bit file if one was asked
    for."""

    final: Measures
    int8_row: Row | None


class OptimizationHandler(ABC):
    """What a run does for one kind of optimization."""

    @abstractmethod
    def row(self, job: Job, position: int, ending: Ending) -> Row:
        """The entry in the report's `steps` for the optimization at `position`, without the optimization itself."""


class RewriteHandler(OptimizationHandler):
    """A rewrite: the plan has carried it out; its row has the cost before and after, and the layers that it brought."""

    def row(self, job: Job, position: int, ending: Ending) -> Row:
        """Costs, and the layers that were inserted or changed."""
        before, after = job.plan.graphs[position : position + 2]
        return _cost_row(before, after) | {"layers": changed_layers(before, after)}


class TrainingTermHandler(OptimizationHandler):
    """A term of the trainings: they read it from the job; the network stays as it is."""

    def row(self, job: Job, position: int, ending: Ending) -> Row:
        """The cost, which is the same before and after."""
        before, after = job.plan.graphs[position : position + 2]
        return _cost_row(before, after)


class Int8Handler(OptimizationHandler):
    """The 8-bit file, which is made after all stages (`int8.py`)."""

    def row(self, job: Job, position: int, ending: Ending) -> Row:
        """What the file gave."""
        assert ending.int8_row is not None, "an 8-bit file that was asked for has a row, delivered or not"
        return ending.int8_row


class CompressionHandler(OptimizationHandler):
    """A compression of the trained network, in one or more rounds of removal and retraining."""

    @abstractmethod
    def title(self, step: Any) -> str:
        """What the run is doing, such as "pruning channels"."""

    @abstractmethod
    def planned(self, step: Any) -> tuple[str, dict[str, str]]:
        """The sentence and the data of the event before a removal."""

    @abstractmethod
    def done(self, step: Any) -> str:
        """The beginning of the sentence after a removal."""

    @abstractmethod
    def remove(self, job: Job, step: Any, removal: PruningRound, record: StepRecord) -> Removed | None:
        """Remove what this round removes: weights, channels or ranks. The job's network or masks are others then.

        What it gives back says how to repair the network; None: the step does not ask for it.
        """

    @abstractmethod
    def layers(self, job: Job, step: Any, record: StepRecord) -> list[Row]:
        """The report's rows of layers; notes of the report are added."""

    def row(self, job: Job, position: int, ending: Ending) -> Row:
        """What its record says; of a step that was not reached, that it was not applied."""
        records = {record.position: record for record in job.reached.record.steps}
        if position not in records:
            unchanged = {"before": ending.final, "after": ending.final, "layers": [], "seconds": 0.0}
            return {"applied": False, **unchanged}
        record = records[position]
        return {
            "before": record.before,
            "after": record.after,
            "layers": record.layers,
            "seconds": round(record.seconds, 3),
            "after_cut": _last(record.rounds, "after_cut"),
            "after_recalibration": _last(record.rounds, "after_recalibration"),
            "rounds": record.rounds,
            "complete": record.complete,
            **({} if record.met is None else {"met": record.met}),
        }


class PruneHandler(CompressionHandler):
    """Pruning: weights are set to zero, or channels removed."""

    def title(self, step: Prune) -> str:
        """Pruning, and of what."""
        return f"pruning {step.structure}"

    def planned(self, step: Prune) -> tuple[str, dict[str, str]]:
        """Structure, criterion and scope."""
        named = [name for name in ("threshold", "budget", "sparsity") if getattr(step, name) is not None]
        target = named[0] if named else "pattern"
        message = f"{step.structure} by {step.criterion}, scope {step.scope}, to the {target} asked for"
        return message, {"structure": step.structure, "criterion": step.criterion, "scope": step.scope}

    def done(self, step: Prune) -> str:
        """What was pruned."""
        return f"{step.structure} pruned"

    def remove(self, job: Job, step: Prune, removal: PruningRound, record: StepRecord) -> Removed | None:
        """Set the job's masks, or make its network narrower."""
        reached = job.reached
        if not step.zeros:
            whole, start = reached.network, graph_at_start(job, record)
            reached.network, kept = cut_channels(whole, step, removal, job.removal_context, start=start)
            return Removed(whole, kept) if step.reconstruct else None
        whole = copy.deepcopy(reached.network) if step.reconstruct else reached.network
        rewind, before = _weights_to_rewind(job, step), 0 if reached.masks is None else reached.masks.zeros()
        reached.masks = cut_weights(reached.network, step, removal, reached.masks, job.removal_context, rewind)
        if removal.ramp is None and reached.masks.zeros() == before:
            reached.record.note(
                f"/optimizations/{record.position}: no further weight became zero; the rows of its layers say why"
            )
        return Removed(whole, {}) if step.reconstruct else None

    def layers(self, job: Job, step: Prune, record: StepRecord) -> list[Row]:
        """Each convolution and linear layer before and after, or why it was left alone."""
        return layer_rows(job.reached.network, graph_at_start(job, record), step)


class ProductHandler(CompressionHandler):
    """Low rank and separable: layers are replaced by products of smaller ones."""

    def title(self, step: LowRank | Separable) -> str:
        """Which of the two is applied."""
        return f"applying {step.type}"

    def planned(self, step: LowRank | Separable) -> tuple[str, dict[str, str]]:
        """What happens to layers."""
        return f"{step.type}: layers are replaced by products of smaller ones", {"structure": step.type}

    def done(self, step: LowRank | Separable) -> str:
        """Which of the two was applied."""
        return f"{step.type} applied"

    def remove(self, job: Job, step: LowRank | Separable, removal: PruningRound, record: StepRecord) -> Removed | None:
        """Replace the job's network by one with products; note what became of each layer."""
        reached, whole = job.reached, job.reached.network
        network, record.outcomes = replace_trained_layers(whole, step, baseline=job.removal_context.baseline)
        if network is whole:
            reached.record.note(
                f"/optimizations/{record.position}: no layer was replaced; the rows of its layers say why"
            )
        job.precision.to_device(network)
        reached.network = network
        replaced = frozenset(name for name, outcome in record.outcomes.items() if "parts" in outcome)
        return Removed(whole, {}, replaced) if step.reconstruct and replaced else None

    def layers(self, job: Job, step: LowRank | Separable, record: StepRecord) -> list[Row]:
        """What each layer was replaced by, or why it was not; a note where accuracy was lost."""
        assert record.after is not None
        if sentence := loss_note(step.type, record.before, record.after, record.outcomes):
            job.reached.record.note(sentence)
        return replaced_rows(job.reached.network, graph_at_start(job, record), record.outcomes)


_REWRITE, _TERM, _PRODUCT = RewriteHandler(), TrainingTermHandler(), ProductHandler()
HANDLERS: Mapping[type, OptimizationHandler] = {
    InsertBatchNorm: _REWRITE,
    InsertDropout: _REWRITE,
    InsertSpatialDropout: _REWRITE,
    SmallKernels: _REWRITE,
    Deeper: _REWRITE,
    InsertShortcuts: _REWRITE,
    Regularization: _TERM,
    Distill: _TERM,
    Prune: PruneHandler(),
    LowRank: _PRODUCT,
    Separable: _PRODUCT,
    Quantize: Int8Handler(),
}


def compression_handler(step: Compression) -> CompressionHandler:
    """The handler of a compression."""
    handler = HANDLERS[type(step)]
    assert isinstance(handler, CompressionHandler), f"{step.type} is a compression without rounds"
    return handler


def step_rows(job: Job, ending: Ending) -> list[Row]:
    """The report's `steps`, one for each optimization in order, as it was sent."""
    sent = job.task.spec.get("optimizations", [])
    return [
        {"optimization": dict(document), "applied": True} | HANDLERS[type(step)].row(job, position, ending)
        for position, (document, step) in enumerate(zip(sent, job.plan.spec.optimizations, strict=True))
    ]


def graph_at_start(job: Job, record: StepRecord) -> Graph:
    """The network before the first removal of a step."""
    return build_graph(read_layers(record.start), job.plan.baseline.input_shape, limits=Limits.none())


def changed_layers(before: Graph, after: Graph) -> list[Row]:
    """The layers that a rewrite inserted or changed."""
    return [
        {
            "name": node.name,
            "type": node.type,
            "channels_before": before[node.name].shape[0] if node.name in before else None,
            "channels_after": node.shape[0],
            "weights": node.params,
            "nonzero": node.params,
            "sparsity": 0.0,
        }
        for node in after.nodes
        if node.name not in before or before[node.name].layer != node.layer
    ]


def _cost_row(before: Graph, after: Graph) -> Row:
    measures = {"before": measures_of_cost(cost(before)), "after": measures_of_cost(cost(after))}
    return {**measures, "layers": [], "seconds": 0.0}


def _last(rounds: Sequence[Mapping[str, Any]], key: str) -> Any:
    return rounds[-1].get(key) if rounds else None


def _weights_to_rewind(job: Job, step: Compression) -> dict[str, Tensor] | None:
    """The weights that `weight_rewind` goes back to; None for other policies.

    Where the training was stopped before that epoch, the trained weights stay, and a note says so.
    """
    epoch = rewind_epoch(step, job.training)
    if epoch is None:
        return None
    weights = job.reached.kept.get(f"rewind/{epoch}")
    if weights is None:
        job.reached.record.note(f"weight_rewind: training ended before epoch {epoch}, so the trained weights stayed")
    return weights
