"""Networks by name: functions from input shape, class count and width to the layers of the job language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import Fault, InvalidSpec

Layers = list[dict[str, Any]]

_ALIGNMENT = 8  # kernels work on blocks of 8 channels; narrower layers are rounded to the nearest integer


@dataclass(frozen=True)
class Preset:
    """A network by name: what it takes, where it comes from, and the function that lists its layers.

    `axes` are the numbers of spatial axes it takes, `smallest` the least size of each of them, `usual_shape` the `(C,
    *spatial)` and `usual_classes` of the data it is known for, at which the catalogue states its cost.
    """

    name: str
    description: str
    source: str
    axes: tuple[int, ...]
    smallest: int
    usual_shape: tuple[int, ...]
    usual_classes: int
    layers: Callable[[tuple[int, ...], int, float], Layers]


def preset_layers(name: str, input_shape: tuple[int, ...], classes: int, width: float = 1.0) -> Layers:
    """The layers, as JSON values, of preset `name` for inputs `(C, *spatial)`; `width` scales every hidden width.

    Raises InvalidSpec at `/model/input_shape` if the preset takes another number of axes or larger inputs.
    """
    preset = PRESETS[name]
    spatial = input_shape[1:]
    if len(spatial) not in preset.axes:
        taken = " or ".join(f"{axes}-D" for axes in preset.axes)
        message = (
            f"{name} takes {taken} inputs, but {list(input_shape)} (channels first) has {len(spatial)} spatial axes"
        )
        raise InvalidSpec([Fault("/model/input_shape", message, limit=preset.axes[-1], value=len(spatial))])
    if min(spatial) < preset.smallest:
        message = (
            f"{name} needs every spatial size to be at least {preset.smallest}, but the input is {list(input_shape)}"
        )
        raise InvalidSpec([Fault("/model/input_shape", message, limit=preset.smallest, value=min(spatial))])
    return preset.layers(input_shape, classes, width)


def scaled(channels: int, width: float) -> int:
    """`channels * width`, at least 1: from 16 up the nearest multiple of 8 that loses at most a tenth.

    Below 16 the nearest integer; at width 1 what the paper has. The rule of MobileNet (`make_divisible`): fast kernels
    want aligned widths.
    """
    exact = channels * width
    if width == 1 or exact < 2 * _ALIGNMENT:
        return max(1, round(exact))
    aligned = int(exact + _ALIGNMENT / 2) // _ALIGNMENT * _ALIGNMENT
    return aligned if aligned >= 0.9 * exact else aligned + _ALIGNMENT


def _conv(channels: int, kernel_size: int = 3, **fields: Any) -> dict[str, Any]:
    return {"type": "conv", "out_channels": channels, "kernel_size": kernel_size, **fields}


def _pool(size: list[int], factor: Sequence[int]) -> Layers:
    """Max-pooling by `factor` that leaves alone the axes of `size` it would empty; `size` becomes the pooled size."""
    kernel = [by if axis >= by else 1 for axis, by in zip(size, factor, strict=True)]
    if max(kernel) == 1:
        return []
    size[:] = [axis // by for axis, by in zip(size, kernel, strict=True)]
    return [{"type": "max_pool", "kernel_size": kernel[0] if len(set(kernel)) == 1 else kernel}]


def _halve(size: list[int]) -> Layers:
    return _pool(size, [2] * len(size))


def _linear(features: int) -> dict[str, Any]:
    return {"type": "linear", "out_features": features}


def _averaged(classes: int) -> Layers:
    return [{"type": "global_avg_pool"}, {"type": "flatten"}, _linear(classes)]


def _simple_cnn(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    size, layers = list(input_shape[1:]), Layers()
    for channels in (32, 64):
        layers += [_conv(scaled(channels, width), padding="same"), {"type": "relu"}, *_halve(size)]
    return [*layers, {"type": "flatten"}, _linear(scaled(128, width)), {"type": "relu"}, _linear(classes)]


def _deep_cnn(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    size, layers = list(input_shape[1:]), Layers()
    for channels in (32, 64, 128, 256):
        conv = _conv(scaled(channels, width), padding="same")
        layers += [conv, {"type": "batch_norm"}, {"type": "relu"}, *_halve(size)]
    return [*layers, {"type": "flatten"}, _linear(scaled(1024, width)), {"type": "relu"}, _linear(classes)]


def _lenet5(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    padding = 0 if min(input_shape[1:]) >= 32 else 2  # the paper pads its 28 x 28 digits to 32 x 32
    layers: Layers = []
    for channels, pad in ((6, padding), (16, 0)):
        conv = _conv(scaled(channels, width), 5, padding=pad)
        layers += [conv, {"type": "tanh"}, {"type": "avg_pool", "kernel_size": 2}]
    layers.append({"type": "flatten"})
    for features in (120, 84):
        layers += [_linear(scaled(features, width)), {"type": "tanh"}]
    return [*layers, _linear(classes)]


def _resnet(blocks_per_stage: int) -> Callable[[tuple[int, ...], int, float], Layers]:
    def layers(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
        channels = scaled(16, width)
        result: Layers = [_conv(channels, padding=1, bias=False), {"type": "batch_norm"}, {"type": "relu"}]
        for stage, base in enumerate((16, 32, 64)):
            channels = scaled(base, width)
            for block in range(blocks_per_stage):
                narrows = stage > 0 and block == 0
                result += _basic_block(channels, stride=2 if narrows else 1, shortcut="pad" if narrows else "identity")
        return result + _averaged(classes)

    return layers


def _basic_block(channels: int, *, stride: int, shortcut: str) -> Layers:
    branch: Layers = [
        _conv(channels, stride=stride, padding=1, bias=False),
        {"type": "batch_norm"},
        {"type": "relu"},
        _conv(channels, padding=1, bias=False),
        {"type": "batch_norm"},
    ]
    return [{"type": "residual", "layers": branch, "shortcut": shortcut}, {"type": "relu"}]


def _vgg(stages: Sequence[Sequence[int]]) -> Callable[[tuple[int, ...], int, float], Layers]:
    def layers(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
        size, result = list(input_shape[1:]), Layers()
        for stage in stages:
            for channels in stage:
                result += [
                    _conv(scaled(channels, width), padding=1, bias=False),
                    {"type": "batch_norm"},
                    {"type": "relu"},
                ]
            result += _halve(size)
        if size != [7, 7]:
            return result + _averaged(classes)
        result.append({"type": "flatten"})
        for _ in range(2):
            result += [_linear(scaled(4096, width)), {"type": "relu"}, {"type": "dropout", "p": 0.5}]
        return [*result, _linear(classes)]

    return layers


def _audio_cnn(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    length = input_shape[1]
    kernel = min(80, length // 8 * 2) + 1  # odd, so that padding keeps the length; the paper's 80 is for 1 s at 8 kHz
    first = _conv(scaled(32, width), kernel, stride=4, padding=kernel // 2, bias=False)
    layers: Layers = [first, {"type": "batch_norm"}, {"type": "relu"}]
    size = [(length - 1) // 4 + 1]
    layers += _pool(size, [4])
    for channels in (32, 64, 128):
        layers += [_conv(scaled(channels, width), padding=1, bias=False), {"type": "batch_norm"}, {"type": "relu"}]
        layers += _pool(size, [4])
    return layers + _averaged(classes)


def _video_cnn(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    size, layers = list(input_shape[1:]), Layers()
    for stage, channels in enumerate((16, 32, 64, 128)):
        layers += [_conv(scaled(channels, width), padding=1, bias=False), {"type": "batch_norm"}, {"type": "relu"}]
        layers += _pool(size, [1 if stage == 0 else 2, 2, 2])  # C3D keeps all frames in its first stage
    return layers + _averaged(classes)


_HE = "He et al. 2015, arXiv 1512.03385, section 4.2 (CIFAR networks)"
_SIMONYAN = "Simonyan & Zisserman 2014, arXiv 1409.1556, with batch norm"
_VGG_NOTE = "two linear layers of 4096 where the last map is 7 x 7 (inputs of 224 to 255), else a global average"
_RESNET_NOTE = (
    "3 stages of 16, 32, 64 channels; shortcuts without weights (option A: every second position, zero channels)"
)
_CIFAR = (3, 32, 32)

_ALL = (
    Preset(
        "simple_cnn",
        "two 3 x 3 convolutions (32, 64) with max-pooling, a linear layer of 128",
        "the classic introductory CNN",
        (1, 2, 3),
        1,
        (1, 28, 28),
        10,
        _simple_cnn,
    ),
    Preset(
        "deep_cnn",
        "four 3 x 3 convolutions (32 to 256) with batch norm and max-pooling, a linear layer of 1024",
        "the classic introductory CNN, deeper, with batch norm (arXiv 1502.03167)",
        (1, 2, 3),
        1,
        _CIFAR,
        10,
        _deep_cnn,
    ),
    Preset(
        "lenet5",
        "two 5 x 5 convolutions (6, 16), tanh, plain average pooling, linear layers of 120 and 84, no RBF output",
        "LeCun et al. 1998, Gradient-based learning applied to document recognition",
        (2,),
        12,
        (1, 28, 28),
        10,
        _lenet5,
    ),
    Preset("resnet20", f"20 layers: {_RESNET_NOTE}", _HE, (2,), 1, _CIFAR, 10, _resnet(3)),
    Preset("resnet32", f"32 layers: {_RESNET_NOTE}", _HE, (2,), 1, _CIFAR, 10, _resnet(5)),
    Preset("resnet56", f"56 layers: {_RESNET_NOTE}", _HE, (2,), 1, _CIFAR, 10, _resnet(9)),
    Preset(
        "vgg11",
        f"8 convolutions 3 x 3 in 5 stages (64 to 512); {_VGG_NOTE}",
        _SIMONYAN,
        (2,),
        1,
        _CIFAR,
        10,
        _vgg(((64,), (128,), (256, 256), (512, 512), (512, 512))),
    ),
    Preset(
        "vgg16",
        f"13 convolutions 3 x 3 in 5 stages (64 to 512); {_VGG_NOTE}",
        _SIMONYAN,
        (2,),
        1,
        _CIFAR,
        10,
        _vgg(((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))),
    ),
    Preset(
        "audio_cnn",
        "waveforms: a long strided convolution, three of size 3, batch norm, pooling by 4; a quarter of M5's channels",
        "M5 of Dai et al. 2016, arXiv 1610.00087",
        (1,),
        8,
        (1, 8000),
        35,
        _audio_cnn,
    ),
    Preset(
        "video_cnn",
        "clips (channels, frames, height, width) or volumes: four 3 x 3 x 3 convolutions (16 to 128), batch norm",
        "after C3D of Tran et al. 2014, arXiv 1412.0767, with batch norm and a global average",
        (3,),
        1,
        (3, 16, 32, 32),
        10,
        _video_cnn,
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
