"""Synthetic data sets: the same from the same seed, of any rank, and learnable by anything that averages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.datasets.ingest.synthetic import ensure_synthetic, synthetic_bytes
from app.datasets.packed.packed import read_manifest
from app.spec.data import Synthetic, synthetic_facts


@pytest.mark.parametrize("shape", [(1, 40), (2, 33), (1, 8, 8), (3, 16, 12), (1, 4, 8, 8)])
def test_examples_have_the_jobs_shape_and_the_facts_hold(tmp_path: Path, shape: tuple[int, ...]) -> None:
    wanted = Synthetic(classes=3, train=31, test=10, seed=4)
    folder = ensure_synthetic(wanted, shape, tmp_path)
    assert np.load(folder / "train.images.npy").shape == (31, *shape)
    assert np.load(folder / "test.images.npy").dtype == np.uint8
    assert np.bincount(np.load(folder / "train.labels.npy")).tolist() == [11, 10, 10]
    assert read_manifest(folder).facts() == synthetic_facts(wanted, shape)
    assert synthetic_bytes(wanted, shape) == 41 * int(np.prod(shape))


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    def drawn(seed: int, home: str) -> str:
        folder = ensure_synthetic(Synthetic(classes=2, train=20, test=5, seed=seed), (1, 6, 6), tmp_path / home)
        return read_manifest(folder).sha256

    assert drawn(0, "a") == drawn(0, "b")
    assert drawn(0, "a") != drawn(1, "a")


def test_training_and_test_examples_are_different_draws_of_the_same_classes(tmp_path: Path) -> None:
    folder = ensure_synthetic(Synthetic(classes=2, train=40, test=40), (1, 8, 8), tmp_path)
    train, test = (np.load(folder / f"{split}.images.npy").reshape(40, -1) for split in ("train", "test"))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}


@pytest.mark.parametrize("shape", [(1, 48), (1, 16, 16), (3, 16, 16), (1, 6, 12, 12)])
def test_the_nearest_shifted_mean_already_tells_most_classes_apart(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The spectrum's magnitude does not see shifts: a classifier without any training reaches 0.8."""
    folder = ensure_synthetic(Synthetic(classes=4, train=200, test=200), shape, tmp_path)

    def features(split: str) -> np.ndarray:
        images = np.load(folder / f"{split}.images.npy").astype(float)
        spectrum = np.abs(np.fft.fftn(images - images.mean(), axes=range(2, images.ndim)))
        return spectrum.reshape(200, -1) / np.linalg.norm(spectrum.reshape(200, -1), axis=1, keepdims=True)

    train, test = features("train"), features("test")
    labels = np.load(folder / "train.labels.npy")
    means = np.stack([train[labels == number].mean(axis=0) for number in range(4)])
    guesses = ((test[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (guesses == np.load(folder / "test.labels.npy")).mean() > 0.8
