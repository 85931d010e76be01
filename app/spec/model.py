"""The network of a job as it is asked for: by name, as layers, or a finished job's; and the weights it starts with."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import AfterValidator

from app.network.layers.containers import MOST_LAYERS
from app.network.layers.registry import AnyLayer
from app.network.presets.registry import PRESETS
from app.spec.retrain import NetworkName
from app.validation.strict import JobId, Shape, Strict, Text, fault

MOST_CHANNELS = 65_536

Head = Literal["auto", "keep", "new"]


def _known_preset(name: str) -> str:
    if name not in PRESETS:
        raise fault(f"is not a preset; presets are: {', '.join(PRESETS)}")
    return name


class StatedPreprocessing(Strict):
    """What images go through before the network: `(x * scale - mean) / std`, per channel, in units after the scale."""

    mean: Annotated[tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...], Field(min_length=1, max_length=MOST_CHANNELS)]
    std: Annotated[tuple[Annotated[float, Field(gt=1e-8, le=1e6)], ...], Field(min_length=1, max_length=MOST_CHANNELS)]

    @model_validator(mode="after")
    def _as_many_of_each(self) -> Self:
        if len(self.std) != len(self.mean):
            message = f"has {len(self.std)} numbers, mean has {len(self.mean)}: one of each for every channel"
            raise fault(message, field="std", limit=len(self.mean), value=len(self.std))
        return self


class _Weighted(Strict):
    """A network that is written out, with uploaded weights where they are named."""

    weights: Annotated[
        JobId | None, Field(description="Id of uploaded weights that the training starts from, tensors by layer name.")
    ] = None
    head: Annotated[
        Literal["keep", "new"],
        Field(description="With weights. keep: every tensor is needed; new: the last layer starts fresh."),
    ] = "keep"
    preprocessing: Annotated[
        StatedPreprocessing | None,
        Field(description="With weights. What their images went through; default: measured on the training images."),
    ] = None

    @model_validator(mode="after")
    def _fields_fit_weights(self) -> Self:
        if self.weights is None and self.head != "keep":
            raise fault("belongs to weights: a network without them starts fresh", field="head", value=self.head)
        if self.weights is None and self.preprocessing is not None:
            raise fault("belongs to weights: else it is measured on the training images", field="preprocessing")
        return self

    @model_serializer(mode="wrap")
    def _own_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        of_weights = {name: fields.pop(name) for name in ("weights", "head", "preprocessing")}
        return fields if self.weights is None else fields | of_weights


class PresetModel(_Weighted):
    """A network by name, for any input shape and class count."""

    preset: Annotated[
        Text,
        AfterValidator(_known_preset),
        Field(description="One of GET /v1/presets.", json_schema_extra={"enum": list(PRESETS)}),
    ]
    input_shape: Annotated[Shape | None, Field(description="(channels, *spatial); default: the data's.")] = None
    classes: Annotated[int | None, Field(ge=2, le=65_536, description="Default: the data's.")] = None
    width: Annotated[float, Field(ge=0.01, le=16, description="Factor on every number of channels.")] = 1.0


class LayersModel(_Weighted):
    """A network as a list of layers, each fed by the one before unless it names its inputs."""

    input_shape: Annotated[Shape | None, Field(description="(channels, *spatial); default: the data's.")] = None
    layers: Annotated[tuple[AnyLayer, ...], Field(min_length=1, max_length=MOST_LAYERS)]


class JobModel(Strict):
    """The network of a finished job, with its trained weights."""

    job: Annotated[JobId, Field(description="A job that succeeded.")]
    artifact: Annotated[NetworkName, Field(description="Which of its two networks.")] = "pruned"
    input_shape: Annotated[
        Shape | None,
        Field(description="(channels, *spatial); default: that job's where the data fit it, else the data's."),
    ] = None
    head: Annotated[
        Head,
        Field(
            description="auto: the last layer is kept where the class counts agree, else fresh; keep: they must agree; "
            "new: fresh."
        ),
    ] = "auto"


_KINDS: dict[str, type[Strict]] = {"preset": PresetModel, "layers": LayersModel, "job": JobModel}


def _model_kind(model: object) -> str | None:
    """The field that says which kind of model it is; None where it has none of them, or two."""
    if not isinstance(model, dict):
        return next((f"<{name}>" for name, kind in _KINDS.items() if isinstance(model, kind)), "<layers>")
    stated = [name for name in _KINDS if name in model]
    return f"<{stated[0]}>" if len(stated) == 1 else None


ModelSpec = Annotated[
    Annotated[PresetModel, Tag("<preset>")]
    | Annotated[LayersModel, Tag("<layers>")]
    | Annotated[JobModel, Tag("<job>")],
    Discriminator(
        _model_kind,
        custom_error_type="one_model",
        custom_error_message=f"state exactly one of: {', '.join(_KINDS)}",
    ),
]
