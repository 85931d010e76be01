"""Networks whose layers take several outputs: DenseNet, ShuffleNet, small Inception, SqueezeNet."""

from __future__ import annotations

from typing import Any

from app.network.presets.blocks import (
    SMALL_NOTE,
    averaged,
    conv,
    fed_by,
    halve,
    is_small,
    last_named,
    normed,
    overlapping_pool,
    scaled,
)
from app.network.presets.preset import CIFAR, IMAGENET, PICTURES, Layers, Preset


def _concat(name: str, *inputs: str) -> dict[str, Any]:
    return {"type": "concat", "inputs": list(inputs), "name": name}


def _densenet40(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    growth, channels = scaled(12, width), scaled(16, width)
    size, active = list(input_shape[1:]), [{"type": "batch_norm"}, {"type": "relu"}]
    layers: Layers = [conv(channels, padding=1, bias=False, name="stem")]
    seen = "stem"
    for block in (1, 2, 3):
        if block > 1:
            narrow = halve(size, "avg_pool")
            layers += last_named([*active, conv(channels, 1, bias=False), *narrow], f"transition{block - 1}")
            seen = f"transition{block - 1}"
        for step in range(1, 13):
            new = f"block{block}_conv{step}"
            layers += fed_by([*active, conv(growth, padding=1, bias=False, name=new)], seen)
            layers.append(_concat(f"block{block}_all{step}", seen, new))
            seen = f"block{block}_all{step}"
            channels += growth
    return [*layers, *active, *averaged(classes)]


def _shufflenet_v2(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    stem = normed(scaled(24, width), stride=1 if is_small(input_shape) else 2)
    layers = last_named(stem if is_small(input_shape) else stem + overlapping_pool(), "stem")
    before, seen = scaled(24, width), "stem"
    for stage, (base, units) in enumerate(((58, 4), (116, 8), (232, 4)), start=2):
        half = scaled(base, width)
        for unit in range(1, units + 1):
            name = f"stage{stage}_unit{unit}"
            layers += _halving_unit(name, seen, before, half) if unit == 1 else _unit(name, seen, half)
            seen = name
        before = 2 * half
    return layers + normed(scaled(1024, width), 1) + averaged(classes)


def _unit(name: str, seen: str, half: int) -> Layers:
    """One half of the channels passes by, the other goes through three convolutions; then all are shuffled."""
    left = {"type": "slice", "start": 0, "stop": half, "inputs": [seen], "name": f"{name}_left"}
    right = {"type": "slice", "start": half, "stop": 2 * half, "inputs": [seen]}
    return [left, right, *last_named(_shuffle_branch(half, half, 1), f"{name}_right"), *_shuffled(name)]


def _halving_unit(name: str, seen: str, before: int, half: int) -> Layers:
    left = normed(before, stride=2, groups="depthwise", activation=None) + normed(half, 1)
    right = _shuffle_branch(before, half, 2)
    return [
        *last_named(fed_by(left, seen), f"{name}_left"),
        *last_named(fed_by(right, seen), f"{name}_right"),
        *_shuffled(name),
    ]


def _shuffle_branch(before: int, half: int, stride: int) -> Layers:
    middle = normed(half, stride=stride, groups="depthwise", activation=None)
    return normed(half, 1) + middle + normed(half, 1)


def _shuffled(name: str) -> Layers:
    return [
        _concat(f"{name}_both", f"{name}_left", f"{name}_right"),
        {"type": "channel_shuffle", "groups": 2, "name": name},
    ]


def _inception_small(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    layers = last_named(normed(scaled(96, width)), "stem")
    seen, place = "stem", 0
    for modules, downsampled in (
        (((32, 32), (32, 48)), 80),
        (((112, 48), (96, 64), (80, 80), (48, 96)), 96),
        (((176, 160), (176, 160)), 0),
    ):
        for one, three in modules:
            place += 1
            narrow, wide, name = f"mixed{place}_1x1", f"mixed{place}_3x3", f"mixed{place}"
            layers += last_named(fed_by(normed(scaled(one, width), 1), seen), narrow)
            layers += last_named(fed_by(normed(scaled(three, width)), seen), wide)
            layers.append(_concat(name, narrow, wide))
            seen = name
        if downsampled:
            wide, pooled, name = f"mixed{place}_strided", f"mixed{place}_pooled", f"mixed{place}_smaller"
            layers += last_named(fed_by(normed(scaled(downsampled, width), stride=2), seen), wide)
            layers += last_named(fed_by(overlapping_pool(), seen), pooled)
            layers.append(_concat(name, wide, pooled))
            seen = name
    return layers + averaged(classes)


def _squeezenet(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    small = is_small(input_shape)
    pooled: Layers = [{"type": "max_pool", "kernel_size": 3, "stride": 2, "ceil_mode": True}]
    first = conv(scaled(64, width), padding=1) if small else conv(scaled(64, width), stride=2)
    layers: Layers = [first, {"type": "relu"}]
    for place, (squeeze, expand) in enumerate(
        ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)), start=2
    ):
        if place in (4, 6) or (place == 2 and not small):
            layers += pooled
        layers += _fire(f"fire{place}", scaled(squeeze, width), scaled(expand, width))
    drop: Layers = [{"type": "dropout", "p": 0.5}]
    return [*layers, *drop, conv(classes, 1), {"type": "relu"}, {"type": "global_avg_pool"}, {"type": "flatten"}]


def _fire(name: str, squeeze: int, expand: int) -> Layers:
    """A narrow 1 x 1 convolution, and after it a 1 x 1 and a 3 x 3 one side by side."""
    one, three, narrow = f"{name}_1x1", f"{name}_3x3", f"{name}_narrow"
    return [
        conv(squeeze, 1),
        {"type": "relu", "name": narrow},
        conv(expand, 1, inputs=[narrow], name=one),
        conv(expand, 3, padding=1, inputs=[narrow], name=three),
        _concat(name, one, three),
        {"type": "relu"},
    ]


BRANCHING = (
    Preset(
        "densenet40",
        "40 layers, growth rate 12, no bottlenecks, no compression: 3 blocks of 12 convolutions, each of which takes "
        "all outputs before it in its block; 1 x 1 convolutions and average pooling between the blocks",
        "Huang et al. 2016, arXiv 1608.06993, section 3 (DenseNet, L = 40, k = 12)",
        PICTURES,
        1,
        CIFAR,
        10,
        _densenet40,
    ),
    Preset(
        "shufflenet_v2",
        "16 units of two branches whose channels are shuffled (116, 232, 464 channels: 1.0x), 1024 channels; "
        f"{SMALL_NOTE}",
        "Ma et al. 2018, arXiv 1807.11164, table 5",
        PICTURES,
        1,
        IMAGENET,
        1000,
        _shufflenet_v2,
    ),
    Preset(
        "inception_small",
        "a 3 x 3 convolution of 96, eight modules of 1 x 1 and 3 x 3 convolutions side by side, two that halve the "
        "size (a strided convolution beside max-pooling), batch norm; also known as MiniGoogLeNet",
        "Zhang et al. 2016, arXiv 1611.03530, figure 3 (small Inception)",
        PICTURES,
        1,
        (3, 28, 28),
        10,
        _inception_small,
    ),
    Preset(
        "squeezenet",
        "version 1.1: eight fire modules (1 x 1, then 1 x 1 beside 3 x 3), a 1 x 1 convolution and a global average for "
        "the classes; no batch norm, so that it hardly learns with high rates unless the optimization batch_norm inserts "
        "it; below 64 on a side the first two of four halvings are left out",
        "Iandola et al. 2016, arXiv 1602.07360, in version 1.1 of its authors",
        PICTURES,
        6,
        IMAGENET,
        1000,
        _squeezenet,
    ),
)
