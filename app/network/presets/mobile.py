"""Networks of depthwise convolutions: MobileNet 1 and 2, EfficientNet-Lite."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from app.network.presets.blocks import SMALL_NOTE, averaged, is_small, normed, scaled
from app.network.presets.preset import IMAGENET, PICTURES, Layers, Preset


def _depthwise(channels: int, kernel_size: int, stride: int, activation: str) -> Layers:
    return normed(channels, kernel_size, stride=stride, groups="depthwise", activation=activation)


def _mobilenet_v1(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    small = is_small(input_shape)
    channels = scaled(32, width)
    layers = normed(channels, stride=1 if small else 2)
    for base, stride in ((64, 1), (128, 1 if small else 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5):
        layers += _separable(channels, channels := scaled(base, width), stride)
    for stride in (2, 1):  # the paper's table has 2 twice; with maps of 7 x 7 at the end the second is 1
        layers += _separable(channels, channels := scaled(1024, width), stride)
    return layers + averaged(classes)


def _separable(before: int, channels: int, stride: int) -> Layers:
    return _depthwise(before, 3, stride, "relu") + normed(channels, 1)


class _Stage(NamedTuple):
    """`blocks` inverted residuals of `channels`, each `expansion` times as wide inside; the first has the stride."""

    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel_size: int = 3


def _inverted(*stages: _Stage) -> Callable[[tuple[int, ...], int, float], Layers]:
    """Stem of 32 channels, `stages` of inverted residuals, 1280 channels, dropout of 0.2 before the classifier."""

    def layers(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
        small = is_small(input_shape)
        channels = scaled(32, width)
        result = normed(channels, stride=1 if small else 2, activation="relu6")
        first_to_halve = next(place for place, stage in enumerate(stages) if stage.stride == 2)
        for place, stage in enumerate(stages):
            stride = 1 if small and place == first_to_halve else stage.stride
            for block in range(stage.blocks):
                branch = _inverted_branch(
                    channels, channels := scaled(stage.channels, width), stage, stride if block == 0 else 1
                )
                result += branch if block == 0 else [{"type": "residual", "layers": branch, "shortcut": "identity"}]
        return result + normed(scaled(1280, width), 1, activation="relu6") + averaged(classes, dropout=0.2)

    return layers


def _inverted_branch(before: int, channels: int, stage: _Stage, stride: int) -> Layers:
    inside = before * stage.expansion
    wider = normed(inside, 1, activation="relu6") if stage.expansion > 1 else []
    return wider + _depthwise(inside, stage.kernel_size, stride, "relu6") + normed(channels, 1, activation=None)


MOBILES = (
    Preset(
        "mobilenet_v1",
        f"a 3 x 3 convolution and 13 depthwise separable ones (64 to 1024 channels); {SMALL_NOTE}",
        "Howard et al. 2017, arXiv 1704.04861, table 1",
        PICTURES,
        1,
        IMAGENET,
        1000,
        _mobilenet_v1,
    ),
    Preset(
        "mobilenet_v2",
        f"17 inverted residuals (16 to 320 channels, expanded six times inside), ReLU6, 1280 channels; {SMALL_NOTE}",
        "Sandler et al. 2018, arXiv 1801.04381, table 2",
        PICTURES,
        1,
        IMAGENET,
        1000,
        _inverted(
            _Stage(1, 16, 1, 1),
            _Stage(6, 24, 2, 2),
            _Stage(6, 32, 3, 2),
            _Stage(6, 64, 4, 2),
            _Stage(6, 96, 3, 1),
            _Stage(6, 160, 3, 2),
            _Stage(6, 320, 1, 1),
        ),
    ),
    Preset(
        "efficientnet_lite0",
        "16 inverted residuals with kernels of 3 and 5 (16 to 320 channels), ReLU6, no squeeze-and-excitation, 1280 "
        f"channels; {SMALL_NOTE}",
        "Tan & Le 2019, arXiv 1905.11946, table 1, in the lite version of its authors (2020)",
        PICTURES,
        1,
        IMAGENET,
        1000,
        _inverted(
            _Stage(1, 16, 1, 1),
            _Stage(6, 24, 2, 2),
            _Stage(6, 40, 2, 2, 5),
            _Stage(6, 80, 3, 2),
            _Stage(6, 112, 3, 1, 5),
            _Stage(6, 192, 4, 2, 5),
            _Stage(6, 320, 1, 1),
        ),
    ),
)
