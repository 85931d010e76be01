"""Reading a job: defaults, strictness, and faults that point into what was sent."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from app.errors import InvalidSpec
from app.spec.job import EXPORTS, SELF_DISTILLATION, JobSpec, parse_job, retraining
from app.spec.prune import Prune
from app.spec.retrain import Retrain
from app.validation.faults import MOST_FAULTS
from tests.support.jobs.specs import document, job, refused

FULL: dict[str, Any] = {
    "spec_version": 1,
    "name": "seed-cnn",
    "labels": {"team": "vision"},
    "data": {"dataset": "fashion-mnist", "validation": 0.2, "limit": 5000},
    "model": {
        "input_shape": [1, 28, 28],
        "layers": [
            {"type": "conv", "name": "first", "out_channels": 8, "kernel_size": [3, 5], "padding": "same"},
            {"type": "residual", "layers": [{"type": "conv", "out_channels": 8, "kernel_size": 3, "padding": 1}]},
            {"type": "flatten"},
            {"type": "linear", "out_features": 10},
        ],
    },
    "training": {
        "epochs": 10,
        "batch_size": 128,
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
        "schedule": {"name": "step", "milestones": [3, 6], "gamma": 0.2, "warmup": 1},
        "augmentation": ["random_crop", "horizontal_flip", "cutout"],
        "label_smoothing": 0.1,
        "ema_decay": 0.99,
        "precision": "auto",
        "seed": 3,
        "early_stopping": {"patience": 2, "min_delta": 0.001},
        "gradient_clipping": 1.0,
        "channels_last": True,
    },
    "optimizations": [
        {"type": "batch_norm", "layers": ["first"]},
        {"type": "dropout", "p": 0.3},
        {"type": "spatial_dropout", "p": 0.1},
        {"type": "small_kernels"},
        {"type": "deeper", "times": 2},
        {"type": "residual"},
        {"type": "regularization", "l1": 1e-5, "l2": 1e-4, "weight_decay": 0.01, "bn_l1": 1e-4, "all": False},
        {
            "type": "prune",
            "structure": "channels",
            "criterion": "taylor",
            "scope": "global",
            "budget": {"macs": 0.5},
            "schedule": {"name": "iterative", "steps": 4},
            "retrain": {
                "epochs": 2,
                "policy": "fine_tune",
                "lr": 0.01,
                "distillation": {"alpha": 0.5, "temperature": 2},
            },
            "exclude": ["first"],
            "overrides": {"residual1_conv1": {"max_sparsity": 0.5, "min_channels": 2, "round_to": 4}},
            "round_to": 4,
            "min_channels": 2,
            "max_sparsity": 0.8,
        },
        {"type": "prune", "sparsity": 0.5, "schedule": {"name": "cubic", "epochs": 2}, "retrain": {"epochs": 4}},
    ],
    "exports": ["safetensors", "onnx"],
}


def test_the_least_job_gets_the_documented_defaults() -> None:
    spec = job()
    assert spec.exports == EXPORTS
    assert (spec.data.validation, spec.data.limit, spec.name, spec.labels) == (0.1, None, None, {})
    training = spec.training
    assert (training.epochs, training.batch_size, training.seed) == (10, 128, 0)
    optimizer = training.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("sgd", 0.1, 0.9)
    assert (optimizer.nesterov, optimizer.weight_decay) == (True, 5e-4)
    assert (training.schedule.name, training.augmentation, training.label_smoothing) == ("one_cycle", (), 0)
    nothing = (training.ema_decay, training.early_stopping, training.gradient_clipping, training.channels_last)
    assert nothing == (None,) * 4
    assert training.precision == "auto"


def test_the_document_of_a_job_states_the_defaults_that_depend_on_other_parts() -> None:
    shown = job(
        training={"epochs": 20, "schedule": {"name": "step"}}, optimizations=[{"type": "prune", "sparsity": 0.5}]
    )
    written = shown.document()
    assert written["training"]["schedule"] == {"name": "step", "warmup": 0.0, "milestones": [10, 15], "gamma": 0.1}
    assert written["optimizations"][0]["retrain"]["epochs"] == 6
    assert job(training={"epochs": 20}).document()["training"]["schedule"] == {"name": "one_cycle", "warmup": 6.0}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        FULL,
        {"training": {"optimizer": {"name": "adam"}, "schedule": {"name": "cosine", "warmup": 0.5}}},
        {"training": {"optimizer": {"name": "adamw", "betas": [0.8, 0.99], "eps": 1e-6}}},
        {"training": {"epochs": 1, "schedule": {"name": "step"}}},
        {
            "data": {"synthetic": {"classes": 3}},
            "model": {"preset": "resnet20", "input_shape": [3, 8, 8], "width": 0.5},
        },
        {"optimizations": [{"type": "prune", "threshold": 0.01, "retrain": {"policy": "none"}}]},
        {"optimizations": [{"type": "prune", "sparsity": 0.9, "schedule": {"name": "cubic"}}]},
        {"optimizations": [{"type": "prune", "budget": {"bytes": 20000}}]},
    ],
    ids=lambda parts: "-".join(parts) or "least",
)
def test_a_job_read_from_its_own_document_is_the_same_job(parts: dict[str, Any]) -> None:
    spec = parse_job(document(**parts))
    again = parse_job(json.loads(json.dumps(spec.document())))
    assert again == spec
    assert again.document() == spec.document()


def test_each_optimizer_has_its_own_fields_and_rates() -> None:
    for name, lr, decay in (("sgd", 0.1, 5e-4), ("adam", 0.001, 0.0), ("adamw", 0.001, 0.01)):
        optimizer = job(training={"optimizer": {"name": name}}).training.optimizer
        assert (optimizer.lr, optimizer.weight_decay) == (lr, decay)
    assert "momentum" not in job(training={"optimizer": {"name": "adam"}}).document()["training"]["optimizer"]
    assert "betas" not in job().document()["training"]["optimizer"]
    assert job(training={"optimizer": {"momentum": 0}}).training.optimizer.nesterov is False


def _places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        return found + [place for key, child in value.items() for place in _places(child, (*path, key))]
    if isinstance(value, list):
        return found + [place for index, child in enumerate(value) for place in _places(child, (*path, index))]
    return found


def _with(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    changed = copy.deepcopy(value)
    here = changed
    for part in path[:-1]:
        here = here[part]
    here[path[-1]] = new
    return changed


@pytest.mark.parametrize("wrong", [{"unheard": 1}, "\x00", -1.5, [None]], ids=["object", "string", "number", "list"])
def test_a_wrong_type_anywhere_is_a_fault_at_that_place(wrong: Any) -> None:
    for path in _places(FULL):
        faults = refused(_with(FULL, path, wrong))
        pointer = "".join(f"/{part}" for part in path)
        assert faults, f"{pointer} took {wrong!r}"
        # a wrong type of layer or schedule makes its other fields foreign; one number of a list speaks for the list
        near = pointer.rpartition("/")[0] if path[-1] in ("type", "name") or isinstance(path[-1], int) else pointer
        assert any(fault.pointer.startswith(near) for fault in faults), (pointer, [f.pointer for f in faults])


def test_an_unknown_field_at_every_level_is_a_fault_at_that_field() -> None:
    for path in [(), *_places(FULL)]:
        here: Any = FULL
        for part in path:
            here = here[part]
        if not isinstance(here, dict) or path in {("labels",), ("optimizations", 7, "overrides")}:
            continue
        pointer = "".join(f"/{part}" for part in (*path, "a~1b~0c"))
        sent = _with(FULL, (*path, "a/b~c"), 1)
        assert [fault.pointer for fault in refused(sent)] == [pointer]


@pytest.mark.parametrize("missing", ["spec_version", "data", "model"])
def test_each_required_part_is_named_when_it_is_missing(missing: str) -> None:
    sent = document()
    del sent[missing]
    assert [(fault.pointer, fault.message) for fault in refused(sent)] == [(f"/{missing}", "is required")]


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None])
def test_unknown_versions_are_refused_and_the_known_ones_named(version: Any) -> None:
    (fault,) = refused(document(spec_version=version))
    assert fault.pointer == "/spec_version"
    assert "known versions: 1" in fault.message


@pytest.mark.parametrize("sent", [None, [], "x", 1, 1e999])
def test_what_is_not_an_object_is_a_fault_of_the_whole(sent: Any) -> None:
    (fault,) = refused(sent)
    assert (fault.pointer, fault.message) == ("", "must be an object")


@pytest.mark.parametrize(
    ("parts", "pointer", "limit", "value"),
    [
        ({"training": {"epochs": 0}}, "/training/epochs", 1, 0),
        ({"training": {"batch_size": 0}}, "/training/batch_size", 1, 0),
        ({"training": {"optimizer": {"lr": 0}}}, "/training/optimizer/lr", 1e-9, 0),
        ({"training": {"optimizer": {"lr": 5e-324}}}, "/training/optimizer/lr", 1e-9, 5e-324),
        ({"training": {"optimizer": {"lr": 1e308}}}, "/training/optimizer/lr", 100, 1e308),
        ({"training": {"optimizer": {"momentum": 1.0}}}, "/training/optimizer/momentum", 1, 1.0),
        ({"training": {"seed": 2**31}}, "/training/seed", 2**31 - 1, 2**31),
        ({"training": {"seed": 10**4000}}, "/training/seed", 2**31 - 1, None),
        ({"training": {"label_smoothing": 1.0}}, "/training/label_smoothing", 1, 1.0),
        ({"name": "x" * 201}, "/name", 200, 201),
        ({"name": ""}, "/name", 1, ""),
        ({"labels": {str(i): "" for i in range(65)}}, "/labels", 64, 65),
        ({"data": {"dataset": "x", "validation": 1}}, "/data/validation", 1, 1),
        ({"data": {"synthetic": {"classes": 10**6}}}, "/data/synthetic/classes", 1000, 10**6),
        ({"data": {"synthetic": {"train": 10**12}}}, "/data/synthetic/train", 10**6, 10**12),
        ({"exports": []}, "/exports", 1, 0),
        ({"exports": ["onnx", "onnx"]}, "/exports/1", None, "onnx"),
        ({"training": {"augmentation": ["cutout", "cutout"]}}, "/training/augmentation/1", None, "cutout"),
        ({"model": {"preset": "simple_cnn", "width": 0}}, "/model/width", 0.01, 0),
        ({"model": {"preset": "simple_cnn", "input_shape": [3]}}, "/model/input_shape", 2, 1),
        ({"model": {"layers": []}}, "/model/layers", 1, 0),
    ],
)
def test_a_number_outside_its_interval_is_a_fault_with_limit_and_value(
    parts: dict[str, Any], pointer: str, limit: Any, value: Any
) -> None:
    (fault,) = refused(document(**parts))
    assert (fault.pointer, fault.limit, fault.value) == (pointer, limit, value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e999])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    (fault,) = refused(document(training={"label_smoothing": number}))
    assert (fault.pointer, fault.value) == ("/training/label_smoothing", None)


@pytest.mark.parametrize(
    "text", ["a\x00", "\x1b[31m", "a\u0085", "\u202eabc", "a\u200bb", "a\u2028b", "\ufeffa", "a\r\nb"]
)
def test_invisible_characters_are_refused_in_names_and_labels(text: str) -> None:
    sent = document(name=text, labels={"key": text, f"k{text}": "value"})
    assert {fault.pointer.split("/")[1] for fault in refused(sent)} == {"name", "labels"}
    assert len(refused(sent)) == 3


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "{{7*7}}", "'; DROP TABLE jobs; --", "$(id)", "%s%n", "Ünï", "猫"]
)
def test_texts_that_only_look_dangerous_are_names_like_others(text: str) -> None:
    assert job(name=text).name == text


def test_half_of_a_surrogate_pair_is_refused() -> None:
    (fault,) = refused(document(name="\ud800"))
    assert "surrogate" in fault.message


def test_label_keys_have_no_colon_and_are_not_empty() -> None:
    assert [fault.pointer for fault in refused(document(labels={"a:b": "x", "": "y"}))] == ["/labels/a:b", "/labels/"]


@pytest.mark.parametrize(
    ("parts", "pointer", "offered"),
    [
        ({"model": {"preset": "os.system"}}, "/model/preset", "resnet20"),
        ({"model": {"layers": [{"type": "os.system"}]}}, "/model/layers/0/type", "conv_transpose"),
        (
            {"training": {"augmentation": ["cutout", "horizontal_flip", "alternating_flip"]}},
            "/training/augmentation/2",
            "excl",
        ),
        ({"training": {"augmentation": ["random_crop_zeros", "random_crop"]}}, "/training/augmentation/1", "exclude"),
        ({"training": {"optimizer": {"name": "torch.optim.SGD"}}}, "/training/optimizer/name", "adamw"),
        ({"training": {"schedule": {"name": "x.y"}}}, "/training/schedule/name", "one_cycle"),
        ({"optimizations": [{"type": "sparsify"}]}, "/optimizations/0/type", "small_kernels"),
        (
            {"optimizations": [{"type": "prune", "sparsity": 0.5, "criterion": "a.b"}]},
            "/optimizations/0/criterion",
            "fpgm",
        ),
        (
            {"optimizations": [{"type": "prune", "sparsity": 0.5, "structure": "rows"}]},
            "/optimizations/0/structure",
            "channels",
        ),
    ],
)
def test_unknown_names_are_refused_and_the_offered_ones_listed(
    parts: dict[str, Any], pointer: str, offered: str
) -> None:
    (fault,) = refused(document(**parts))
    assert fault.pointer == pointer
    assert offered in fault.message


def test_a_list_or_a_number_says_both_forms_in_one_fault() -> None:
    (fault,) = refused(document(model={"layers": [{"type": "conv", "out_channels": 1, "kernel_size": "x"}]}))
    assert fault.pointer == "/model/layers/0/kernel_size"


def test_a_fault_inside_containers_points_through_them() -> None:
    layers = [
        {"type": "repeat", "times": 2, "layers": [{"type": "residual", "layers": [{"type": "conv", "kernel_size": 3}]}]}
    ]
    (fault,) = refused(document(model={"layers": layers}))
    assert fault.pointer == "/model/layers/0/layers/0/layers/0/out_channels"


def test_a_broken_entry_does_not_make_its_list_look_empty() -> None:
    assert [fault.pointer for fault in refused(document(model={"layers": [{"type": "conv"}]}))] == [
        "/model/layers/0/out_channels",
        "/model/layers/0/kernel_size",
    ]


def test_a_key_named_like_a_type_keeps_its_place_in_the_pointer() -> None:
    layers = [{"type": "conv", "out_channels": 1, "kernel_size": 1, "conv": 1, "int": 2}]
    assert {f.pointer for f in refused(document(model={"layers": layers}))} == {
        "/model/layers/0/conv",
        "/model/layers/0/int",
    }
    overrides = {"type": 3, "prune": {"x": 1}}
    step = {"type": "prune", "sparsity": 0.5, "overrides": overrides}
    assert {fault.pointer for fault in refused(document(optimizations=[step]))} == {
        "/optimizations/0/overrides/type",
        "/optimizations/0/overrides/prune/x",
    }


def test_depth_has_a_limit() -> None:
    deep: Any = 1
    for _ in range(65):
        deep = [deep]
    (fault,) = refused(deep)
    assert (fault.limit, fault.pointer) == (64, "")
    for _ in range(100_000):
        deep = [deep]
    assert refused(deep)[0].limit == 64


def test_bulk_is_refused_before_it_is_looked_at_in_detail() -> None:
    (many_keys,) = refused(document(**{f"k{number}": 1 for number in range(100_000)}))
    assert (many_keys.pointer, many_keys.limit) == ("", 10_000)
    (many_entries,) = refused(document(optimizations=[1] * 400_000))
    assert (many_entries.pointer, many_entries.value) == ("/optimizations", 400_000)


def test_at_most_a_hundred_faults_are_listed() -> None:
    assert len(refused(document(model={"layers": [{"type": "relu", "x": 1}] * 9000}))) == MOST_FAULTS


def test_long_keys_and_values_do_not_come_back() -> None:
    (fault,) = refused(document(**{"x" * 1_000_000: 1}))
    assert len(fault.pointer) < 100
    (fault,) = refused(document(training={"optimizer": {"name": "y" * 10_000}}))
    assert fault.value is None


def test_a_model_is_a_preset_or_layers_and_data_one_source() -> None:
    layers = {"layers": [{"type": "flatten"}]}
    for none_or_two in ({}, {"weights": "w1"}, {"preset": "simple_cnn", **layers}, {"job": "j1", **layers}):
        (fault,) = refused(document(model=none_or_two))
        assert (fault.pointer, fault.message) == ("/model", "state exactly one of: preset, layers, job")
    assert [fault.message for fault in refused(document(model=None))] == ["must be an object"]
    (fault,) = refused(document(model={"job": "j 1"}))
    assert (fault.pointer, fault.message) == ("/model/job", "must match ^[A-Za-z0-9_-]{1,64}$")
    assert not refused(document(model={"job": "j1", "artifact": "pruned"}))
    assert [fault.pointer for fault in refused(document(data={}))] == ["/data"]
    assert refused(document(data={"dataset": "mnist", "synthetic": {}}))


@pytest.mark.parametrize(
    ("training", "pointer"),
    [
        ({"optimizer": {"name": "adam", "momentum": 0.9}}, "/training/optimizer/momentum"),
        ({"optimizer": {"betas": [0.9, 0.99]}}, "/training/optimizer/betas"),
        ({"optimizer": {"momentum": 0, "nesterov": True}}, "/training/optimizer/nesterov"),
        ({"schedule": {"name": "cosine", "gamma": 0.5}}, "/training/schedule/gamma"),
        ({"schedule": {"milestones": [3]}}, "/training/schedule/milestones"),
        ({"schedule": {"name": "step", "milestones": [5, 3]}}, "/training/schedule/milestones/1"),
        ({"schedule": {"name": "step", "milestones": [5, 5]}}, "/training/schedule/milestones/1"),
    ],
)
def test_fields_of_another_kind_are_refused(training: dict[str, Any], pointer: str) -> None:
    assert [fault.pointer for fault in refused(document(training=training))] == [pointer]


def test_retraining_takes_a_third_of_the_epochs_and_at_least_one() -> None:
    for epochs, expected in ((1, 1), (2, 1), (10, 3), (300, 100)):
        training = job(training={"epochs": epochs}).training
        assert retraining(Prune(sparsity=0.5), training) == Retrain(
            policy="auto", epochs=expected, distillation=SELF_DISTILLATION
        )
    none = Prune(sparsity=0.5, retrain=Retrain(policy="none"))
    assert retraining(none, job().training).epochs == 0


def test_a_job_is_immutable() -> None:
    spec = job()
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"
    assert isinstance(spec, JobSpec)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"spec_version": 2}, ("/spec_version", 1, 2)),
        ({"model": {"preset": "resnet1000"}}, ("/model/preset", None, "resnet1000")),
        ({"model": {"preset": "simple_cnn", "input_shape": [3]}}, ("/model/input_shape", 2, 1)),
    ],
)
def test_a_fault_names_the_value_that_was_sent(changes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    sent = {"spec_version": 1, "data": {"synthetic": {}}, "model": {"preset": "simple_cnn"}}
    with pytest.raises(InvalidSpec) as caught:
        parse_job(sent | changes)
    (fault,) = caught.value.faults
    assert (fault.pointer, fault.limit, fault.value) == expected
    if fault.limit == 2:
        assert fault.message == "must have at least 2 entries"
