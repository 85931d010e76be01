"""A job: what is asked for, in one typed object. `parse_job` reads it from what was sent."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import AfterValidator, BeforeValidator

from app.errors import Fault, InvalidSpec
from app.spec.data import DataSpec
from app.spec.model import JobModel, ModelSpec
from app.spec.optimizations import Compression, Distill, Optimization
from app.spec.prune import Prune
from app.spec.quantize import Quantize
from app.spec.retrain import Distillation, Epochs, LearningRate, Retrain
from app.spec.sensitivity import Sensitivity
from app.validation.faults import bulk_fault, faults_of
from app.validation.strict import LABELS, LARGEST_INT, LabelKey, LabelValue, Strict, Text, fault, without_default

SPEC_VERSIONS = (1,)
MOST_OPTIMIZATIONS = 24
MOST_PATTERNS = 256
MOST_STARS = 8  # in one pattern: each is a search
RACE_PART = 8  # one of so many epochs of a retraining is for the race of its rates
SELF_DISTILLATION = Distillation(alpha=0.5, temperature=2.0)
"""Of policy auto, by the job's own dense network: half of what is learned, and hardly softer than its answers."""
USUAL_RETRAINING = 3  # epochs, where there is no training to take a third of

WITH_MOMENTUM = ("sgd", "muon")

Augmentation = Literal["random_crop", "random_crop_zeros", "horizontal_flip", "alternating_flip", "cutout"]
EITHER_OR: tuple[tuple[Augmentation, Augmentation], ...] = (
    ("random_crop", "random_crop_zeros"),
    ("horizontal_flip", "alternating_flip"),
)
Export = Literal["safetensors", "onnx", "pytorch"]
EXPORTS: tuple[Export, ...] = ("safetensors", "onnx", "pytorch")


def _known_version(version: object) -> object:
    if type(version) is not int or version not in SPEC_VERSIONS:
        known = ", ".join(str(number) for number in SPEC_VERSIONS)
        raise fault(f"must be the integer of a known version; known versions: {known}", limit=max(SPEC_VERSIONS))
    return version


def _few_stars(pattern: str) -> str:
    if pattern.count("*") > MOST_STARS:
        raise fault(f"has more than {MOST_STARS} *: state several patterns", limit=MOST_STARS, value=pattern.count("*"))
    return pattern


LayerPattern = Annotated[
    Text, AfterValidator(_few_stars), Field(description="A layer's name, or a glob of names: *, ?, [...].")
]


def _without_repetition(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for position, value in enumerate(values):
        if value in values[:position]:
            raise fault(f"lists {value} twice", field=str(position), value=value)
    return values


def _one_of_a_kind(wanted: tuple[Augmentation, ...]) -> tuple[Augmentation, ...]:
    for pair in EITHER_OR:
        if set(pair) <= set(wanted):
            later = max(wanted.index(name) for name in pair)
            raise fault(f"{pair[0]} and {pair[1]} exclude each other", field=str(later), value=wanted[later])
    return wanted


class Optimizer(Strict):
    """SGD, Muon, Adam or AdamW, with PyTorch's names.

    `muon` is SGD whose steps on inner weights are orthogonal matrices, at half the rate (Jordan et al., 2024).
    """

    name: Annotated[
        Literal["sgd", "muon", "adam", "adamw"],
        Field(description="Default: muon; sgd for a network that comes trained.", json_schema_extra=without_default),
    ] = "sgd"
    lr: LearningRate = Field(
        description="Highest learning rate. Default: 0.1 for sgd and muon, 0.001 for the others.",
        default_factory=lambda data: 0.1 if data.get("name") in WITH_MOMENTUM else 0.001,
    )
    momentum: float = Field(
        ge=0,
        lt=1,
        description="sgd and muon.",
        default_factory=lambda data: 0.9 if data.get("name") in WITH_MOMENTUM else 0.0,
    )
    nesterov: bool = Field(
        description="sgd and muon; needs momentum.", default_factory=lambda data: data.get("momentum", 0.0) > 0
    )
    weight_decay: float = Field(
        ge=0,
        le=1,
        description="Default: 5e-4 for sgd and muon, 0 for adam, 0.01 for adamw (decoupled there).",
        default_factory=lambda data: {"sgd": 5e-4, "muon": 5e-4, "adam": 0.0, "adamw": 0.01}.get(
            data.get("name", ""), 0.0
        ),
    )
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(description="adam and adamw."),
    ] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1, description="adam and adamw.")] = 1e-8

    def _foreign(self) -> tuple[str, ...]:
        return ("betas", "eps") if self.name in WITH_MOMENTUM else ("momentum", "nesterov")

    @model_validator(mode="after")
    def _fields_fit_name(self) -> Self:
        for field in self._foreign():
            if field in self.model_fields_set:
                raise fault(f"is not a parameter of {self.name}", field=field)
        if self.nesterov and self.momentum == 0:
            raise fault("nesterov needs a momentum above 0", field="nesterov", value=True)
        return self

    @model_serializer(mode="wrap")
    def _own_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name not in self._foreign()}


