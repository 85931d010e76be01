"""Frozen layers and rates of their own: which layers a pattern means, and patterns that mean none."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.support.jobs.sources import faults_with, planned, source_of
from tests.support.jobs.specs import GREY, document, job, misplanned, plan, refused

DEEP = {"preset": "deep_cnn"}


def named(**training: Any) -> tuple[frozenset[str], dict[str, float]]:
    """What a training of deep_cnn freezes, and its factors."""
    made = plan(model=DEEP, training=training)
    return made.frozen, dict(made.rate_factors)


def test_names_and_globs_freeze_layers_with_parameters() -> None:
    assert named(frozen=["conv1"])[0] == {"conv1"}
    assert named(frozen=["conv[12]", "batch_norm*"])[0] == {
        "conv1",
        "conv2",
        *(f"batch_norm{number}" for number in (1, 2, 3, 4)),
    }
    assert named(frozen=["*1"])[0] == {"conv1", "batch_norm1", "linear1"}  # relu1 has none
    assert named()[0] == frozenset()


def test_the_first_pattern_that_matches_gives_the_factor_and_1_is_none() -> None:
    factors = {"conv1": 0, "conv*": 0.1, "batch_norm1": 1, "batch*": 0.5}
    conv = {"conv1": 0.0, "conv2": 0.1, "conv3": 0.1, "conv4": 0.1}
    assert named(lr_factors=factors)[1] == conv | {f"batch_norm{number}": 0.5 for number in (2, 3, 4)}
    assert named(lr_factors={"conv*": 0.1, "conv1": 0})[1] == dict.fromkeys(conv, 0.1)


@pytest.mark.parametrize(
    ("training", "pointer", "words"),
    [
        ({"frozen": ["conv1", "conf2"]}, "/training/frozen/1", "similar: conv2"),
        ({"frozen": ["features*"]}, "/training/frozen/0", "matches no layer"),
        ({"frozen": ["relu1"]}, "/training/frozen/0", "without parameters"),
        ({"lr_factors": {"conv*": 1, "linear9": 2}}, "/training/lr_factors/linear9", "linear1"),
        ({"lr_factors": {"a/b~c": 2}}, "/training/lr_factors/a~1b~0c", "matches no layer"),
    ],
)
def test_a_pattern_that_means_no_layer_is_a_fault_at_the_pattern(
    training: dict[str, Any], pointer: str, words: str
) -> None:
    (fault,) = misplanned(model=DEEP, training=training)
    assert fault.pointer == pointer
    assert words in fault.message


def test_a_job_that_freezes_everything_is_refused() -> None:
    (fault,) = misplanned(model=DEEP, training={"frozen": ["*"]})
    assert (fault.pointer, "nothing to train" in fault.message) == ("/training/frozen", True)


@pytest.mark.parametrize(
    ("training", "pointer", "limit"),
    [
        ({"lr_factors": {"conv1": -0.1}}, "/training/lr_factors/conv1", 0),
        ({"lr_factors": {"conv1": 101}}, "/training/lr_factors/conv1", 100),
        ({"frozen": ["conv1", "conv1"]}, "/training/frozen/1", None),
        ({"frozen": [f"conv{number}" for number in range(257)]}, "/training/frozen", 256),
    ],
)
def test_factors_have_limits_and_names_come_once(training: dict[str, Any], pointer: str, limit: Any) -> None:
    (fault,) = refused(document(training=training))
    assert (fault.pointer, fault.limit) == (pointer, limit)


def test_more_globs_than_can_be_looked_at_in_a_moment_are_refused_and_names_are_not() -> None:
    block = [{"type": "conv", "out_channels": 2, "kernel_size": 1, "name": "a" * 150}, {"type": "relu"}]
    layers = [{"type": "repeat", "times": 3000, "layers": block}, {"type": "flatten"}]
    model = {"layers": [*layers, {"type": "linear", "out_features": 10}]}
    globs = [f"*{'a*' * 7}{number}" for number in range(256)]
    start = time.perf_counter()
    (fault,) = misplanned(model=model, training={"frozen": globs})
    assert (fault.pointer, fault.limit, fault.value) == ("/training/frozen", 200_000 // 3001, 256)
    names = [f"repeat1_{number}_{'a' * 150}" for number in range(1, 257)]
    assert plan(model=model, training={"frozen": names}).frozen == set(names)
    assert time.perf_counter() - start < 5
    (fault,) = refused(document(training={"frozen": ["*" * 9]}))
    assert (fault.pointer, fault.limit, fault.value) == ("/training/frozen/0", 8, 9)


def test_patterns_are_for_the_network_after_the_rewrites() -> None:
    made = plan(training={"frozen": ["conv1_*"]}, optimizations=[{"type": "batch_norm"}])
    (name,) = made.frozen
    assert made.baseline[name].type == "batch_norm"
    assert name not in made.given


def test_frozen_layers_that_were_never_trained_are_a_warning() -> None:
    def warnings(made: Any) -> list[str]:
        return [warning.message for warning in made.warnings if warning.pointer == "/training/frozen"]

    assert "conv1" in warnings(plan(model=DEEP, training={"frozen": ["conv1"]}))[0]
    sources = {"job-j1-pruned": source_of()}
    assert warnings(planned(GREY, sources, model={"job": "j1"}, training={"frozen": ["first"]})) == []
    new = planned(GREY, sources, model={"job": "j1", "head": "new"}, training={"frozen": ["first", "head"]})
    assert warnings(new) == ["keeps layers as they are drawn, untrained: head"]
    assert faults_with(GREY, sources, model={"job": "j1"}, training={"frozen": ["conv1"]})[0].value == "conv1"


def test_the_order_of_factors_stays_in_the_document() -> None:
    factors = {"conv1": 0.5, "conv*": 0.1, "b*": 2.0}
    assert list(job(training={"lr_factors": factors}).document()["training"]["lr_factors"]) == list(factors)


def stale_norms(*optimizations: dict[str, Any], frozen: list[str]) -> str | None:
    """The warning about batch norms whose input changes."""
    made = plan(model=DEEP, training={"frozen": frozen}, optimizations=list(optimizations))
    found = [warning.message for warning in made.warnings if "statistics" in warning.message]
    assert len(found) <= 1
    return found[0] if found else None


def test_frozen_batch_norm_behind_a_cut_is_warned_of_and_the_one_that_only_narrows_is_not() -> None:
    channels = {"type": "prune", "structure": "channels", "sparsity": 0.5}
    warned = stale_norms(channels, frozen=["batch_norm*"])
    assert warned is not None
    assert "batch_norm2, batch_norm3, batch_norm4" in warned
    assert "batch_norm1" not in warned
    assert stale_norms(channels, frozen=["batch_norm1"]) is None
    assert stale_norms(channels, frozen=["conv*"]) is None
    assert stale_norms(frozen=["batch_norm*"]) is None


def test_frozen_batch_norm_behind_zeros_is_warned_of_and_the_one_before_them_is_not() -> None:
    zeros = {"type": "prune", "sparsity": 0.5, "exclude": ["conv1", "conv2"]}
    warned = stale_norms(zeros, frozen=["batch_norm*"])
    assert warned is not None
    assert "batch_norm3, batch_norm4" in warned
    assert "batch_norm2" not in warned
