"""The networks that a job starts from or learns from, on this machine: one folder each, under its reference's key.

<folder>/<key>/weights.safetensors
<folder>/<key>/architecture.json          of a finished job only
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from app.errors import SourceUnavailable, WeightsInvalid
from app.network.graph import Graph
from app.network.layers.shapes import Shape
from app.network.node import Limits
from app.planning.warm_start import Misfit, WarmStart, listed, network_at
from app.spec.job import JobSpec
from app.spec.references import Reference, Source, references_in
from app.validation.safetensors_header import VARIANCE
from worker.network import Network, build_network
from worker.training.optimizers import layer_of

WEIGHTS = "weights.safetensors"
ARCHITECTURE = "architecture.json"
ZEROS_WORTH_A_WORD = 0.01  # of the weights


def read_sources(spec: JobSpec, folder: Path | None) -> dict[str, Source]:
    """What `make_plan` has to know about each network that `spec` refers to, by key; no weights are read.

    Raises SourceUnavailable: one is not in the folder, or is no network.
    """
    return {reference.key: _read(reference, folder) for reference in references_in(spec)}


def _read(reference: Reference, folder: Path | None) -> Source:
    if folder is None:
        raise _unavailable(reference, "it was not sent to this worker")
    place = folder / reference.key
    try:
        shapes: dict[str, Shape] = {}
        kinds: dict[str, str] = {}
        with safe_open(place / WEIGHTS, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                shapes[name], kinds[name] = tuple(tensor.get_shape()), tensor.get_dtype()
        if reference.kind == "weights":
            return Source.of_tensors(shapes, kinds)
        document = json.loads((place / ARCHITECTURE).read_text(encoding="utf-8"))
        return Source.of_architecture(document, shapes, kinds)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _unavailable(reference, f"its files cannot be read ({type(error).__name__})") from error


def _unavailable(reference: Reference, why: str) -> SourceUnavailable:
    what = f"the network of job {reference.id}" if reference.kind == "job" else f"weights {reference.id}"
    return SourceUnavailable(f"{what}: {why}", pointer=reference.pointer)


@torch.no_grad()
def put_weights(network: Network, reference: Reference, folder: Path | None, *, fresh: Collection[str]) -> None:
    """Give the network the tensors of a source, in place, as float32; the layers in `fresh` keep what they have.

    Raises:
        SourceUnavailable: the source is not there, or it has not what the plan saw.
        WeightsInvalid: a value is not finite in float32, or a variance is below 0.
    """
    if folder is None:
        raise _unavailable(reference, "it was not sent to this worker")
    own = network.state_dict()
    wanted = [name for name in network.graph.tensors() if layer_of(name) not in fresh]
    try:
        with safe_open(folder / reference.key / WEIGHTS, "pt") as file:
            for name in wanted:
                tensor = file.get_tensor(name)
                if tensor.shape != own[name].shape:
                    raise ValueError(f"{name} has another shape")
                own[name].copy_(_checked(tensor, name, reference))
    except (OSError, SafetensorError, ValueError) as error:
        raise _unavailable(reference, f"its weights cannot be read ({type(error).__name__})") from error


def _checked(tensor: Tensor, name: str, reference: Reference) -> Tensor:
    values = tensor.to(torch.float32)
    if not bool(values.isfinite().all()):
        message = f"tensor {name} of {reference.kind} {reference.id} has values that are not finite in float32"
        raise WeightsInvalid(message, pointer=reference.pointer)
    if name.rpartition(".")[2] == VARIANCE and bool((values < 0).any()):
        message = f"tensor {name} of {reference.kind} {reference.id} has variances below 0"
        raise WeightsInvalid(message, pointer=reference.pointer, hint="give batch norms statistics that they can have")
    return values


def start_notes(start: WarmStart, network: Network) -> list[str]:
    """What the report says about where the network came from."""
    reference = start.reference
    what = f"{reference.kind} {reference.id}" + (f" ({reference.artifact})" if reference.artifact else "")
    fresh = f"; these layers started fresh: {listed(start.fresh)}" if start.fresh else ""
    notes = [f"the training started from {what}{fresh}"]
    if start.mean is None:
        notes.append(f"nobody stated the preprocessing of {what}: it was measured on the training images")
    else:
        notes.append(f"mean and standard deviation of the images are those of {what}")
    weights = [parameter for name, parameter in network.named_parameters() if name.endswith(".weight")]
    zeros, count = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    if zeros > ZEROS_WORTH_A_WORD * count:
        notes.append(f"{zeros} of {count} weights were zero at the start: training made numbers of them again")
    return notes


def job_network(source: Source, reference: Reference, folder: Path | None, input_shape: Shape) -> Network:
    """The network of a finished job with its weights, for inputs of this shape, on the CPU.

    Raises SourceUnavailable: it is not there, or is no longer what was planned with.
    """
    try:
        graph: Graph = network_at(source, input_shape, Limits.none())
    except Misfit as misfit:
        raise _unavailable(reference, str(misfit)) from misfit
    network = build_network(graph)
    put_weights(network, reference, folder, fresh=())
    return network