class Schedule(Strict):
    """How the learning rate moves: a linear warm-up to `lr`, then to 0 (`one_cycle`, `cosine`), by `gamma` or level."""

    name: Literal["one_cycle", "cosine", "step", "constant"] = "one_cycle"
    warmup: Annotated[
        float | None,
        Field(
            ge=0,
            le=1_000_000,
            description="Epochs of rising rate. Default: three tenths of the epochs for one_cycle, else 0.",
        ),
    ] = None
    milestones: Annotated[
        tuple[Epochs, ...] | None,
        Field(
            max_length=1000,
            description="step: epochs after which the rate falls. Default: half and three quarters of the epochs.",
        ),
    ] = None
    gamma: Annotated[float, Field(gt=0, lt=1, description="step: factor at each milestone.")] = 0.1

    @model_validator(mode="after")
    def _fields_fit_name(self) -> Self:
        for field in ("milestones", "gamma"):
            if self.name != "step" and field in self.model_fields_set and getattr(self, field) is not None:
                raise fault(f"belongs to the step schedule, not to {self.name}", field=field)
        for position, (before, after) in enumerate(
            zip(self.milestones or (), (self.milestones or ())[1:], strict=False)
        ):
            if after <= before:
                raise fault(
                    f"milestones rise strictly, but {after} follows {before}",
                    field=f"milestones/{position + 1}",
                    limit=before + 1,
                    value=after,
                )
        return self

    @model_serializer(mode="wrap")
    def _own_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        foreign = () if self.name == "step" else ("milestones", "gamma")
        return {name: value for name, value in handler(self).items() if name not in foreign}


class EarlyStopping(Strict):
    """Stop when the validation accuracy has not risen by `min_delta` for `patience` epochs."""

    patience: Annotated[int, Field(ge=1, le=1_000_000, description="Epochs without improvement.")] = 5
    min_delta: Annotated[float, Field(ge=0, lt=1, description="Smallest rise of the accuracy that counts.")] = 0.0


