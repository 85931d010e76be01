"""What the trainings of a job are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs.tiny import SHAPE, task_of, tiny_data, tiny_layers, tiny_spec, train_alone
from worker.journal import MemoryJournal

STEPS = 4  # of one epoch: 108 images in batches of 32
TERMS = {"type": "regularization", "bn_l1": 1e-3, "group_lasso": 1e-3, "l2": 1e-4}
CHANNELS = {"type": "prune", "budget": {"macs": 0.5}, "round_to": 1, "retrain": {"epochs": 1}}
ZEROS = {"type": "prune", "sparsity": 0.5, "retrain": {"epochs": 1}}
PRODUCTS = {"type": "low_rank", "energy": 0.7, "round_to": 1, "retrain": {"epochs": 1}}
TWO_ROUNDS = {"schedule": {"name": "iterative", "steps": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    ("steps", "epochs_with_terms", "epochs"),
    [
        ([CHANNELS], 2, 3),
        ([CHANNELS | TWO_ROUNDS], 3, 4),  # between two removals they prepare the second
        ([CHANNELS, ZEROS], 2, 4),
        ([PRODUCTS, CHANNELS], 3, 4),
        ([ZEROS], 2, 3),
        ([], 2, 2),
    ],
    ids=["once", "two rounds", "then zeros", "products before", "only zeros", "dense"],
)
def test_terms_that_prepare_a_removal_of_channels_end_with_the_last_one(
    steps: list[dict[str, Any]], epochs_with_terms: int, epochs: int, data: Path, tmp_path: Path
) -> None:
    journal = MemoryJournal()
    model = {"input_shape": list(SHAPE), "layers": tiny_layers(channels=24)}
    train_alone(task_of(tiny_spec(TERMS, *steps, model=model), data, tmp_path), journal)
    last = {name: points[-1][0] for name, points in journal.metrics.items()}
    assert last["train.l2"] == epochs * STEPS
    assert last["train.l1"] == last["train.group_lasso"] == epochs_with_terms * STEPS
