"""Random networks from a seed, with every layer and every way of joining and moving channels; and sets of classes."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.pruning.channel_classes import Classes

CLASSES = 3
MOST_POSITIONS = 40
MOST_CHANNELS = 24
RECTIFIERS = ("relu", "relu6", "leaky_relu", "prelu", "silu", "gelu", "hardswish")
ACTIVATIONS = (*RECTIFIERS, "hardsigmoid", "sigmoid", "tanh", "dropout")


class Made(NamedTuple):
    """What a layer gives: its name, channels (or features), and spatial size (none: flat)."""

    name: str
    channels: int
    size: tuple[int, ...]


class Owner(NamedTuple):
    """A layer whose parameters others may use."""

    name: str
    kind: str
    channels: int
    gives: int
    axes: int
    factor: int
    """by which it makes its input larger"""


class _Draw:
    """Collects layers. Only the last few outputs are read again, so that networks are deep; what no layer reads is joined
    at the end."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.axes = self.random.choice((1, 2, 2, 3))
        size = tuple(self.random.choice((3, 4)) for _ in range(self.axes))
        self.input_shape = (self.random.choice((1, 3)), *size)
        self.layers: list[dict[str, Any]] = []
        self.made: list[Made] = [Made("input", self.input_shape[0], size)]
        self.used: set[str] = set()
        self.owners: list[Owner] = []

    def choice(self, *options: Any) -> Any:
        return self.random.choice(options)

    def add(self, kind: str, inputs: list[str], channels: int, size: tuple[int, ...], /, **fields: Any) -> Made:
        made = Made(f"n{len(self.layers)}", channels, size)
        self.layers.append({"type": kind, "name": made.name, "inputs": inputs, **fields})
        self.made.append(made)
        self.used.update(inputs)
        return made

    def same(self, kind: str, source: Made, **fields: Any) -> Made:
        """A layer that keeps the shape."""
        made = self.add(kind, [source.name], source.channels, source.size, **fields)
        if kind in ("prelu", "group_norm", "layer_norm"):
            self.owners.append(Owner(made.name, kind, source.channels, source.channels, len(source.size), 1))
        return made

    def conv(self, source: Made, channels: int, kernel: int = 3, **fields: Any) -> Made:
        taps = {"out_channels": channels, "kernel_size": kernel, "padding": "same", "bias": self.choice(True, False)}
        made = self.add("conv", [source.name], channels, source.size, **taps, **fields)
        self.owners.append(Owner(made.name, "conv", source.channels, channels, self.axes, 1))
        return made

    def linear(self, source: Made, features: int) -> Made:
        fields = {"out_features": features, "bias": self.choice(True, False)}
        made = self.add("linear", [source.name], features, (), **fields)
        self.owners.append(Owner(made.name, "linear", source.channels, features, 0, 1))
        return made

    def producer(self, source: Made, channels: int, **fields: Any) -> Made:
        """A layer with fresh channels."""
        return self.conv(source, channels, **fields) if source.size else self.linear(source, channels)

    def transposed(self, source: Made) -> None:
        groups = self.choice(*(g for g in (1, 2, 3, "depthwise") if g == "depthwise" or source.channels % g == 0))
        width = source.channels * self.choice(1, 2) if groups == "depthwise" else 6
        factor = self.choice(1, 2) if math.prod(source.size) * 2**self.axes <= MOST_POSITIONS else 1
        taps: dict[str, Any] = {"kernel_size": 3, "padding": 1, "stride": factor, "output_padding": factor - 1}
        size = tuple(length * factor for length in source.size)
        made = self.add("conv_transpose", [source.name], width, size, out_channels=width, groups=groups, **taps)
        self.owners.append(Owner(made.name, "conv_transpose", source.channels, width, self.axes, factor))

    def share(self, source: Made) -> None:
        """Uses an earlier layer once more, one that fits and, of some, one that takes as many channels."""
        room = MOST_POSITIONS // max(1, math.prod(source.size))
        fitting = [
            owner
            for owner in self.owners
            if owner.channels == source.channels and owner.axes == len(source.size) and owner.factor**owner.axes <= room
        ]
        if not fitting:
            self.producer(source, self.choice(2, 4, 6))
            fitting = self.owners[-1:]
        owner = self.choice(*fitting)
        size = tuple(length * owner.factor for length in source.size)
        self.add(owner.kind, [source.name], owner.gives, size, shares=owner.name)

    def shortcut(self, source: Made) -> None:
        """A residual block; with other channels than its input by projection or by padding."""
        if not source.size:
            self.add(
                "residual",
                [source.name],
                source.channels,
                (),
                layers=[{"type": "linear", "out_features": source.channels}],
            )
            return
        kind = self.choice("auto", "identity", "projection", "pad")
        width = source.channels if kind == "identity" else source.channels + self.choice(0, 1, 2)
        inner: list[dict[str, Any]] = [
            {"type": "conv", "out_channels": self.choice(2, 3, width), "kernel_size": 1},
            {"type": self.choice("batch_norm", "silu", "sigmoid")},
            {"type": "conv", "out_channels": width, "kernel_size": 3, "padding": 1},
            {"type": self.choice("batch_norm", "prelu", "spatial_dropout")},
        ]
        self.add("residual", [source.name], width, source.size, shortcut=kind, layers=inner)

    def repeated(self, source: Made) -> None:
        """Two residual blocks in a row, each with weights of its own."""
        inner = [{"type": "batch_norm"}, {"type": "relu"}]
        inner.append({"type": "conv", "out_channels": source.channels, "kernel_size": 3, "padding": 1, "bias": False})
        layers = [{"type": "residual", "layers": inner}, {"type": self.choice("relu", "sigmoid")}]
        self.add("repeat", [source.name], source.channels, source.size, times=2, layers=layers)

    def attention(self, source: Made) -> None:
        """A weight for each channel, one for all channels, or a map of one channel."""
        whole = self.choice(True, False)
        gate = self.add("global_avg_pool", [source.name], source.channels, (1,) * self.axes) if whole else source
        gate = self.conv(gate, 2, 1)
        gate = self.conv(gate, self.choice(1, source.channels) if whole else 1, self.choice(1, 3) if not whole else 1)
        gate = self.same(self.choice("sigmoid", "hardsigmoid"), gate)
        inner = {layer["name"] for layer in self.layers[-4 if whole else -3 :]}
        self.made = [made for made in self.made if made.name not in inner]
        order = [source.name, gate.name] if self.choice(True, False) else [gate.name, source.name]
        self.add("multiply", order, source.channels, source.size)

    def resize(self, source: Made) -> None:
        """Pooling, a stride, or upsampling."""
        smaller = tuple(length // 2 for length in source.size)
        kind = self.choice("max_pool", "avg_pool", "conv", "upsample", "subsample")
        if kind == "upsample" or min(smaller) < 1:
            if math.prod(source.size) * 2**self.axes <= MOST_POSITIONS:
                mode = self.choice("nearest", ("linear", "bilinear", "trilinear")[self.axes - 1])
                size = tuple(2 * length for length in source.size)
                self.add("upsample", [source.name], source.channels, size, scale_factor=2, mode=mode)
            return
        if kind == "conv":
            channels = self.choice(2, 4, 6)
            taps = {"out_channels": channels, "kernel_size": 2, "stride": 2, "bias": self.choice(True, False)}
            self.add("conv", [source.name], channels, smaller, **taps)
        elif kind == "subsample":
            size = tuple(-(-length // 2) for length in source.size)
            self.add("max_pool", [source.name], source.channels, size, kernel_size=1, stride=2)
        else:
            self.add(kind, [source.name], source.channels, smaller, kernel_size=2)

    def pad(self, source: Made) -> None:
        """Of channels before and after, or of positions; with a value that is not always zero."""
        front, back = self.random.randrange(3), self.random.randrange(3)
        value = self.choice(0.0, 0.5, -1.0)
        if self.choice(True, False) or not source.size or math.prod(source.size) > MOST_POSITIONS // 2:
            pairs = [0, 0] * len(source.size) + [front, back]
            self.add("pad", [source.name], source.channels + front + back, source.size, padding=pairs, value=value)
            return
        mode = self.choice("constant", "reflect", "replicate", "circular") if min(source.size) > 1 else "constant"
        size = (*source.size[:-1], source.size[-1] + 1)
        more = {"value": value} if mode == "constant" else {}
        self.add("pad", [source.name], source.channels, size, padding=[0, 1], mode=mode, **more)

    def slice(self, source: Made) -> None:
        start = self.random.randrange(source.channels - 1)
        stop = self.random.randrange(start + 1, source.channels + 1)
        self.add("slice", [source.name], stop - start, source.size, start=start, stop=stop)

    def join(self, source: Made) -> None:
        """Elementwise with a fresh layer, with an earlier one of the same shape, or with itself."""
        alike = [made for made in self.made if made[1:] == source[1:]]
        others = [self.choice(*alike) if self.choice(True, False) else self.producer(source, source.channels)]
        if self.choice(True, False, False):
            others.append(self.choice(*alike, *others))
        names = [source.name, *(other.name for other in others)]
        self.add(self.choice("add", "add", "multiply"), names, source.channels, source.size)

    def concat(self, source: Made) -> None:
        alike = [made for made in self.made if made.size == source.size]
        parts = [source, *(self.choice(*alike) for _ in range(self.choice(1, 1, 2)))]
        self.random.shuffle(parts)
        width = sum(part.channels for part in parts)
        if width <= MOST_CHANNELS:
            self.add("concat", [part.name for part in parts], width, source.size)

    def normalise(self, source: Made) -> None:
        sizes = [size for size in (2, 3) if source.channels % size == 0]
        if sizes and self.choice(True, False):
            self.same("group_norm", source, num_groups=source.channels // self.choice(*sizes))
        elif self.choice(True, False, False, False):  # seldom: they hold all that is tied to them
            self.same(self.choice("layer_norm", "softmax"), source)
        else:
            self.same("batch_norm", source)

    def grouped(self, source: Made) -> None:
        fitting = [groups for groups in (2, 3, source.channels) if groups > 1 and source.channels % groups == 0]
        if self.choice(True, False) or not fitting:
            self.conv(source, source.channels * self.choice(1, 2, 3), groups="depthwise")
        else:
            groups = self.choice(*fitting)
            self.conv(source, groups * self.choice(1, 2, 3), groups=groups)

    def shuffle(self, source: Made) -> None:
        fitting = [groups for groups in range(2, source.channels) if source.channels % groups == 0]
        if fitting:
            self.same("channel_shuffle", source, groups=self.choice(*fitting))

    def flatten(self, source: Made) -> None:
        features = source.channels * math.prod(source.size)
        if features <= 4 * MOST_CHANNELS:
            self.add("flatten", [source.name], features, ())

    def step(self) -> None:
        """Adds up to six layers after one or more of the last ones."""
        source = self.choice(*self.made[-4:])
        steps = [self.join, self.join, self.concat, self.concat, self.normalise, self.shuffle, self.pad, self.share]
        steps += [self.shortcut]
        if source.channels > 1:
            steps.append(self.slice)
        if source.size:
            steps += [self.grouped, self.grouped, self.transposed, self.attention, self.resize, self.repeated]
            steps += [self.flatten]
        kind = self.random.randrange(len(steps) + 6)
        if kind < len(steps):
            steps[kind](source)
        elif kind == len(steps) and source.size:
            gate = self.choice("sigmoid", "hardsigmoid")
            self.same("squeeze_excite", source, channels=self.choice(1, 2, 3), gate=gate)
        else:
            made = self.producer(source, self.choice(2, 4, 6))
            if self.choice(True, False):
                self.normalise(made)
            self.same(self.choice(*ACTIVATIONS), self.made[-1])

    def finish(self) -> None:
        """Joins all that no layer has read yet, flattened whole or pooled first, in one of three ways."""
        ends = [made for made in self.made if made.name not in self.used and made.name != "input"]
        if len(ends) == 1 and ends[0].size and self.choice(True, False):
            last = self.conv(ends[0], CLASSES, 1)
            pooled = self.add("global_avg_pool", [last.name], CLASSES, (1,) * self.axes)
            self.add("flatten", [pooled.name], CLASSES, ())
            return
        flat = [self._flat(end) for end in ends]
        if len(flat) > 1 and self.choice(True, False, False):
            names = [self.linear(end, CLASSES).name for end in flat]
            self.add("add", names, CLASSES, ())
            return
        if len(flat) > 1:
            flat = [self.add("concat", [end.name for end in flat], sum(end.channels for end in flat), ())]
        hidden = self.linear(flat[0], 4)
        self.linear(self.same("sigmoid", hidden), CLASSES)

    def _flat(self, end: Made) -> Made:
        if not end.size:
            return end
        size = end.size
        if self.choice(True, False):
            size = (1,) * self.axes
            end = self.add("global_avg_pool", [end.name], end.channels, size)
        return self.add("flatten", [end.name], end.channels * math.prod(size), ())


def random_graph(seed: int) -> Graph:
    """A graph of 5 to 60 layers on inputs with one to three spatial axes; the same for the same seed."""
    draw = _Draw(seed)
    for _ in range(draw.random.randrange(3, 12)):
        draw.step()
    draw.finish()
    return build_graph(read_layers(draw.layers), draw.input_shape, classes=CLASSES)


def random_drop(classes: Classes, share: float, seed: int) -> list[int]:
    """About `share` of the classes that may go, at least one of each group stays; ascending."""
    rng = random.Random(seed)
    dropped: list[int] = []
    for group in classes.groups:
        free = [c for c in group.classes.tolist() if c not in classes.pins]
        count = min(len(free) - 1, round(share * len(free)))
        dropped += rng.sample(free, max(0, count))
    return sorted(dropped)


def one_class(classes: Classes, seed: int) -> list[int]:
    """One class that may go, of a group with more than one; empty where there is none."""
    free = [c for group in classes.groups if len(group.classes) > 1 for c in group.classes.tolist()]
    free = [c for c in free if c not in classes.pins]
    return random.Random(seed).sample(free, 1) if free else []
