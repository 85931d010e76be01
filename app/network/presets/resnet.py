"""Residual networks: the CIFAR ones of basic blocks, and those for ImageNet with basic blocks or bottlenecks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from app.network.presets.blocks import averaged, is_small, normed, overlapping_pool, scaled
from app.network.presets.preset import CIFAR, IMAGENET, PICTURES, Layers, Preset

_EXPANSION = 4  # a bottleneck gives four times the channels of its 3 x 3 convolution


def _cifar(blocks_per_stage: int) -> Callable[[tuple[int, ...], int, float], Layers]:
    def layers(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
        result = normed(scaled(16, width))
        for stage, base in enumerate((16, 32, 64)):
            for block in range(blocks_per_stage):
                narrows = stage > 0 and block == 0
                branch = _basic(scaled(base, width), 2 if narrows else 1)
                result += _residual(branch, "pad" if narrows else "identity")
        return result + averaged(classes)

    return layers


def _imagenet(
    branch: Callable[[int, int], Layers], blocks: Sequence[int]
) -> Callable[[tuple[int, ...], int, float], Layers]:
    def layers(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
        channels = scaled(64, width)
        result = normed(channels) if is_small(input_shape) else normed(channels, 7, stride=2) + overlapping_pool()
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                result += _residual(branch(scaled(64 << stage, width), stride), "auto" if block == 0 else "identity")
        return result + averaged(classes)

    return layers


def _basic(channels: int, stride: int) -> Layers:
    return normed(channels, stride=stride) + normed(channels, activation=None)


def _bottleneck(channels: int, stride: int) -> Layers:
    """The stride is that of the 3 x 3 convolution, as in PyTorch and MLPerf ("v1.5"); the paper's is before it."""
    middle = normed(channels, stride=stride)
    return normed(channels, 1) + middle + normed(_EXPANSION * channels, 1, activation=None)


def _residual(branch: Layers, shortcut: str) -> Layers:
    return [{"type": "residual", "layers": branch, "shortcut": shortcut}, {"type": "relu"}]


_HE = "He et al. 2015, arXiv 1512.03385"
_CIFAR_NOTE = (
    "3 stages of 16, 32, 64 channels; shortcuts without weights (option A: every second position, zero channels)"
)
_IMAGENET_NOTE = (
    "4 stages from 64 channels, shortcuts projected where the shape changes; below 64 on a side the stem "
    "is a 3 x 3 convolution without stride and pooling, as is usual for CIFAR, else 7 x 7 and max-pooling"
)


def _small(depth: int, blocks: int) -> Preset:
    description, source = f"{depth} layers: {_CIFAR_NOTE}", f"{_HE}, section 4.2 (CIFAR networks)"
    return Preset(f"resnet{depth}", description, source, PICTURES, 1, CIFAR, 10, _cifar(blocks))


def _large(depth: int, branch: Callable[[int, int], Layers], blocks: Sequence[int], kind: str) -> Preset:
    description, source = f"{depth} layers, {kind}: {_IMAGENET_NOTE}", f"{_HE}, table 1"
    return Preset(f"resnet{depth}", description, source, PICTURES, 1, IMAGENET, 1000, _imagenet(branch, blocks))


RESNETS = (
    _small(20, 3),
    _small(32, 5),
    _small(56, 9),
    _small(110, 18),
    _large(18, _basic, (2, 2, 2, 2), "basic blocks"),
    _large(34, _basic, (3, 4, 6, 3), "basic blocks"),
    _large(50, _bottleneck, (3, 4, 6, 3), "bottlenecks (1 x 1, 3 x 3 with the stride, 1 x 1)"),
)
