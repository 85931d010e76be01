"""Plain chains of convolutions and linear layers: simple_cnn, deep_cnn, LeNet-5."""

from __future__ import annotations

from app.network.presets.blocks import conv, halve, linear, scaled
from app.network.presets.preset import CIFAR, PICTURES, Layers, Preset


def _simple_cnn(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    size, layers = list(input_shape[1:]), Layers()
    for channels in (32, 64):
        layers += [conv(scaled(channels, width), padding="same"), {"type": "relu"}, *halve(size)]
    return [*layers, {"type": "flatten"}, linear(scaled(128, width)), {"type": "relu"}, linear(classes)]


def _deep_cnn(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    size, layers = list(input_shape[1:]), Layers()
    for channels in (32, 64, 128, 256):
        layers += [conv(scaled(channels, width), padding="same"), {"type": "batch_norm"}, {"type": "relu"}]
        layers += halve(size)
    return [*layers, {"type": "flatten"}, linear(scaled(1024, width)), {"type": "relu"}, linear(classes)]


def _lenet5(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    padding = 0 if min(input_shape[1:]) >= 32 else 2  # the paper pads its 28 x 28 digits to 32 x 32
    layers: Layers = []
    for channels, pad in ((6, padding), (16, 0)):
        layers += [conv(scaled(channels, width), 5, padding=pad), {"type": "tanh"}]
        layers.append({"type": "avg_pool", "kernel_size": 2})
    layers.append({"type": "flatten"})
    for features in (120, 84):
        layers += [linear(scaled(features, width)), {"type": "tanh"}]
    return [*layers, linear(classes)]


PLAIN = (
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
        CIFAR,
        10,
        _deep_cnn,
    ),
    Preset(
        "lenet5",
        "two 5 x 5 convolutions (6, 16), tanh, plain average pooling, linear layers of 120 and 84, no RBF output",
        "LeCun et al. 1998, Gradient-based learning applied to document recognition",
        PICTURES,
        12,
        (1, 28, 28),
        10,
        _lenet5,
    ),
)
