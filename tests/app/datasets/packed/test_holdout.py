"""Stratified hold-out."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from app.datasets.packed.holdout import stratified_mask


def draw(labels: list[int], share: float, seed: int = 0) -> np.ndarray:
    return stratified_mask(np.array(labels, np.int64), share, np.random.default_rng(seed))


def test_every_class_gives_its_share() -> None:
    labels = [0] * 50 + [1] * 30 + [7] * 20
    assert np.bincount(np.array(labels)[draw(labels, 0.1)]).tolist() == [5, 3, 0, 0, 0, 0, 0, 2]


def test_nothing_is_held_out_at_zero_and_one_at_least_above_it() -> None:
    assert not draw([0, 1, 0, 1], 0.0).any()
    assert draw([0, 0, 1, 1], 0.01).sum() == 1
    assert not draw([3], 0.5).any()


def test_the_seed_chooses_which() -> None:
    labels = [0, 1] * 50
    assert (draw(labels, 0.3, 1) == draw(labels, 0.3, 1)).all()
    assert (draw(labels, 0.3, 1) != draw(labels, 0.3, 2)).any()


@given(st.lists(st.integers(0, 5), min_size=2, max_size=80), st.floats(0.01, 0.99))
def test_the_whole_share_is_reached_where_classes_allow_it_and_no_class_is_emptied(
    labels: list[int], share: float
) -> None:
    mask = draw(labels, share)
    counts, held_out = np.bincount(labels), np.bincount(np.array(labels)[mask], minlength=max(labels) + 1)
    assert ((counts == 0) | (held_out < counts)).all()
    wanted = max(1, int(np.floor(len(labels) * share + 0.5)))
    available = int((counts[counts > 0] - 1).sum())
    assert abs(mask.sum() - min(wanted, available)) <= max(1, (counts > 0).sum() - 1)
    assert (np.abs(held_out - np.minimum(counts * share, np.maximum(counts - 1, 0))) <= 1).all()
