"""Synthetic data sets: every class is a smooth pattern; an example is its pattern shifted, scaled and with noise."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.datasets.packed.packed import ArrayFile, ensure_packed, examples_per_block, write_manifest
from app.spec.data import Synthetic, synthetic_facts

VERSION = 1  # part of the cache's key: another generator, other images
WAVES = 3  # cosines a pattern is the sum of, per channel
HIGHEST_FREQUENCY = 3  # periods along an axis
SHIFT = 1 / 8  # of an axis, in each direction
NOISE = 0.5  # standard deviation, of the pattern's


def ensure_synthetic(synthetic: Synthetic, input_shape: tuple[int, ...], cache: Path) -> Path:
    """Make the packed folder of a synthetic data set with examples of `input_shape` `(C, *spatial)`; returns it."""
    identity = json.dumps([VERSION, synthetic.model_dump(), input_shape], sort_keys=True)
    folder = cache / "synthetic" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    return ensure_packed(folder, lambda partial: _build(synthetic, input_shape, partial))


def synthetic_bytes(synthetic: Synthetic, input_shape: tuple[int, ...]) -> int:
    """The bytes that the data set's images take."""
    size = synthetic.train + synthetic.test
    for axis in input_shape:
        size *= axis
    return size


def _build(synthetic: Synthetic, input_shape: tuple[int, ...], partial: Path) -> None:
    facts = synthetic_facts(synthetic, input_shape)
    patterns = class_patterns(synthetic, input_shape)
    for number, (split, count) in enumerate((("train", synthetic.train), ("test", synthetic.test)), start=1):
        generator = np.random.default_rng([synthetic.seed, number])
        labels = generator.permutation(np.arange(count) % synthetic.classes).astype(np.int64)
        step = examples_per_block(input_shape, 4)
        with ArrayFile(partial / f"{split}.images.npy", input_shape, "uint8") as file:
            for start in range(0, count, step):
                file.write(draw_examples(patterns, labels[start : start + step], generator))
        np.save(partial / f"{split}.labels.npy", labels)
    write_manifest(
        partial,
        name=facts.name,
        dtype="uint8",
        classes=facts.class_names,
        example_shape=input_shape,
        notes=[f"drawn from seed {synthetic.seed}"],
    )


def class_patterns(synthetic: Synthetic, input_shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """One smooth pattern for each class, K x C x *spatial, periodic along every axis, mean 0 and deviation 1."""
    generator = np.random.default_rng([synthetic.seed, 0])
    channels, *spatial = input_shape
    patterns = np.zeros((synthetic.classes, channels, *spatial), np.float32)
    positions = np.meshgrid(*(np.arange(size, dtype=np.float32) / size for size in spatial), indexing="ij")
    for class_number in range(synthetic.classes):
        for channel in range(channels):
            for _ in range(WAVES):
                frequencies = generator.integers(-HIGHEST_FREQUENCY, HIGHEST_FREQUENCY + 1, len(spatial))
                phase, strength = generator.uniform(0, 2 * np.pi), generator.uniform(0.5, 1)
                wave = sum((f * p for f, p in zip(frequencies, positions, strict=True)), np.float32(0))
                patterns[class_number, channel] += strength * np.cos(2 * np.pi * wave + phase)
    flat = patterns.reshape(synthetic.classes, -1)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(flat.std(axis=1, keepdims=True), 1e-6)
    return patterns


def draw_examples(
    patterns: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """One example for each label, N x C x *spatial: its class's pattern shifted (cyclically), scaled, with noise."""
    _, channels, *spatial = patterns.shape
    count, rank = len(labels), len(spatial)
    index: list[npt.NDArray[np.int64]] = [
        labels.reshape(count, *[1] * (rank + 1)),
        np.arange(channels).reshape(1, channels, *[1] * rank),
    ]
    for axis, size in enumerate(spatial):
        most = int(size * SHIFT)
        shifts = generator.integers(-most, most + 1, (count, 1))
        places = (np.arange(size)[None, :] + shifts) % size
        index.append(places.reshape(count, 1, *[1] * axis, size, *[1] * (rank - 1 - axis)))
    strength = generator.uniform(0.8, 1.2, (count, *[1] * (rank + 1))).astype(np.float32)
    images: npt.NDArray[np.float32] = patterns[tuple(index)] * strength
    images += NOISE * generator.standard_normal(images.shape, np.float32)
    pixels: npt.NDArray[np.float32] = np.clip(images * 40 + 128, 0, 255)
    return pixels.astype(np.uint8)
