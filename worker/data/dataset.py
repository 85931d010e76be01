"""From a packed data set to batches on the device.

The arrays of a packed folder are mapped into memory, never loaded whole unless they fit the device. Images stay uint8
(or float32, as they were sent) until a batch is cut; then they are augmented, turned into float32 and normalised, all
of a batch at once.

Axes: N examples, C channels, x stands for one, two or three axes of space.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from app.datasets.packed.holdout import stratified_mask
from app.datasets.packed.packed import examples_per_block, read_manifest
from app.datasets.packed.resizing import ensure_resized
from app.errors import DataInvalid
from app.network.architecture import Preprocessing
from app.spec.data import DataSpec, Layout
from worker.data.augmentation import Axes, cut_out, shift_and_flip, source_positions

Labels = npt.NDArray[np.int64]
Images = npt.NDArray[Any]

SHARE_OF_DEVICE = 0.4  # of the free memory of a GPU: the rest is for weights and activations
SHARE_OF_HOST = 0.25  # of the free memory of a machine that trains on its processor


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed of 63 bits for one purpose: the same for the same `seed` and `parts`, unrelated for others."""
    digest = hashlib.sha256(json.dumps([seed, *parts]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class ImageFile:
    """An `.npy` file of images and where its channels are; opened anew for every pass, so touched pages are freed."""

    path: Path
    layout: Layout

    def open(self) -> Images:
        """A read-only view N x C x ... of the mapped file."""
        array = np.load(self.path, mmap_mode="r")
        if self.layout == "no_channels":
            return np.expand_dims(array, 1)
        return np.moveaxis(array, -1, 1) if self.layout == "channels_last" else array


@dataclass(frozen=True)
class Split:
    """Some examples: labels N, and where the images stand: row `rows[i]` of `source`, row i where `rows` is None."""

    source: ImageFile | Images
    labels: Labels
    rows: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Images:
        """The images N x C x ...: a view where the split is all of its source, else a copy in memory."""
        source = self.open()
        return source if self.rows is None else source[self.rows]

    def open(self) -> Images:
        """All images of the source M x C x ..., a mapped view or the array itself."""
        return self.source.open() if isinstance(self.source, ImageFile) else self.source

    def take(self, index: npt.NDArray[np.int64]) -> Split:
        """The split that has only the examples `index`, in that order."""
        return Split(self.source, self.labels[index], index if self.rows is None else self.rows[index])

    def read(self, index: npt.NDArray[np.int64], source: Images | None = None) -> Images:
        """A copy of the images `index`, len(index) x C x ...; read in the file's order, not that of `index`."""
        rows = index if self.rows is None else self.rows[index]
        opened = self.open() if source is None else source
        order = np.argsort(rows, kind="stable")
        images = np.empty((len(rows), *opened.shape[1:]), opened.dtype)
        images[order] = opened[rows[order]]
        return images

    def blocks(self) -> Iterator[Images]:
        """The images in order, about 4 MiB at a time, M x C x ... each."""
        source = self.open()
        step = examples_per_block(source.shape[1:], source.dtype.itemsize)
        for start in range(0, len(self), step):
            yield self.read(np.arange(start, min(start + step, len(self))), source)

    @property
    def size_bytes(self) -> int:
        """What the images take in memory."""
        source = self.open()
        return len(self) * math.prod(source.shape[1:]) * source.dtype.itemsize


@dataclass(frozen=True)
class Dataset:
    """A packed data set, seen through a job's `input_shape`; `notes` are sentences for the report."""

    name: str
    class_names: tuple[str, ...]
    scale: float
    sha256: str
    train: Split
    test: Split
    notes: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, input_shape: Sequence[int]) -> Dataset:
        """The data set in a packed folder with examples of `input_shape` `(C, *spatial)`.

        Pictures of other sizes are resized once; the copy is kept in the folder.

        Raises DataInvalid where the folder holds no data set or its examples do not fit.
        """
        shape = tuple(input_shape)
        try:
            manifest = read_manifest(folder)
        except (OSError, ValueError, KeyError) as error:
            raise DataInvalid(f"{folder} holds no packed data set: {error}") from error
        layout = manifest.facts().layout(shape)
        if layout is None:
            stated = list(manifest.example_shape or ())
            raise DataInvalid(
                f"the examples of {manifest.name} have the shape {stated}, the job's input_shape is {list(shape)}",
                pointer="/model/input_shape",
            )
        notes = list(manifest.notes)
        parts: list[Split] = []
        for split in ("train", "test"):
            source = ImageFile(folder / f"{split}.images.npy", layout)
            if layout == "pictures":
                source = ImageFile(ensure_resized(folder, split, shape), "channels_first")
            parts.append(Split(source, np.load(folder / f"{split}.labels.npy")))
        if layout == "pictures":
            channels = "grey" if shape[0] == 1 else "RGB"
            notes.append(
                f"pictures were resized to {shape[1]} x {shape[2]} {channels} (bilinear, sides stretched to fit)"
            )
        return cls(manifest.name, manifest.classes, manifest.scale, manifest.sha256, parts[0], parts[1], tuple(notes))


@dataclass(frozen=True)
class Splits:
    """What a job trains on, chooses by, and reports on; `validation` may be empty."""

    train: Split
    validation: Split
    test: Split


def split_dataset(dataset: Dataset, data: DataSpec, seed: int) -> Splits:
    """The parts of a job: `data.limit` training examples, a stratified share of them held out, and the test part.

    The limit takes the first n of a seeded permutation. Inside each part the examples keep the file's order.
    """
    kept = np.arange(len(dataset.train))
    if data.limit is not None and data.limit < len(kept):
        kept = np.sort(np.random.default_rng(derive_seed(seed, "limit")).permutation(kept)[: data.limit])
    generator = np.random.default_rng(derive_seed(seed, "validation"))
    held_out = stratified_mask(dataset.train.labels[kept], data.validation, generator)
    return Splits(dataset.train.take(kept[~held_out]), dataset.train.take(kept[held_out]), dataset.test)


def measure_preprocessing(split: Split, scale: float) -> Preprocessing:
    """Scale, and mean and standard deviation per channel after it, of a training part; a constant channel gets 1.

    uint8: exact sums of integers, one rounding at the end. float32: two passes in float64.
    """
    if len(split) == 0:
        raise DataInvalid("the training part is empty", hint="raise data.limit or lower data.validation")
    source = split.open()
    channels, per_example = source.shape[1], math.prod(source.shape[2:])
    count = len(split) * per_example
    mean, variance = _integer_moments(split, channels, count) if source.dtype == np.uint8 else _moments(split, channels)
    std = [math.sqrt(value) * scale for value in variance]
    return Preprocessing(
        scale=scale,
        mean=tuple(value * scale for value in mean),
        std=tuple(value if value > 1e-8 else 1.0 for value in std),
    )


def _integer_moments(split: Split, channels: int, count: int) -> tuple[list[float], list[float]]:
    sums, squares = [0] * channels, [0] * channels
    for block in split.blocks():
        for channel in range(channels):
            values = block[:, channel]
            sums[channel] += int(values.sum(dtype=np.int64))
            squares[channel] += int(np.square(values, dtype=np.uint16).sum(dtype=np.int64))
    variance = [(count * square - total * total) / count**2 for total, square in zip(sums, squares, strict=True)]
    return [total / count for total in sums], variance


def _moments(split: Split, channels: int) -> tuple[list[float], list[float]]:
    def mean_of(centre: npt.NDArray[np.float64], power: int) -> list[float]:
        pieces: list[list[float]] = [[] for _ in range(channels)]
        count = 0
        for block in split.blocks():
            for channel in range(channels):
                values = block[:, channel].astype(np.float64) - centre[channel]
                pieces[channel].append(float((values**power).sum()))
            count += block[:, 0].size
        return [math.fsum(piece) / count for piece in pieces]

    mean = mean_of(np.zeros(channels), 1)
    return mean, mean_of(np.array(mean), 2)


def equal_batches(examples: int, batch_size: int) -> list[tuple[int, int]]:
    """(first, last + 1) of each batch of an epoch: as few as hold all, and as large as one another up to one example.

    A last batch of what is left over would be a whole step, and whole batch statistics, on a few examples: on 5,000
    images in batches of 128 (8 are left) it cost 1 to 2 points of accuracy. Batch norm cannot train on a batch of one
    example, so of an odd number in batches of 2 one is left out, another in each epoch.
    """
    count = -(-examples // batch_size)
    if batch_size > 1 and 1 < examples < 2 * count:
        examples, count = examples - 1, count - 1
    return [(number * examples // count, (number + 1) * examples // count) for number in range(count)]


def full_batches(examples: int, batch_size: int) -> list[tuple[int, int]]:
    """(first, last + 1) of each batch: all full but the last, for evaluations, which sum over examples."""
    return [(start, min(start + batch_size, examples)) for start in range(0, examples, batch_size)]


class BatchLoader:
    """The examples of a split in batches on a device: float32 images N x C x ... as the network takes them, labels N.

    Resident on the device in the type they are stored in where they fit, else read from the mapped file, one batch
    ahead. The order of an epoch depends on `seed` and its number, the augmentation of a batch on `seed`, epoch and its
    number: an epoch that starts at batch k gives the same batches, bit for bit, as the rest of a whole one.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        augmentation: Sequence[str] = (),
        seed: int = 0,
        channels_last: bool = False,
        shuffle: bool = True,
        resident: bool | None = None,
    ) -> None:
        """`batch_size` is the largest batch; `resident` None: as memory allows.

        With `shuffle` batches are equal (`equal_batches`); without, all examples come in order, for evaluations.
        """
        self._split = split
        self._bounds = (equal_batches if shuffle else full_batches)(len(split), batch_size)
        self._device = torch.device(device)
        self._augmentation = frozenset(augmentation)
        self._seed = seed
        self._shuffle = shuffle
        source = split.open()
        self._channels, *sizes = source.shape[1:]
        self._channels_last = channels_last and len(sizes) in (2, 3)
        self._axes = Axes(1 if self._channels_last else 2, tuple(sizes))
        self._flips = self._first_flips() if "alternating_flip" in self._augmentation else None
        self._scale = float(np.float32(preprocessing.scale))
        self._mean = self._along_batch(preprocessing.mean)
        self._std = self._along_batch(preprocessing.std)
        self._labels = torch.from_numpy(split.labels).to(self._device)
        if resident is None:
            resident = split.size_bytes <= free_bytes(self._device)
        self._resident = self._load() if resident else None

    def __len__(self) -> int:
        """Batches of one epoch."""
        return len(self._bounds)

    def epoch(self, number: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `number` from batch `start` on: images N x C x ..., labels N."""
        order = self._order(number)
        for step, raw in self._raw_batches(order, start):
            chosen = order[slice(*self._bounds[step])]
            turned = None if self._flips is None else self._flips[chosen] ^ bool(number % 2)
            yield self._prepare(raw, number, step, turned), self._labels[chosen.to(self._device)]

    def _order(self, number: int) -> Tensor:
        if not self._shuffle:
            return torch.arange(len(self._split))
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "order", number))
        return torch.randperm(len(self._split), generator=generator)

    def _first_flips(self) -> Tensor:
        """Which examples are flipped in even epochs, the others in odd ones: each is seen both ways in two epochs.

        Jordan, arXiv 2404.00498, section 3.6.
        """
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "flips"))
        return torch.randint(0, 2, (len(self._split),), generator=generator).bool()

    def _raw_batches(self, order: Tensor, start: int) -> Iterator[tuple[int, Tensor]]:
        """(number, stored images in our layout on the device) of every batch from `start` on."""
        steps = range(start, len(self))
        chosen = [order[slice(*self._bounds[step])] for step in steps]
        if self._resident is not None:
            flat = self._resident.flatten(1)
            for step, index in zip(steps, chosen, strict=True):
                picked = flat.index_select(0, index.to(self._device))
                yield step, picked.view(len(index), *self._resident.shape[1:])
            return
        source = self._split.open()
        with closing(ReadAhead()) as ahead:
            for step, block in zip(steps, ahead.read(self._split, source, chosen), strict=True):
                images = torch.from_numpy(self._arrange(block))
                if self._device.type == "cuda":
                    images = images.pin_memory()
                yield step, images.to(self._device, non_blocking=True)

    def _prepare(self, raw: Tensor, epoch: int, step: int, turned: Tensor | None) -> Tensor:
        """The network's input of stored images: augmented, `(x * scale - mean) / std` in float32, N x C x ..."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "augmentation", epoch, step))
        changes = source_positions(self._axes, len(raw), self._augmentation, generator, turned)
        raw = shift_and_flip(raw, changes)
        flat = raw.view(self._flat_shape(len(raw)))
        ready = flat.to(torch.float32, copy=True)
        ready.mul_(self._scale).sub_(self._mean).div_(self._std)
        images = ready.view(raw.shape)
        if "cutout" in self._augmentation:
            cut_out(images, self._axes, generator)
        return images.movedim(-1, 1) if self._channels_last else images

    def _flat_shape(self, count: int) -> tuple[int, ...]:
        """Channels in the innermost axis would be a loop over three numbers: they are taken together with their row."""
        space = math.prod(self._axes.sizes)
        if self._channels_last:
            row = self._axes.sizes[-1]
            return (count, space // row, row * self._channels)
        return (count, self._channels, space)

    def _along_batch(self, per_channel: tuple[float, ...]) -> Tensor:
        values = torch.tensor(per_channel, dtype=torch.float32, device=self._device)
        return values.repeat(self._axes.sizes[-1]) if self._channels_last else values.view(-1, 1)

    def _arrange(self, block: Images) -> Images:
        """Images N x C x ... in the layout of this object, contiguous."""
        return np.ascontiguousarray(np.moveaxis(block, 1, -1) if self._channels_last else block)

    def _load(self) -> Tensor:
        source = self._split.open()
        shape = (len(self._split), *self._arrange(source[:0]).shape[1:])
        images = torch.empty(shape, dtype=torch.uint8 if source.dtype == np.uint8 else torch.float32)
        start = 0
        for block in self._split.blocks():
            images[start : start + len(block)] = torch.from_numpy(self._arrange(block))
            start += len(block)
        return images.to(self._device)


class ReadAhead:
    """Reads the next batch from disk while the present one is used."""

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def read(self, split: Split, source: Images, chosen: Sequence[Tensor]) -> Iterator[Images]:
        """The images of every index in `chosen`, in order."""
        waiting = None
        for index in chosen:
            following = self._reader.submit(split.read, index.numpy(), source)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()

    def close(self) -> None:
        """Wait for the read that is under way, start no other."""
        self._reader.shutdown(cancel_futures=True)


def free_bytes(device: torch.device) -> int:
    """How many bytes of images may stay resident on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_DEVICE)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return int(max(0, free) * SHARE_OF_HOST)