class Training(Strict):
    """How the network is trained; retraining after pruning uses the same settings with its own schedule."""

    epochs: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description="0: none, for a network that comes trained, from a job or with weights, head included.",
        ),
    ] = 10
    batch_size: Annotated[
        int,
        Field(
            ge=1,
            le=65_536,
            description="Largest batch: those of an epoch are equal up to one image. Default: 64 where 128 would leave "
            "fewer than 3000 steps, else 128.",
            json_schema_extra=without_default,
        ),
    ] = 128
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    augmentation: Annotated[
        tuple[Augmentation, ...],
        Field(
            max_length=16,
            description="Random changes of training images: crops that fill by reflection or with zeros (black), flips "
            "of random images or of each in every other epoch, a cut-out box.",
        ),
        AfterValidator(_without_repetition),
        AfterValidator(_one_of_a_kind),
    ] = ()
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema_decay: Annotated[
        float | None, Field(gt=0, lt=1, description="Decay of the running average of the weights that is evaluated.")
    ] = None
    precision: Annotated[
        Literal["auto", "float32", "bf16", "fp16"],
        Field(description="auto: bf16 where the device computes in it, else float32."),
    ] = "auto"
    seed: Annotated[int, Field(ge=0, le=LARGEST_INT)] = 0
    early_stopping: EarlyStopping | None = None
    gradient_clipping: Annotated[float | None, Field(gt=0, le=1e6, description="Largest norm of the gradient.")] = None
    channels_last: Annotated[
        bool | None, Field(description="Memory layout of 2-D and 3-D images; null: what is faster on the device.")
    ] = None
    frozen: Annotated[
        tuple[LayerPattern, ...],
        Field(
            max_length=MOST_PATTERNS,
            description="Names or globs of layers that no training of the job changes; batch norm keeps its statistics.",
        ),
        AfterValidator(_without_repetition),
    ] = ()
    lr_factors: dict[LayerPattern, Annotated[float, Field(ge=0, le=100)]] = Field(
        default_factory=dict,
        max_length=MOST_PATTERNS,
        description="Layer name or glob -> factor on the learning rate, in every training; the first match wins.",
    )

    @property
    def warmup_epochs(self) -> float:
        """Epochs of rising rate, the schedule's default filled in."""
        if self.schedule.warmup is not None:
            return self.schedule.warmup
        return 0.3 * self.epochs if self.schedule.name == "one_cycle" else 0.0

    @property
    def milestones(self) -> tuple[int, ...]:
        """Epochs after which a step schedule lowers the rate (default: He et al.'s); empty for other schedules."""
        if self.schedule.name != "step":
            return ()
        if self.schedule.milestones is not None:
            return self.schedule.milestones
        return tuple(sorted({self.epochs // 2, 3 * self.epochs // 4} - {0}))


class JobSpec(Strict):
    """One job: data, network, training, and the optimizations in the order in which they are applied.

    Kind `sensitivity` trains the network and, instead of compressing it, measures how much of it could be removed.
    """

    spec_version: Annotated[Literal[1], BeforeValidator(_known_version)]
    kind: Annotated[
        Literal["compress", "sensitivity"],
        Field(description="sensitivity: a table of the accuracy against the part kept of each group of channels."),
    ] = "compress"
    name: Text | None = None
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=LABELS)
    data: DataSpec
    model: ModelSpec
    training: Training = Field(default_factory=Training)
    optimizations: Annotated[tuple[Optimization, ...], Field(max_length=MOST_OPTIMIZATIONS)] = ()
    exports: Annotated[
        tuple[Export, ...],
        Field(min_length=1, max_length=16),
        AfterValidator(_without_repetition),
    ] = EXPORTS
    sensitivity: Annotated[Sensitivity | None, Field(description="kind sensitivity: what is measured.")] = None

    @model_validator(mode="after")
    def _fields_fit_kind(self) -> Self:
        if self.kind != "sensitivity":
            if self.sensitivity is not None:
                raise fault('belongs to kind sensitivity: state "kind": "sensitivity"', field="sensitivity")
            return self
        for position, step in enumerate(self.optimizations):
            if isinstance(step, Compression | Quantize):
                message = f"kind sensitivity measures the network before compressions: {step.type} is for kind compress"
                raise fault(message, field=f"optimizations/{position}", value=step.type)
        return self

    @model_validator(mode="after")
    def _trains_or_is_trained(self) -> Self:
        if self.training.epochs > 0:
            return self
        if not isinstance(self.model, JobModel) and self.model.weights is None:
            message = "0 is for a network that comes trained: from a job (model.job) or with weights (model.weights)"
            raise fault(message, field="training/epochs", limit=1, value=0)
        if self.model.head == "new":
            raise fault("0 leaves the new head untrained: train it", field="training/epochs", limit=1, value=0)
        for position, step in enumerate(self.optimizations):
            if isinstance(step, Distill):
                message = "distill acts on the training, but training.epochs is 0: use retrain.distillation"
                raise fault(message, field=f"optimizations/{position}")
        return self

    def document(self) -> dict[str, Any]:
        """The job as JSON values, every default filled in; `parse_job` reads it back to an equal job.

        Batch size and optimizer that were not stated follow from the data: they are those of the job in a plan.
        """
        return self.model_dump(mode="json")


def retraining(step: Compression, training: Training) -> Retrain:
    """How `step` is retrained, epochs and teacher filled in.

    A third of the training's epochs, at least 1; none with policy none; of a training of 0 epochs: 3. With policy
    auto the job's own dense network teaches, unless something else or null is stated.
    """
    retrain = step.retrain or Retrain()
    update: dict[str, Any] = {}
    if retrain.epochs is None:
        usual = max(1, training.epochs // 3) if training.epochs else USUAL_RETRAINING
        update["epochs"] = 0 if retrain.policy == "none" else usual
    if retrain.policy == "auto" and "distillation" not in retrain.model_fields_set:
        update["distillation"] = SELF_DISTILLATION
    return retrain.model_copy(update=update) if update else retrain


def race_epochs(step: Compression, training: Training) -> int:
    """Epochs of a retraining in which rates are compared, all tries together; the rest is for the best of them.

    One of eight with policy auto; in shorter retrainings a race costs more than it finds. None where the rate is stated,
    and where the sparsity rises while training: a try would see another network than the rest.
    """
    retrain = retraining(step, training)
    rising = isinstance(step, Prune) and step.schedule.name == "cubic"
    if retrain.policy != "auto" or retrain.lr is not None or rising:
        return 0
    return (retrain.epochs or 0) // RACE_PART


def reconstructs(step: Compression, retrain: Retrain) -> bool:
    """Whether `step` fits the layers behind its removal: as it says, else where that was measured to win.

    That is for channels, and for everything where nothing is trained after it. Zeros and products that train again end
    as well or better without: a fit to few weights makes them large, and training has to undo that.
    """
    if step.reconstruct is not None:
        return step.reconstruct
    if not isinstance(step, Prune):
        return retrain.policy == "none"
    return step.may_reconstruct and (not step.zeros or retrain.policy == "none")


def completed(spec: JobSpec) -> JobSpec:
    """`spec` with the defaults filled in that depend on another part: warm-up, milestones, retraining. Idempotent."""
    training = spec.training
    update: dict[str, Any] = {"warmup": training.warmup_epochs} if training.epochs else {}
    if training.schedule.name == "step" and training.epochs:
        update["milestones"] = training.milestones
    schedule = training.schedule.model_copy(update=update)
    steps = tuple(
        _completed_step(step, training) if isinstance(step, Compression) else step for step in spec.optimizations
    )
    looked_at = {"sensitivity": spec.sensitivity or Sensitivity()} if spec.kind == "sensitivity" else {}
    return spec.model_copy(
        update={"training": training.model_copy(update={"schedule": schedule}), "optimizations": steps, **looked_at}
    )


def _completed_step(step: Compression, training: Training) -> Compression:
    retrain = retraining(step, training)
    filled = {"retrain": retrain, "reconstruct": reconstructs(step, retrain)}
    if not isinstance(step, Prune):
        return step.model_copy(update=filled)
    own: dict[str, Any] = {}
    if "criterion" not in step.model_fields_set:
        own["criterion"] = step.usual_criterion
    if step.structure == "n:m":
        own["pattern"] = ":".join(map(str, step.kept_of))
    elif step.structure == "blocks":
        own["block"] = step.block_shape
    schedule = step.schedule
    if schedule.name == "cubic" and schedule.epochs is None and retrain.epochs:
        schedule = schedule.model_copy(update={"epochs": max(1, round(0.7 * retrain.epochs))})
    return step.model_copy(update={"schedule": schedule, **filled, **own})


def parse_job(document: object) -> JobSpec:
    """The job that `document` (JSON values) describes, every default filled in.

    Raises InvalidSpec with at most 100 faults: JSON pointer into `document`, message, limit, value.
    """
    too_much = bulk_fault(document)
    if too_much:
        raise InvalidSpec([too_much])
    try:
        text = json.dumps(document)
    except (TypeError, ValueError) as exc:
        raise InvalidSpec([Fault("", "is not JSON: numbers, strings, true, false, null, lists and objects")]) from exc
    try:
        return completed(JobSpec.model_validate_json(text))
    except ValidationError as exc:
        raise InvalidSpec(faults_of(exc, document)) from exc
