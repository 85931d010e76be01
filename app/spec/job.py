"""A job: what is asked for, in one typed object. `parse_job` reads it from what was sent."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import AfterValidator, BeforeValidator

from app.errors import Fault, InvalidSpec
from app.spec.data import DataSpec
from app.spec.faults import bulk_fault, faults_of
from app.spec.layers import AnyLayer
from app.spec.optimizations import COMPRESSIONS, Compression, Optimization
from app.spec.presets import PRESETS
from app.spec.pruning import Epochs, LearningRate, Prune, Retrain
from app.spec.strict import LABELS, LARGEST_INT, LabelKey, LabelValue, Shape, Strict, Text, fault

SPEC_VERSIONS = (1,)
MOST_LAYERS = 10_000
MOST_OPTIMIZATIONS = 24

Augmentation = Literal["random_crop", "horizontal_flip", "cutout"]
Export = Literal["safetensors", "onnx", "pytorch"]
EXPORTS: tuple[Export, ...] = ("safetensors", "onnx", "pytorch")


def _known_version(version: object) -> object:
    if type(version) is not int or version not in SPEC_VERSIONS:
        known = ", ".join(str(number) for number in SPEC_VERSIONS)
        raise fault(f"must be the integer of a known version; known versions: {known}", limit=max(SPEC_VERSIONS))
    return version


def _known_preset(name: str) -> str:
    if name not in PRESETS:
        raise fault(f"is not a preset; presets are: {', '.join(PRESETS)}")
    return name


def _without_repetition(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for position, value in enumerate(values):
        if value in values[:position]:
            raise fault(f"lists {value} twice", field=str(position), value=value)
    return values


class PresetModel(Strict):
    """A network by name, for any input shape and class count."""

    preset: Annotated[
        Text,
        AfterValidator(_known_preset),
        Field(description="One of GET /v1/presets.", json_schema_extra={"enum": list(PRESETS)}),
    ]
    input_shape: Annotated[Shape | None, Field(description="(channels, *spatial); default: the data's.")] = None
    classes: Annotated[int | None, Field(ge=2, le=65_536, description="Default: the data's.")] = None
    width: Annotated[float, Field(ge=0.01, le=16, description="Factor on every number of channels.")] = 1.0


class LayersModel(Strict):
    """A network as a list of layers, each fed by the one before unless it names its inputs."""

    input_shape: Annotated[Shape | None, Field(description="(channels, *spatial); default: the data's.")] = None
    layers: Annotated[tuple[AnyLayer, ...], Field(min_length=1, max_length=MOST_LAYERS)]


def _model_kind(model: object) -> str:
    is_preset = isinstance(model, PresetModel) or (isinstance(model, dict) and "preset" in model)
    return "<preset>" if is_preset else "<layers>"


ModelSpec = Annotated[
    Annotated[PresetModel, Tag("<preset>")] | Annotated[LayersModel, Tag("<layers>")], Discriminator(_model_kind)
]


class Optimizer(Strict):
    """SGD, Adam or AdamW, with PyTorch's names."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: LearningRate = Field(
        description="Highest learning rate. Default: 0.1 for sgd, 0.001 for the others.",
        default_factory=lambda data: 0.1 if data.get("name") == "sgd" else 0.001,
    )
    momentum: float = Field(
        ge=0, lt=1, description="sgd only.", default_factory=lambda data: 0.9 if data.get("name") == "sgd" else 0.0
    )
    nesterov: bool = Field(
        description="sgd only; needs momentum.", default_factory=lambda data: data.get("momentum", 0.0) > 0
    )
    weight_decay: float = Field(
        ge=0,
        le=1,
        description="Default: 5e-4 for sgd, 0 for adam, 0.01 for adamw (decoupled there).",
        default_factory=lambda data: {"sgd": 5e-4, "adam": 0.0, "adamw": 0.01}.get(data.get("name", ""), 0.0),
    )
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(description="adam and adamw."),
    ] = (
        0.9,
        0.999,
    )
    eps: Annotated[float, Field(gt=0, le=1, description="adam and adamw.")] = 1e-8

    def _foreign(self) -> tuple[str, ...]:
        return ("betas", "eps") if self.name == "sgd" else ("momentum", "nesterov")

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

    epochs: Epochs = 10
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 128
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    augmentation: Annotated[tuple[Augmentation, ...], Field(max_length=16), AfterValidator(_without_repetition)] = ()
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
    """One job: data, network, training, and the optimizations in the order in which they are applied."""

    spec_version: Annotated[Literal[1], BeforeValidator(_known_version)]
    name: Text | None = None
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=LABELS)
    data: DataSpec
    model: ModelSpec
    training: Training = Field(default_factory=Training)
    optimizations: Annotated[tuple[Optimization, ...], Field(max_length=MOST_OPTIMIZATIONS)] = ()
    exports: Annotated[tuple[Export, ...], Field(min_length=1, max_length=16), AfterValidator(_without_repetition)] = (
        EXPORTS
    )

    def document(self) -> dict[str, Any]:
        """The job as JSON values, every default filled in; `parse_job` reads it back to an equal job."""
        return self.model_dump(mode="json")


def retraining(step: Compression, training: Training) -> Retrain:
    """How `step` is retrained, epochs filled in: a third of the training's, at least 1; none with policy none."""
    retrain = step.retrain or Retrain()
    if retrain.epochs is not None:
        return retrain
    return retrain.model_copy(update={"epochs": 0 if retrain.policy == "none" else max(1, training.epochs // 3)})


def completed(spec: JobSpec) -> JobSpec:
    """`spec` with the defaults filled in that depend on another part: warm-up, milestones, retraining. Idempotent."""
    training = spec.training
    update: dict[str, Any] = {"warmup": training.warmup_epochs}
    if training.schedule.name == "step":
        update["milestones"] = training.milestones
    schedule = training.schedule.model_copy(update=update)
    steps = tuple(
        _completed_step(step, training) if isinstance(step, COMPRESSIONS) else step for step in spec.optimizations
    )
    return spec.model_copy(
        update={"training": training.model_copy(update={"schedule": schedule}), "optimizations": steps}
    )


def _completed_step(step: Compression, training: Training) -> Compression:
    retrain = retraining(step, training)
    if not isinstance(step, Prune):
        return step.model_copy(update={"retrain": retrain})
    own: dict[str, Any] = {}
    if step.structure == "n:m":
        own["pattern"] = ":".join(map(str, step.kept_of))
    elif step.structure == "blocks":
        own["block"] = step.block_shape
    schedule = step.schedule
    if schedule.name == "cubic" and schedule.epochs is None and retrain.epochs:
        schedule = schedule.model_copy(update={"epochs": max(1, round(0.7 * retrain.epochs))})
    return step.model_copy(update={"retrain": retrain, "schedule": schedule, **own})


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
