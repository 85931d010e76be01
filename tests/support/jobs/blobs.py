"""Small images that can be learnt, and batches of them without a file: for tests of the training loop alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers


def graph_of(layers: Sequence[dict[str, Any]], input_shape: tuple[int, ...] = (1, 8, 8)) -> Graph:
    """The graph of layers written as JSON values."""
    return build_graph(read_layers(list(layers)), input_shape)


def small_cnn(*, norm: bool = True, dropout: float = 0.0, channels: int = 4, classes: int = 3) -> Graph:
    """conv, (batch norm), relu, max-pool, (dropout), linear: for 1 x 8 x 8 images."""
    layers: list[dict[str, Any]] = [{"type": "conv", "out_channels": channels, "kernel_size": 3, "padding": 1}]
    layers += [{"type": "batch_norm"}] if norm else []
    layers += [{"type": "relu"}, {"type": "max_pool", "kernel_size": 2}, {"type": "flatten"}]
    layers += [{"type": "dropout", "p": dropout}] if dropout else []
    return graph_of([*layers, {"type": "linear", "out_features": classes}])


def blobs(images: int, *, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images N x 1 x 8 x 8 with a bright band whose height tells the class, under noise, and labels N."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(images) % classes
    images_NCHW = torch.randn(images, 1, 8, 8, generator=generator)
    for row, label in enumerate(labels_N.tolist()):
        images_NCHW[row, :, 2 * label : 2 * label + 2] += 2.0
    return images_NCHW, labels_N


@dataclass
class BlobBatches:
    """Batches of blobs; the order of an epoch depends on its number alone."""

    images: int = 48
    batch_size: int = 8
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        self._images_NCHW, self._labels_N = blobs(self.images, seed=self.seed)

    def __len__(self) -> int:
        return self.images // self.batch_size

    def epoch(self, number: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `number` from batch `start` on."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        order = torch.randperm(self.images, generator=generator) if self.shuffle else torch.arange(self.images)
        for batch in range(start, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self._images_NCHW[chosen], self._labels_N[chosen]
