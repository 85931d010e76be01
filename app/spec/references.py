"""What a job names: the networks that it starts from or learns from, and what is known about each.

A description names finished jobs and uploaded weights. `app/jobs/references.py` finds their rows and objects in the
store, `worker/run/references.py` their files on a worker. Both read each network into a `Source`, for `make_plan`:

    for reference in references_in(spec):
        sources[reference.key] = ...          # Source.of_architecture(...) or Source.of_tensors(...)
    plan = make_plan(spec, facts, sources=sources)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

from app.network.architecture import Preprocessing
from app.network.layers.shapes import Shape
from app.spec.job import JobSpec
from app.spec.model import JobModel
from app.spec.optimizations import Compression, Distill
from app.spec.retrain import NetworkName

Kind = Literal["job", "weights"]


class Reference(NamedTuple):
    """One network that a job's description names: a finished job's, or uploaded weights (`artifact` is None)."""

    kind: Kind
    id: str
    artifact: NetworkName | None
    pointer: str
    """Where the description names it first, e.g. `/model/job`."""

    @property
    def key(self) -> str:
        """A name for it that can be a file's: `job-<id>-pruned`, `weights-<id>`; the same for the same network."""
        return f"{self.kind}-{self.id}" if self.artifact is None else f"{self.kind}-{self.id}-{self.artifact}"


@dataclass(frozen=True)
class Source:
    """What is known about one network without reading its weights.

    Of a finished job everything is known; of uploaded weights the tensors only.
    """

    tensors: Mapping[str, Shape]
    """Names and shapes of the safetensors file."""
    layers: tuple[Mapping[str, Any], ...] | None = None
    """The expanded graph, as `architecture.json` has it."""
    input_shape: Shape | None = None
    classes: tuple[str, ...] | None = None
    """Names of the classes, in the order of the logits."""
    preprocessing: Preprocessing | None = None
    """What its images went through in its training."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Types of the tensors by safetensors' names (`F32`); a tensor that is not listed counts as `F32`."""

    @classmethod
    def of_architecture(
        cls, document: Mapping[str, Any], tensors: Mapping[str, Shape], dtypes: Mapping[str, str] | None = None
    ) -> Self:
        """The source of a finished job: the content of its `architecture.json`, and the tensors of its weights.

        Raises KeyError, TypeError or ValueError where the document is not what a job delivers.
        """
        stated = document["preprocessing"]
        return cls(
            tensors={name: tuple(shape) for name, shape in tensors.items()},
            layers=tuple(document["layers"]),
            input_shape=tuple(document["input_shape"]),
            classes=tuple(document["classes"]),
            preprocessing=Preprocessing(
                float(stated["scale"]), tuple(map(float, stated["mean"])), tuple(map(float, stated["std"]))
            ),
            dtypes=dict(dtypes or {}),
        )

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Shape], dtypes: Mapping[str, str] | None = None) -> Self:
        """The source of uploaded weights: names, shapes and types of the file's tensors."""
        return cls(tensors={name: tuple(shape) for name, shape in tensors.items()}, dtypes=dict(dtypes or {}))


def references_in(spec: JobSpec) -> tuple[Reference, ...]:
    """Every network that `spec` names, in the order of the description; one that is named twice is listed once."""
    found: dict[str, Reference] = {}
    for reference in every_reference(spec):
        found.setdefault(reference.key, reference)
    return tuple(found.values())


def every_reference(spec: JobSpec) -> Iterator[Reference]:
    """As `references_in`, but once for each place where a network is named."""
    if isinstance(spec.model, JobModel):
        yield Reference("job", spec.model.job, spec.model.artifact, "/model/job")
    elif spec.model.weights is not None:
        yield Reference("weights", spec.model.weights, None, "/model/weights")
    for position, step in enumerate(spec.optimizations):
        pointer = f"/optimizations/{position}"
        if isinstance(step, Distill):
            yield Reference("job", step.teacher, step.artifact, f"{pointer}/teacher")
        elif isinstance(step, Compression) and step.retrain is not None and step.retrain.distillation is not None:
            distillation = step.retrain.distillation
            if distillation.teacher is not None:
                at = f"{pointer}/retrain/distillation/teacher"
                yield Reference("job", distillation.teacher, distillation.artifact, at)
