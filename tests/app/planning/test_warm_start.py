"""Starting from a finished job or from uploaded weights, and learning from a teacher: what fits, and what is fresh."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.network.architecture import Preprocessing
from app.planning.plan import make_plan
from app.planning.warm_start import head_layers
from app.spec.data import DataFacts
from app.spec.job import parse_job
from app.spec.references import Reference, Source, references_in
from tests.support.jobs.sources import faults_with, planned, pooled, shapes_of, source_of
from tests.support.jobs.specs import COLOUR, GREY, NAMES, PICTURES, document, graph_of, job, refused

KEY = "job-j1-pruned"
FEW = DataFacts("few", (28, 28), 4, NAMES[:4], 1000, 100, "uint8")
WEIGHTS = {"preset": "simple_cnn", "weights": "w1"}
PRUNE: dict[str, Any] = {"type": "prune", "sparsity": 0.5}


def uploaded(**changes: tuple[int, ...] | None) -> Source:
    """The tensors of simple_cnn for Fashion-MNIST, some of them (`a__b` is a.b) in other shapes or absent."""
    tensors = shapes_of(planned(GREY, {}).baseline)
    for name, shape in changes.items():
        key = name.replace("__", ".")
        tensors.pop(key, None)
        if shape is not None:
            tensors[key] = shape
    return Source.of_tensors(tensors)


def pointers(*args: Any, **parts: Any) -> list[str]:
    """Where the faults of a job that refers to networks are."""
    return [fault.pointer for fault in faults_with(*args, **parts)]


def said(plan: Any, pointer: str) -> list[str]:
    """The warnings of a plan at a pointer."""
    return [warning.message for warning in plan.warnings if warning.pointer == pointer]


# --- what is referred to ---------------------------------------------------------------------------------------------


def test_each_network_that_a_job_names_is_a_reference_once_with_the_place_that_names_it_first() -> None:
    spec = job(
        model={"job": "j1"},
        optimizations=[
            {"type": "distill", "teacher": "j2"},
            PRUNE | {"retrain": {"distillation": {"teacher": "j2", "artifact": "pruned"}}},
            PRUNE | {"retrain": {"distillation": {"teacher": "j2"}}},
            PRUNE | {"retrain": {"distillation": {}}},
        ],
    )
    assert references_in(spec) == (
        Reference("job", "j1", "pruned", "/model/job"),
        Reference("job", "j2", "baseline", "/optimizations/0/teacher"),
        Reference("job", "j2", "pruned", "/optimizations/1/retrain/distillation/teacher"),
    )
    assert [found.key for found in references_in(spec)] == [KEY, "job-j2-baseline", "job-j2-pruned"]
    assert [(r.key, r.pointer) for r in references_in(job(model=WEIGHTS))] == [("weights-w1", "/model/weights")]
    assert references_in(job()) == ()


def test_a_network_that_is_not_there_is_a_fault_where_it_is_named() -> None:
    distill = [{"type": "distill", "teacher": "j2"}]
    assert pointers(GREY, {}, model={"job": "j1"}, optimizations=distill) == ["/model/job", "/optimizations/0/teacher"]
    (fault,) = faults_with(GREY, {}, model=WEIGHTS)
    assert (fault.pointer, fault.value) == ("/model/weights", "w1")


# --- a finished job's network ----------------------------------------------------------------------------------------


def test_the_network_of_a_job_is_taken_as_it_is_where_the_classes_are_as_many() -> None:
    source = source_of()
    plan = planned(GREY, {KEY: source}, model={"job": "j1"})
    assert plan.context.to_layers() == list(source.layers or ())
    assert plan.start is not None
    assert (plan.start.fresh, plan.start.mean, plan.start.std) == ((), (0.25,), (0.5,))
    assert plan.warnings == ()
    assert plan.spec.model.input_shape == (1, 28, 28)


def test_another_class_count_gives_a_fresh_head_of_the_datas_and_the_plan_says_so() -> None:
    plan = planned(FEW, {KEY: source_of()}, model={"job": "j1"})
    assert plan.baseline["head"].shape == (4,)
    assert plan.start is not None
    assert plan.start.fresh == ("head",)
    (message,) = said(plan, "/model/head")
    assert "10 classes" in message
    assert "have 4: head starts fresh" in message


def test_a_head_that_is_to_be_kept_needs_the_same_class_count_and_both_numbers_are_told() -> None:
    (fault,) = faults_with(FEW, {KEY: source_of()}, model={"job": "j1", "head": "keep"})
    assert (fault.pointer, fault.limit, fault.value) == ("/model/head", 10, 4)
    assert planned(GREY, {KEY: source_of()}, model={"job": "j1", "head": "keep"}).start is not None


def test_a_new_head_is_fresh_whatever_the_class_count() -> None:
    for facts in (GREY, FEW):
        plan = planned(facts, {KEY: source_of()}, model={"job": "j1", "head": "new"})
        assert plan.start is not None
        assert plan.start.fresh == ("head",)
        assert plan.baseline["head"].shape == (facts.classes,)
        assert said(plan, "/model/head") == []


def test_the_head_is_the_last_layer_with_weights_and_the_norms_behind_it() -> None:
    layers = [
        *pooled(10)[:-3],
        {"type": "conv", "name": "scores", "out_channels": 10, "kernel_size": 1},
        {"type": "batch_norm", "name": "scale"},
        {"type": "global_avg_pool"},
        {"type": "flatten"},
    ]
    graph = graph_of(layers, (1, 28, 28), 10)
    assert head_layers(graph) == {"scores", "scale"}
    plan = planned(FEW, {KEY: source_of(layers)}, model={"job": "j1"})
    assert plan.baseline["scale"].shape == (4, 28, 28)


def test_a_head_that_uses_the_parameters_of_an_earlier_layer_is_fresh_where_they_are_stored() -> None:
    layers = [
        {"type": "global_avg_pool"},
        {"type": "flatten"},
        {"type": "linear", "name": "widen", "out_features": 10},
        {"type": "linear", "name": "once", "out_features": 10},
        {"type": "relu"},
        {"type": "linear", "name": "again", "shares": "once"},
    ]
    source = source_of(layers)
    plan = planned(GREY, {KEY: source}, model={"job": "j1", "head": "new"})
    assert plan.start is not None
    assert plan.start.fresh == ("once",)
    (fault,) = faults_with(FEW, {KEY: source}, model={"job": "j1"})
    assert fault.pointer == "/model/head"
    frozen = planned(GREY, {KEY: source}, model={"job": "j1"}, training={"frozen": ["once"]})
    assert frozen.frozen == {"once"}


def test_a_head_that_cannot_have_another_width_is_a_fault_at_the_head() -> None:
    layers = [*pooled(5), {"type": "concat", "name": "twice", "inputs": ["head", "head"]}]
    (fault,) = faults_with(FEW, {KEY: source_of(layers)}, model={"job": "j1"})
    assert fault.pointer == "/model/head"
    assert "no head for 4 classes can be made of head" in fault.message


def test_another_spatial_size_is_fine_where_the_network_takes_it() -> None:
    plan = planned(GREY, {KEY: source_of(input_shape=(1, 16, 16))}, model={"job": "j1"})
    assert plan.baseline.input_shape == (1, 28, 28)
    assert plan.start is not None
    assert plan.start.fresh == ()
    flat = [{"type": "flatten", "name": "flat"}, {"type": "linear", "name": "head", "out_features": 10}]
    (fault,) = faults_with(GREY, {KEY: source_of(flat, (1, 16, 16))}, model={"job": "j1"})
    assert (fault.pointer, fault.limit, fault.value) == ("/model/input_shape", [1, 16, 16], [1, 28, 28])
    assert "head: states 256" in fault.message


def test_other_input_channels_are_a_fault_at_the_input_shape() -> None:
    (fault,) = faults_with(COLOUR, {KEY: source_of()}, model={"job": "j1", "input_shape": [3, 32, 32]})
    assert (fault.pointer, fault.limit, fault.value) == ("/model/input_shape", [1, 28, 28], [3, 32, 32])
    assert "takes 1 channel, not 3" in fault.message


def test_pictures_take_the_shape_that_the_network_knows_unless_the_job_states_one() -> None:
    sources = {KEY: source_of(input_shape=(1, 20, 20))}
    assert planned(PICTURES, sources, model={"job": "j1"}).baseline.input_shape == (1, 20, 20)
    stated = planned(PICTURES, sources, model={"job": "j1", "input_shape": [1, 24, 24]})
    assert stated.baseline.input_shape == (1, 24, 24)


def test_synthetic_data_take_the_shape_of_the_network() -> None:
    facts = DataFacts("synthetic", (), 10, NAMES, 100, 20, "uint8")
    plan = planned(facts, {KEY: source_of()}, model={"job": "j1"}, data={"synthetic": {"train": 100, "test": 20}})
    assert plan.baseline.input_shape == (1, 28, 28)


def test_a_plan_made_of_its_own_document_is_the_same_plan() -> None:
    parts = {"model": {"job": "j1"}, "training": {"epochs": 0}, "optimizations": [PRUNE]}
    sources = {KEY: source_of(input_shape=(1, 16, 16))}
    plan = planned(GREY, sources, **parts)
    again = make_plan(parse_job(json.loads(json.dumps(plan.spec.document()))), GREY, sources=sources)
    assert (again.spec, again.graphs, again.start) == (plan.spec, plan.graphs, plan.start)


def test_classes_with_other_names_are_told_where_the_head_is_kept() -> None:
    turned = planned(GREY, {KEY: source_of(names=NAMES[::-1])}, model={"job": "j1"})
    assert "another order" in said(turned, "/model/head")[0]
    other = planned(GREY, {KEY: source_of(names=[*NAMES[:9], "zebra"])}, model={"job": "j1"})
    assert "'zebra' there, 'j' in the data" in said(other, "/model/head")[0]
    fresh = planned(GREY, {KEY: source_of(names=NAMES[::-1])}, model={"job": "j1", "head": "new"})
    assert said(fresh, "/model/head") == []


def test_images_of_another_scale_than_the_sources_are_told() -> None:
    floats = source_of(seen=Preprocessing(1.0, (0.25,), (0.5,)))
    assert (
        "multiplied by 1, these are by 0.00392157"
        in said(planned(GREY, {KEY: floats}, model={"job": "j1"}), "/model/job")[0]
    )


def test_layers_that_rewrites_bring_are_fresh_and_the_rest_is_not() -> None:
    plan = planned(GREY, {KEY: source_of()}, model={"job": "j1"}, optimizations=[{"type": "batch_norm"}])
    assert plan.start is not None
    assert len(plan.start.fresh) == 1
    assert plan.start.fresh[0] not in plan.context
    assert "start fresh" in said(plan, "/model/job")[0]
    wide = [{"type": "conv", "name": "wide", "out_channels": 8, "kernel_size": 5, "padding": 2}, *pooled(10)]
    stacked = planned(GREY, {KEY: source_of(wide)}, model={"job": "j1"}, optimizations=[{"type": "small_kernels"}])
    assert stacked.start is not None
    assert "wide" in stacked.start.fresh
    assert "first" not in stacked.start.fresh


def test_a_job_has_a_preset_or_a_job_and_unknown_fields_are_refused() -> None:
    assert [f.pointer for f in refused(document(model={"job": "j1", "preset": "simple_cnn"}))] == ["/model"]
    assert [f.pointer for f in refused(document(model={"job": "j1", "weights": "w"}))] == ["/model/weights"]
    assert [f.pointer for f in refused(document(model={"job": "j1", "head": "old"}))] == ["/model/head"]
    assert [f.pointer for f in refused(document(model={"job": "../secret"}))] == ["/model/job"]


# --- uploaded weights ------------------------------------------------------------------------------------------------


def test_weights_that_fit_leave_nothing_fresh() -> None:
    plan = planned(GREY, {"weights-w1": uploaded()}, model=WEIGHTS)
    assert plan.start is not None
    assert (plan.start.fresh, plan.start.mean) == ((), None)
    assert "measured on the training images" in said(plan, "/model/weights")[0]
    stated = WEIGHTS | {"preprocessing": {"mean": [0.3], "std": [0.2]}}
    plan = planned(GREY, {"weights-w1": uploaded()}, model=stated)
    assert plan.start is not None
    assert (plan.start.mean, plan.start.std) == ((0.3,), (0.2,))
    assert plan.warnings == ()


def test_every_tensor_that_does_not_fit_is_a_fault_with_both_shapes() -> None:
    source = uploaded(conv1__weight=(32, 3, 3, 3), linear1__bias=None, linear1__weight=(128, 9), other__weight=(3,))
    faults = faults_with(GREY, {"weights-w1": source}, model=WEIGHTS)
    assert {fault.pointer for fault in faults} == {"/model/weights"}
    assert [(fault.limit, fault.value) for fault in faults[:3]] == [
        ([32, 1, 3, 3], [32, 3, 3, 3]),
        ([128, 3136], [128, 9]),
        ([128], None),
    ]
    assert "conv1.weight as 32 x 3 x 3 x 3, but in the network it is 32 x 1 x 3 x 3" in faults[0].message
    assert "no tensor linear1.bias, which is 128" in faults[2].message
    assert "tensors that the network has not: other.weight" in faults[3].message


def test_no_more_faults_than_the_limit_come_back_and_many_unknown_names_are_cut() -> None:
    many = [{"type": "conv", "out_channels": 1, "kernel_size": 1} for _ in range(80)]
    model = {"layers": [*many, *pooled(10)], "weights": "w1"}
    assert len(faults_with(GREY, {"weights-w1": Source.of_tensors({})}, model=model)) == 100
    foreign = Source.of_tensors(uploaded().tensors | {f"x{n}.weight": (1,) for n in range(50)})
    (fault,) = faults_with(GREY, {"weights-w1": foreign}, model=WEIGHTS)
    assert "x7.weight and 42 more" in fault.message


def test_counters_of_batch_norm_are_neither_needed_nor_too_many() -> None:
    model = {"layers": pooled(10), "weights": "w1"}
    tensors = shapes_of(graph_of(pooled(10), (1, 28, 28)))
    source = Source.of_tensors(tensors | {"norm.num_batches_tracked": ()}, {"norm.num_batches_tracked": "I64"})
    assert planned(GREY, {"weights-w1": source}, model=model).start is not None


@pytest.mark.parametrize(
    ("kind", "fits"), [("F16", True), ("BF16", True), ("F64", True), ("I8", False), ("BOOL", False)]
)
def test_floating_types_are_weights_and_others_are_not(kind: str, fits: bool) -> None:
    source = Source.of_tensors(uploaded().tensors, {"conv1.weight": kind})
    faults = faults_with(GREY, {"weights-w1": source}, model=WEIGHTS)
    assert [(fault.pointer, fault.value) for fault in faults] == ([] if fits else [("/model/weights", kind)])


def test_with_a_new_head_its_tensors_may_be_absent_or_of_another_shape() -> None:
    model = WEIGHTS | {"head": "new"}
    for source in (uploaded(), uploaded(linear2__weight=None, linear2__bias=None), uploaded(linear2__bias=(1000,))):
        plan = planned(GREY, {"weights-w1": source}, model=model)
        assert plan.start is not None
        assert plan.start.fresh == ("linear2",)
    assert pointers(GREY, {"weights-w1": uploaded(linear2__bias=(1000,))}, model=WEIGHTS) == ["/model/weights"]
    (fault,) = faults_with(GREY, {"weights-w1": uploaded(linear1__bias=None)}, model=model)
    assert "linear1.bias" in fault.message


def test_fields_that_belong_to_weights_are_refused_without_them() -> None:
    seen = {"mean": [0.5], "std": [0.5]}
    assert [f.pointer for f in refused(document(model={"preset": "simple_cnn", "head": "new"}))] == ["/model/head"]
    assert [f.pointer for f in refused(document(model={"layers": pooled(10), "preprocessing": seen}))] == [
        "/model/preprocessing"
    ]
    assert "weights" not in job().document()["model"]
    assert job(model=WEIGHTS).document()["model"]["head"] == "keep"


@pytest.mark.parametrize(
    ("stated", "pointer"),
    [
        ({"mean": [0.5]}, "/model/preprocessing/std"),
        ({"mean": [0.5], "std": [0.5, 0.5]}, "/model/preprocessing/std"),
        ({"mean": [0.5], "std": [0]}, "/model/preprocessing/std/0"),
        ({"mean": [], "std": []}, "/model/preprocessing/mean"),
    ],
)
def test_a_preprocessing_that_cannot_be_is_refused(stated: dict[str, Any], pointer: str) -> None:
    assert pointer in [fault.pointer for fault in refused(document(model=WEIGHTS | {"preprocessing": stated}))]


def test_a_preprocessing_has_a_number_for_each_channel() -> None:
    stated = WEIGHTS | {"preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (fault,) = faults_with(GREY, {"weights-w1": uploaded()}, model=stated)
    assert (fault.pointer, fault.limit, fault.value) == ("/model/preprocessing/mean", 1, 3)


# --- no training at all ----------------------------------------------------------------------------------------------


def test_no_epochs_are_for_networks_that_come_trained() -> None:
    none = {"epochs": 0}
    (fault,) = refused(document(training=none))
    assert (fault.pointer, fault.limit, fault.value) == ("/training/epochs", 1, 0)
    assert [f.pointer for f in refused(document(training=none, model={"job": "j1", "head": "new"}))] == [
        "/training/epochs"
    ]
    assert planned(GREY, {KEY: source_of()}, model={"job": "j1"}, training=none).phases[1].epochs == 0
    assert planned(GREY, {"weights-w1": uploaded()}, model=WEIGHTS, training=none).start is not None


def test_no_epochs_leave_no_layer_fresh() -> None:
    sources, none = {KEY: source_of()}, {"epochs": 0}
    (fault,) = faults_with(FEW, sources, model={"job": "j1"}, training=none)
    assert (fault.pointer, fault.message) == ("/training/epochs", "0 leaves layers untrained that start fresh: head")
    inserted = [{"type": "batch_norm"}]
    assert pointers(GREY, sources, model={"job": "j1"}, training=none, optimizations=inserted) == ["/training/epochs"]
    harmless = [{"type": "dropout"}]
    assert planned(GREY, sources, model={"job": "j1"}, training=none, optimizations=harmless).start is not None


def test_without_a_training_retraining_takes_3_epochs_and_rewinding_has_nowhere_to_go() -> None:
    sources, parts = {KEY: source_of()}, {"model": {"job": "j1"}, "training": {"epochs": 0}}
    plan = planned(GREY, sources, optimizations=[PRUNE], **parts)
    assert [phase.epochs for phase in plan.phases if phase.phase == "retraining"] == [3]
    rewind = PRUNE | {"retrain": {"policy": "weight_rewind"}}
    (fault,) = faults_with(GREY, sources, optimizations=[rewind], **parts)
    assert (fault.pointer, fault.limit, fault.value) == ("/optimizations/0/retrain/epochs", 0, 3)


def test_a_teacher_of_the_training_needs_a_training() -> None:
    sent = document(model={"job": "j1"}, training={"epochs": 0}, optimizations=[{"type": "distill", "teacher": "j2"}])
    assert [fault.pointer for fault in refused(sent)] == ["/optimizations/0"]


# --- teachers --------------------------------------------------------------------------------------------------------

DISTILL = {"type": "distill", "teacher": "j2"}
RETAUGHT = PRUNE | {"retrain": {"distillation": {"teacher": "j2"}}}


@pytest.mark.parametrize(
    ("step", "pointer"),
    [(DISTILL, "/optimizations/0/teacher"), (RETAUGHT, "/optimizations/0/retrain/distillation/teacher")],
)
def test_a_teacher_knows_as_many_classes_and_takes_the_images(step: dict[str, Any], pointer: str) -> None:
    def faults(source: Source) -> list[Any]:
        return faults_with(GREY, {"job-j2-baseline": source}, optimizations=[step])

    assert faults(source_of()) == []
    assert faults(source_of(input_shape=(1, 16, 16))) == []
    (fault,) = faults(source_of(names=NAMES[:4]))
    assert (fault.pointer, fault.limit, fault.value) == (pointer, 4, 10)
    assert "distillation from a job of another class count" in fault.message
    (fault,) = faults(source_of(input_shape=(3, 28, 28), seen=Preprocessing(1.0, (0.0,) * 3, (1.0,) * 3)))
    assert (fault.pointer, fault.limit, fault.value) == (pointer, [3, 28, 28], [1, 28, 28])
    flat = [{"type": "flatten"}, {"type": "linear", "name": "head", "out_features": 10}]
    (fault,) = faults(source_of(flat, (1, 16, 16)))
    assert "head: states 256" in fault.message


def test_a_teacher_whose_classes_have_other_names_is_told() -> None:
    sources = {"job-j2-baseline": source_of(names=NAMES[::-1])}
    plan = planned(GREY, sources, optimizations=[DISTILL])
    assert "another order" in said(plan, "/optimizations/0/teacher")[0]
    assert planned(GREY, {"job-j2-baseline": source_of()}, optimizations=[DISTILL]).warnings == ()
