"""All layers of the job language, by type, and how to read them."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field, TypeAdapter

from app.network.layers.activations import (
    GELU,
    Dropout,
    Hardsigmoid,
    Hardswish,
    LeakyReLU,
    PReLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    SpatialDropout,
    Tanh,
)
from app.network.layers.containers import Repeat, Residual, SqueezeExcite
from app.network.layers.convolutions import Conv, ConvTranspose, Linear
from app.network.layers.joins_and_views import Add, ChannelShuffle, Concat, Flatten, Multiply, Pad, Slice
from app.network.layers.layer import Layer
from app.network.layers.normalization import BatchNorm, GroupNorm, LayerNorm
from app.network.layers.pooling import AvgPool, GlobalAvgPool, MaxPool, Upsample

Computed = (
    Conv
    | ConvTranspose
    | Linear
    | BatchNorm
    | GroupNorm
    | LayerNorm
    | ReLU
    | ReLU6
    | LeakyReLU
    | SiLU
    | GELU
    | Hardswish
    | Hardsigmoid
    | Sigmoid
    | Tanh
    | Softmax
    | PReLU
    | MaxPool
    | AvgPool
    | GlobalAvgPool
    | Upsample
    | Dropout
    | SpatialDropout
    | Flatten
    | Slice
    | ChannelShuffle
    | Pad
    | Add
    | Multiply
    | Concat
)
"""The layers that a graph has as nodes."""
Container = Residual | SqueezeExcite | Repeat
"""The layers that the graph builder writes out as others."""
AnyLayer = Annotated[Computed | Container, Field(discriminator="type")]

COMPUTED: tuple[type[Layer], ...] = get_args(Computed)
CONTAINERS: tuple[type[Layer], ...] = get_args(Container)
# The language is recursive: containers hold every layer and are layers themselves, so that the two modules need each
# other; the fields `layers` get their type here.
for _container in CONTAINERS:
    _container.model_rebuild(_types_namespace={"AnyLayer": AnyLayer})

LAYERS: dict[str, type[Layer]] = {kind.model_fields["type"].default: kind for kind in (*COMPUTED, *CONTAINERS)}
"""Every layer's class by its type, as it stands in a job."""

_LIST: TypeAdapter[tuple[Layer, ...]] = TypeAdapter(Annotated[tuple[AnyLayer, ...], Field(strict=False)])


def read_layers(documents: object) -> tuple[Layer, ...]:
    """The layers of a list of JSON objects, as `model.layers` and `architecture.json` hold them.

    Raises:
        pydantic.ValidationError: something in it is not of the job language.
    """
    return _LIST.validate_python(documents)
