"""Random networks from a seed, with every way of joining and moving channels; and random sets of classes to drop."""

from __future__ import annotations

import random
from typing import Any

from app.spec.channels import Classes
from app.spec.graph import Graph, build_graph
from app.spec.layers import read_layers

CLASSES = 3
Made = tuple[str, int]
"""(name of a layer, its channels); all layers have one spatial size."""


class _Draw:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.axes = self.random.choice((1, 2, 2, 3))
        self.input_shape = (self.random.choice((1, 3)), *(self.random.choice((3, 4)) for _ in range(self.axes)))
        self.layers: list[dict[str, Any]] = []
        self.made: list[Made] = [("input", self.input_shape[0])]
        self.used: set[str] = set()
        self.owners: list[tuple[str, int, int]] = []
        """(name, input channels, output channels) of convolutions, whose parameters others may use."""

    def add(self, kind: str, inputs: list[str], channels: int, **fields: Any) -> Made:
        made = (f"n{len(self.layers)}", channels)
        self.layers.append({"type": kind, "name": made[0], "inputs": inputs, **fields})
        self.made.append(made)
        self.used.update(inputs)
        return made

    def conv(self, source: Made, channels: int, kernel: int = 3, **fields: Any) -> Made:
        bias = self.random.random() < 0.5
        same = {"out_channels": channels, "kernel_size": kernel, "padding": "same", "bias": bias}
        made = self.add("conv", [source[0]], channels, **same, **fields)
        self.owners.append((made[0], source[1], channels))
        return made

    def share(self, source: Made) -> None:
        """Uses a convolution of the input width of `source` once more, brought about if there is none."""
        fitting = [owner for owner in self.owners if owner[1] == source[1]]
        if not fitting:
            self.conv(source, self.random.choice((2, 4, 6)))
            fitting = self.owners[-1:]
        name, _, channels = self.random.choice(fitting)
        self.add("conv", [source[0]], channels, shares=name)

    def step(self) -> None:
        """Adds one to four layers behind one or two of the last ones."""
        name, channels = source = self.random.choice(self.made[-4:])
        match self.random.randrange(13):
            case 0 | 1:
                made = self.conv(source, self.random.choice((2, 4, 6)))
                norm = self.add("batch_norm", [made[0]], made[1])
                self.add(self.random.choice(("relu", "sigmoid", "tanh", "prelu")), [norm[0]], made[1])
            case 2:
                self.conv(source, channels * self.random.choice((1, 2)), groups="depthwise")
            case 3 if channels % 2 == 0:
                self.conv(source, self.random.choice((2, 4, 8)), groups=2)
            case 4:
                other = self.conv(self.random.choice(self.made), channels)
                self.add(self.random.choice(("add", "multiply")), [name, other[0]], channels)
            case 5:
                other = self.random.choice(self.made)
                self.add("concat", [name, other[0], name][: self.random.choice((2, 3))], 0)
                self._count_concat()
            case 6 if channels > 1:
                start = self.random.randrange(channels - 1)
                stop = self.random.randrange(start + 1, channels + 1)
                self.add("slice", [name], stop - start, start=start, stop=stop)
            case 7 if channels % 2 == 0:
                self.add("channel_shuffle", [name], channels, groups=2)
            case 8:
                front, back = self.random.randrange(3), self.random.randrange(3)
                pairs = [0, 0] * self.axes + [front, back]
                self.add("pad", [name], channels + front + back, padding=pairs, value=self.random.choice((0.0, 0.5)))
            case 9 if channels % 2 == 0:
                self.add("group_norm", [name], channels, num_groups=channels // 2)
            case 10:
                weighed = self.add("global_avg_pool", [name], channels)
                weighed = self.conv(weighed, 2, 1)
                weighed = self.conv(weighed, self.random.choice((1, channels)), 1)
                self.made = [made for made in self.made if made[0] not in {entry["name"] for entry in self.layers[-3:]}]
                self.add("multiply", [name, weighed[0]], channels)
            case 11 if channels % 2 == 0:
                taps = {"kernel_size": 3, "padding": 1, "groups": self.random.choice((1, 2))}
                self.add("conv_transpose", [name], 4, out_channels=4, **taps)
            case 12:
                self.share(source)
            case _:
                self.add("batch_norm", [name], channels)

    def _count_concat(self) -> None:
        widths = dict(self.made)
        name, _ = self.made[-1]
        self.made[-1] = (name, sum(widths[source] for source in self.layers[-1]["inputs"]))

    def finish(self) -> None:
        """Joins all that nobody has read yet: flattened whole, or pooled first."""
        ends = [name for name, _ in self.made if name not in self.used and name != "input"]
        flat = []
        for end in ends:
            pooled = self.add("global_avg_pool", [end], 0)[0] if self.random.random() < 0.5 else end
            flat.append(self.add("flatten", [pooled], 0)[0])
        if len(flat) > 1:
            flat = [self.add("concat", flat, 0)[0]]
        hidden = self.add("linear", flat, 0, out_features=4)
        active = self.add("sigmoid", [hidden[0]], 0)
        self.add("linear", [active[0]], 0, out_features=CLASSES)


def random_graph(seed: int) -> Graph:
    """A graph of 5 to 30 layers on inputs with one to three spatial axes; the same for the same seed."""
    draw = _Draw(seed)
    for _ in range(draw.random.randrange(3, 10)):
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
