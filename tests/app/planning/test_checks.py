"""Mistakes that types alone do not show: each is refused where it was made, with the reason and what would do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from app.planning.plan import JobLimits
from app.spec.data import DataFacts
from tests.support.jobs.specs import COLOUR, GREY, PICTURES, misplanned, plan

PRUNE = {"type": "prune", "sparsity": 0.5}
RETRAIN_EPOCHS, SCHEDULE = "/optimizations/0/retrain/epochs", "/optimizations/0/schedule"
FOUR_ROUNDS = {"name": "iterative", "steps": 4}
ALL_TRAINED = {"dataset": "x", "validation": 0}
CHANNELS = {"type": "prune", "budget": {"macs": 0.5}}


def training(**fields: Any) -> dict[str, Any]:
    return {"training": fields}


def preset(**fields: Any) -> dict[str, Any]:
    return {"model": {"preset": "simple_cnn", **fields}}


def prune(**fields: Any) -> dict[str, Any]:
    return {"optimizations": [{**PRUNE, **fields}]}


@pytest.mark.parametrize(
    ("facts", "parts", "pointer", "limit", "value"),
    [
        (GREY, preset(input_shape=[3, 28, 28]), "/model/input_shape", [1, 28, 28], [3, 28, 28]),
        (PICTURES, preset(), "/model/input_shape", None, None),
        (PICTURES, preset(input_shape=[2, 9, 9]), "/model/input_shape", None, [2, 9, 9]),
        (GREY, preset(classes=9), "/model/classes", 10, 9),
        (GREY, training(batch_size=54_001), "/training/batch_size", 54_000, 54_001),
        (GREY, {"data": {"dataset": "x", "limit": 100}, **training(batch_size=128)}, "/training/batch_size", 90, 128),
        (GREY, {"data": {"dataset": "x", "limit": 9}, **training(batch_size=2)}, "/data/limit", 10, 9),
        (replace(GREY, train=2), {"data": {"dataset": "x", "validation": 0.9}}, "/data/validation", 0, 0.9),
        (replace(GREY, classes=1), {}, "/data/dataset", 2, 1),
        (replace(GREY, test=0), {}, "/data/dataset", 1, 0),
        (GREY, {"data": ALL_TRAINED, **training(early_stopping={})}, "/training/early_stopping", 1, 0),
        (GREY, training(epochs=10_001), "/training/epochs", 10_000, 10_001),
        (GREY, training(epochs=5, schedule={"warmup": 5.5}), "/training/schedule/warmup", 5, 5.5),
        (GREY, training(schedule={"name": "step", "milestones": [5, 10]}), "/training/schedule/milestones/1", 9, 10),
        (GREY, {"model": {"preset": "deep_cnn"}, **training(batch_size=1)}, "/training/batch_size", 2, 1),
        (GREY, prune(retrain={"epochs": 10_001}), RETRAIN_EPOCHS, 10_000, 10_001),
        (GREY, prune(retrain={"epochs": 3000}, schedule=FOUR_ROUNDS), RETRAIN_EPOCHS, 2500, 3000),
        (GREY, prune(retrain={"epochs": 11, "policy": "weight_rewind"}), RETRAIN_EPOCHS, 10, 11),
        (GREY, prune(retrain={"epochs": 2}, schedule={"name": "cubic", "epochs": 3}), f"{SCHEDULE}/epochs", 2, 3),
        (GREY, prune(retrain={"policy": "none"}, schedule={"name": "cubic"}), f"{SCHEDULE}/name", None, None),
        (GREY, {"model": {"preset": "audio_cnn"}}, "/model/input_shape", 1, 2),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_with_the_number_that_would(
    facts: DataFacts, parts: dict[str, Any], pointer: str, limit: Any, value: Any
) -> None:
    faults = misplanned(facts, **parts)
    assert (pointer, limit, value) in [(fault.pointer, fault.limit, fault.value) for fault in faults]


def test_synthetic_data_needs_a_shape_and_has_a_size() -> None:
    data = {"synthetic": {"classes": 10, "train": 1000, "test": 100}}
    assert [fault.pointer for fault in misplanned(data=data)] == ["/model/input_shape"]
    assert not misplanned(data=data, model={"preset": "simple_cnn", "input_shape": [3, 8, 8]})
    huge = {"synthetic": {"train": 1_000_000, "test": 1_000_000}}
    (fault,) = misplanned(data=huge, model={"preset": "simple_cnn", "input_shape": [3, 64, 64]})
    assert (fault.pointer, fault.value) == ("/data/synthetic/train", 2_000_000 * 3 * 64 * 64)


def test_the_classes_of_written_layers_are_checked_at_the_last_one() -> None:
    layers = [{"type": "flatten"}, {"type": "linear", "out_features": 9}]
    (fault,) = misplanned(model={"layers": layers})
    assert (fault.pointer, fault.limit, fault.value) == ("/model/layers/1/out_features", 10, 9)


def test_memory_has_a_limit_and_the_fault_says_what_would_lower_it() -> None:
    (fault,) = misplanned(limits=JobLimits(training_bytes=10_000_000))
    assert fault.pointer == "/training/batch_size"
    assert fault.limit == 10_000_000
    assert isinstance(fault.value, int)
    assert fault.value > fault.limit
    (fault,) = misplanned(limits=JobLimits(training_bytes=3_000_000), training={"batch_size": 1})
    assert fault.pointer == "/model"


def test_a_preset_beyond_the_limits_is_a_fault_of_the_preset() -> None:
    (fault,) = misplanned(COLOUR, JobLimits(params=1_000_000), model={"preset": "vgg16"})
    assert (fault.pointer, fault.limit) == ("/model/preset", 1_000_000)


REFUSED_ORDERS: list[tuple[list[dict[str, Any]], int, str]] = [
    ([PRUNE, {"type": "batch_norm"}], 1, "put it before the prune at /optimizations/0"),
    ([CHANNELS, {"type": "deeper"}], 1, "put it before the prune at /optimizations/0"),
    ([PRUNE, {"type": "regularization", "l1": 1e-5}], 1, "put it before the prune at /optimizations/0"),
    ([{"type": "residual"}, {"type": "residual"}], 1, "stands at /optimizations/0 too"),
    ([{"type": "dropout"}, {"type": "batch_norm"}, {"type": "dropout", "layers": ["linear1"]}], 2, "stands at"),
    ([{"type": "regularization", "l1": 1e-5}, {"type": "regularization", "l2": 1e-5}], 1, "stands at"),
    ([PRUNE, CHANNELS], 1, "channels are removed before weights"),
    ([PRUNE] * 9, 8, "at most 8 times"),
]  # fmt: skip


@pytest.mark.parametrize(("optimizations", "position", "reason"), REFUSED_ORDERS)
def test_a_wrong_order_is_refused_with_the_reason(
    optimizations: list[dict[str, Any]], position: int, reason: str
) -> None:
    (fault,) = misplanned(optimizations=optimizations)
    assert fault.pointer == f"/optimizations/{position}"
    assert reason in fault.message


def test_rewinding_to_weights_from_before_the_shapes_changed_is_refused() -> None:
    rewind = PRUNE | {"retrain": {"policy": "weight_rewind"}}
    (fault,) = misplanned(optimizations=[CHANNELS, rewind])
    assert fault.pointer == "/optimizations/1/retrain/policy"
    assert "from before /optimizations/0, which changes shapes" in fault.message
    assert not misplanned(optimizations=[PRUNE, rewind])


@pytest.mark.parametrize(
    "optimizations",
    [
        [{"type": "dropout", "p": 0.2, "layers": ["linear1"]}, {"type": "dropout", "p": 0.5, "layers": ["linear2"]}],
        [{"type": "regularization", "l1": 1e-5}, {"type": "batch_norm"}, CHANNELS, PRUNE],
        [PRUNE, {"type": "prune", "sparsity": 0.8}],
        [{"type": "deeper"}, {"type": "residual"}, {"type": "batch_norm"}, CHANNELS],
    ],
)
def test_a_right_order_is_accepted(optimizations: list[dict[str, Any]]) -> None:
    assert misplanned(optimizations=optimizations) == []


def test_mistakes_of_several_kinds_are_answered_at_once() -> None:
    faults = misplanned(
        model={"preset": "simple_cnn", "classes": 3},
        training={"epochs": 20_000, "batch_size": 60_000},
        optimizations=[PRUNE, {"type": "batch_norm"}],
    )
    assert {fault.pointer for fault in faults} == {
        "/model/classes",
        "/training/epochs",
        "/training/batch_size",
        "/optimizations/1",
    }


def warned(facts: DataFacts = GREY, **parts: Any) -> list[tuple[str, str]]:
    return [(warning.pointer, warning.message) for warning in plan(facts, **parts).warnings]


WARNED: list[tuple[dict[str, Any], str, str]] = [
    ({"data": {"dataset": "x", "limit": 70_000}}, "/data/limit", "all are used"),
    ({"optimizations": [{"type": "regularization", "l1": 1e-3}]}, "/optimizations/0/l1", "more than the cross-entropy"),
    ({"optimizations": [{"type": "regularization", "l2": 1e-4}]}, "/optimizations/0/l2", "a weight decay of 0.0007"),
    ({"optimizations": [{"type": "regularization", "weight_decay": 1e-3}]}, "/optimizations/0/weight_decay", "0.0015"),
    ({"optimizations": [{"type": "regularization", "bn_l1": 1e-4}]}, "/optimizations/0/bn_l1", "no batch norm"),
    ({"optimizations": [{"type": "small_kernels"}]}, "/optimizations/0", "finds nothing to change"),
    ({"optimizations": [{**CHANNELS, "criterion": "bn_scale"}]}, "/optimizations/0/criterion", "ranked by l2"),
    ({"optimizations": [{"type": "prune", "budget": {"macs": 1.0}}]}, "/optimizations/0", "removes nothing"),
    ({"optimizations": [CHANNELS]}, "/optimizations/0", "MACs and bytes will not fall together"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "pointer", "words"), WARNED)
def test_what_is_probably_not_meant_is_a_warning(parts: dict[str, Any], pointer: str, words: str) -> None:
    assert [message for at, message in warned(**parts) if at == pointer and words in message]


def test_small_kernels_that_cost_more_are_a_warning() -> None:
    layers = [
        {"type": "conv", "out_channels": 32, "kernel_size": 5, "padding": 2},
        {"type": "relu"},
        {"type": "flatten"},
        {"type": "linear", "out_features": 10},
    ]
    ((pointer, message),) = warned(model={"layers": layers}, optimizations=[{"type": "small_kernels"}])
    assert pointer == "/optimizations/0"
    assert "costs more here" in message


def test_flipping_waveforms_is_a_warning() -> None:
    waves = replace(GREY, example_shape=(800,))
    parts = {"model": {"preset": "audio_cnn"}, "training": {"augmentation": ["horizontal_flip"]}}
    assert [pointer for pointer, _ in warned(waves, **parts)] == ["/training/augmentation"]


def test_an_ordinary_job_has_no_warnings() -> None:
    assert warned() == []
    assert warned(COLOUR, model={"preset": "resnet20"}, optimizations=[{"type": "prune", "sparsity": 0.8}]) == []
