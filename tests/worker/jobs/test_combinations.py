"""Every pair of structure, criterion, schedule and retraining, each in a whole job with a tiny network."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from app.errors import InvalidSpec
from app.spec.job import parse_job
from app.spec.prune import CRITERIA
from tests.support.jobs.tiny import task_of, tiny_data, tiny_spec
from worker.journal import MemoryJournal
from worker.pipeline import Delivered, run

AMOUNTS: dict[str, dict[str, Any]] = {
    "channels": {"structure": "channels", "budget": {"macs": 0.5}},
    "weights": {"structure": "weights", "sparsity": 0.6},
    "blocks": {"structure": "blocks", "sparsity": 0.5, "block": [2, 2]},
    "n:m": {"structure": "n:m", "pattern": "2:4"},
}
RANKED = sorted({criterion for criteria in CRITERIA.values() for criterion in criteria})
SCHEDULES: dict[str, dict[str, Any]] = {
    "one_shot": {"name": "one_shot"},
    "iterative": {"name": "iterative", "steps": 2},
    "cubic": {"name": "cubic"},
}
RETRAININGS: dict[str, dict[str, Any]] = {
    "lr_rewind": {"policy": "lr_rewind", "epochs": 1},
    "fine_tune": {"policy": "fine_tune", "epochs": 1},
    "weight_rewind": {"policy": "weight_rewind", "epochs": 1},
    "none": {"policy": "none"},
    "distilled": {"policy": "lr_rewind", "epochs": 1, "distillation": {}},
}
Combination = tuple[str, str, str, str]


def step_of(combination: Combination) -> dict[str, Any]:
    structure, criterion, schedule, retraining = combination
    return {
        "type": "prune",
        **AMOUNTS[structure],
        "criterion": criterion,
        "schedule": SCHEDULES[schedule],
        "retrain": RETRAININGS[retraining],
    }


def allowed(combination: Combination) -> bool:
    try:
        parse_job(tiny_spec(step_of(combination)))
    except InvalidSpec:
        return False
    return combination[2:] != ("cubic", "none")  # a ramp needs epochs: the plan says so


def pairs(combination: Combination) -> set[tuple[tuple[int, str], ...]]:
    return set(combinations(enumerate(combination), 2))


def covering() -> Iterator[Combination]:
    """So few combinations that every pair that may be asked for is in one of them: greedily, the richest first."""
    left = [made for made in product(AMOUNTS, RANKED, SCHEDULES, RETRAININGS) if allowed(made)]
    wanted = set().union(*(pairs(made) for made in left))
    while wanted:
        best = max(left, key=lambda made: len(pairs(made) & wanted))
        wanted -= pairs(best)
        yield best


COMBINATIONS = list(covering())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


def test_every_structure_criterion_schedule_and_retraining_is_among_them() -> None:
    for place, names in enumerate((AMOUNTS, RANKED, SCHEDULES, RETRAININGS)):
        assert {made[place] for made in COMBINATIONS} == set(names)
    for structure, criteria in CRITERIA.items():
        assert {made[1] for made in COMBINATIONS if made[0] == structure} == set(criteria)


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_a_job_with_this_combination_succeeds_and_delivers_what_was_asked(
    combination: Combination, data: Path, tmp_path: Path
) -> None:
    outcome = run(task_of(tiny_spec(step_of(combination)), data, tmp_path), MemoryJournal())
    assert isinstance(outcome, Delivered)
    report = outcome.report
    assert report["steps"][0]["complete"]
    assert report["steps"][0]["applied"]
    files = {artifact.name: artifact.path for artifact in outcome.artifacts}
    weights = {name: w for name, w in load_file(files["pruned.safetensors"]).items() if w.ndim > 1}
    total, zeros = sum(w.size for w in weights.values()), sum(int((w == 0).sum()) for w in weights.values())
    match combination[0]:
        case "channels":
            assert 0.35 < report["final"]["macs"] / report["baseline"]["macs"] <= 0.5
        case "weights":
            assert abs(zeros - 0.6 * total) <= 2
        case "blocks":
            assert abs(zeros - 0.5 * total) <= 0.1 * total
        case "n:m":
            for name, w in weights.items():
                if w.shape[1] % 4 == 0:
                    rows = abs(w).swapaxes(1, -1).reshape(-1, 4) > 0
                    assert rows.sum(axis=1).max() <= 2, name
