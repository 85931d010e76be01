"""Stacks of 3 x 3 convolutions: VGG, and the contracting path of U-Net."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from app.network.presets.blocks import averaged, halve, linear, normed, scaled
from app.network.presets.preset import CIFAR, IMAGENET, PICTURES, Layers, Preset


def _vgg(stages: Sequence[Sequence[int]]) -> Callable[[tuple[int, ...], int, float], Layers]:
    def layers(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
        size, result = list(input_shape[1:]), Layers()
        for stage in stages:
            for channels in stage:
                result += normed(scaled(channels, width))
            result += halve(size)
        if size != [7, 7]:
            return result + averaged(classes)
        result.append({"type": "flatten"})
        for _ in range(2):
            result += [linear(scaled(4096, width)), {"type": "relu"}, {"type": "dropout", "p": 0.5}]
        return [*result, linear(classes)]

    return layers


def _unet_encoder(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    size, layers = list(input_shape[1:]), Layers()
    for level in range(5):
        if level:
            layers += halve(size)
        for _ in range(2):
            layers += normed(scaled(64 << level, width))
    return layers + averaged(classes, dropout=0.5)


def _stages(*convs: int) -> tuple[tuple[int, ...], ...]:
    return tuple((channels,) * count for channels, count in zip((64, 128, 256, 512, 512), convs, strict=True))


_VGG_NOTE = "two linear layers of 4096 where the last map is 7 x 7 (inputs of 224 to 255), else a global average"


def _preset(depth: int, *convs: int) -> Preset:
    description = f"{sum(convs)} convolutions 3 x 3 in 5 stages (64 to 512); {_VGG_NOTE}"
    source = "Simonyan & Zisserman 2014, arXiv 1409.1556, with batch norm"
    return Preset(f"vgg{depth}", description, source, PICTURES, 1, CIFAR, 10, _vgg(_stages(*convs)))


VGGS = (
    _preset(11, 1, 1, 2, 2, 2),
    _preset(16, 2, 2, 3, 3, 3),
    _preset(19, 2, 2, 4, 4, 4),
    Preset(
        "unet_encoder",
        "the contracting path of U-Net as a classifier: 5 levels of two 3 x 3 convolutions (64 to 1024), max-pooling "
        "between them; padded, with batch norm, dropout at the end, a global average and a linear layer",
        "Ronneberger et al. 2015, arXiv 1505.04597, figure 1",
        PICTURES,
        1,
        IMAGENET,
        1000,
        _unet_encoder,
    ),
)
