"""What a preset is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Layers = list[dict[str, Any]]

PICTURES = (2,)  # the numbers of spatial axes that networks for pictures take
CIFAR = (3, 32, 32)
IMAGENET = (3, 224, 224)


@dataclass(frozen=True)
class Preset:
    """A network by name: what it takes, where it comes from, and the function that lists its layers.

    `axes` are the numbers of spatial axes that it takes, `smallest` the least size of each of them. `usual_shape`,
    as `(C, *spatial)`, and `usual_classes` are those of the data it is known for: the catalogue states its cost there.
    """

    name: str
    description: str
    source: str
    axes: tuple[int, ...]
    smallest: int
    usual_shape: tuple[int, ...]
    usual_classes: int
    layers: Callable[[tuple[int, ...], int, float], Layers]
