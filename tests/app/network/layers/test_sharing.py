"""Layers that use the parameters of an earlier one: what may be said, what is refused, what it costs, what is tied."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from app.errors import Fault, InvalidSpec
from app.network.cost import cost, layer_rows
from app.network.graph import Graph, build_graph
from app.network.layers.registry import LAYERS, read_layers
from app.network.layers.sharing import Shareable
from app.planning.plan import plan_answer
from app.pruning.channel_classes import channel_classes, shrink_graph
from app.rewrites.rewrites import rewrite
from app.spec.job import parse_job
from app.spec.optimizations import InsertBatchNorm, Rewrite, SmallKernels
from tests.support.jobs.sources import planned, source_of
from tests.support.jobs.specs import GREY, document, graph_of, job, misplanned, plan, refused
from tests.support.networks.topologies import HEAD, PICTURE, Layers, conv, layer

TWICE: Layers = [
    *[conv(4, name="stem"), layer("relu"), conv(4, 5, name="a", bias=False), layer("relu")],
    *[layer("conv", shares="a", name="b"), layer("relu"), *HEAD],
]
ONE_HEAD: Layers = [
    *[conv(4, name="left"), layer("global_avg_pool"), layer("flatten"), layer("linear", out_features=10, name="head")],
    *[conv(4, name="right", inputs=["input"]), layer("global_avg_pool"), layer("flatten")],
    *[layer("linear", shares="head", name="again"), layer("add", inputs=["head", "again"])],
]


def model(layers: Layers, **more: Any) -> dict[str, Any]:
    """A model of these layers for Fashion-MNIST."""
    return {"layers": layers, "input_shape": [1, 28, 28], **more}


def with_classes(layers: Layers, classes: int = 10) -> Layers:
    return [*layers[:-1], layers[-1] | {"out_features": classes}]


def faults_of(layers: Layers, shape: tuple[int, ...] = PICTURE) -> list[Fault]:
    """The faults of a network, read as a job has it and written out."""
    found = refused(document(model=model(layers)))
    if found:
        return found
    try:
        build_graph(read_layers(layers), shape)
    except InvalidSpec as exc:
        return list(exc.faults)
    return []


# --- the language ----------------------------------------------------------------------------------------------------


def test_a_layer_that_shares_has_the_fields_of_the_other_whether_it_states_them_or_not() -> None:
    graph = graph_of(TWICE, PICTURE)
    stated = [entry | {"out_channels": 4, "bias": False} if "shares" in entry else entry for entry in TWICE]
    assert graph_of(stated, PICTURE) == graph
    one, other = graph["a"].layer, graph["b"].layer
    assert other == one.model_copy(update={"shares": "a"})
    assert [node.name for node in graph.places("a")] == ["a", "b"]
    assert graph.places("b") == ()
    assert (graph["b"].shares, graph["b"].home, graph["a"].home) == ("a", "a", "a")


def test_every_layer_with_parameters_but_batch_norm_can_share() -> None:
    trained = {name for name, kind in LAYERS.items() if issubclass(kind, Shareable)}
    assert trained == {"conv", "conv_transpose", "linear", "prelu", "group_norm", "layer_norm"}
    graph = graph_of(
        [
            *[conv(4), layer("prelu", name="p"), layer("group_norm", num_groups=2, name="g"), layer("layer_norm")],
            layer("conv_transpose", out_channels=4, kernel_size=2, stride=2, groups=2, name="t"),
            *[layer("prelu", shares="p"), layer("group_norm", shares="g"), layer("layer_norm", shares="layer_norm1")],
            *[layer("conv_transpose", shares="t"), *HEAD],
        ],
        PICTURE,
    )
    assert [node.name for node in graph.nodes if node.shares] == [
        "prelu1",
        "group_norm1",
        "layer_norm2",
        "conv_transpose1",
    ]
    assert graph["conv_transpose1"].shape == (4, 32, 32)


def test_a_chain_of_shares_names_the_first_layer_at_each_place() -> None:
    layers = [conv(3, name="a"), layer("conv", shares="a", name="b"), layer("conv", shares="b", name="c")]
    graph = graph_of(layers, PICTURE)
    assert [node.shares for node in graph.nodes] == [None, "a", "a"]
    assert [entry.get("shares") for entry in graph.to_layers()] == [None, "a", "a"]


def test_names_are_found_as_inputs_are_and_each_turn_of_a_repeat_shares_within_itself() -> None:
    inner = [conv(3, name="x"), layer("conv", shares="x", name="y"), layer("conv", shares="out", name="z")]
    layers = [conv(3, name="out"), layer("repeat", name="r", times=2, layers=inner), layer("conv", shares="r_1_x")]
    graph = graph_of(layers, PICTURE)
    assert {node.name: node.shares for node in graph.nodes if node.shares} == {
        "r_1_y": "r_1_x",
        "r_1_z": "out",
        "r_2_y": "r_2_x",
        "r_2_z": "out",
        "conv1": "r_1_x",
    }


def test_a_network_that_shares_survives_json_and_a_job_comes_back_as_it_was_sent() -> None:
    graph = graph_of(TWICE, PICTURE)
    assert build_graph(read_layers(graph.to_layers()), PICTURE) == graph
    spec = job(model=model(with_classes(TWICE)))
    assert parse_job(spec.document()) == spec
    assert spec.document()["model"]["layers"][4] == {"type": "conv", "name": "b", "shares": "a"}


class Mistake(NamedTuple):
    """A network with one mistake, and what must be said about it."""

    layers: Layers
    pointer: str
    words: str
    limit: Any = None
    value: Any = None


A = conv(3, name="a")
MISTAKES = {
    "no width and nothing shared": Mistake([{"type": "conv", "kernel_size": 3}], "/0/out_channels", "is required"),
    "unknown": Mistake([A, layer("conv", shares="aa")], "/1/shares", "there is no layer 'aa' before it"),
    "itself": Mistake([layer("conv", name="b", shares="b")], "/0/shares", "cannot share its own parameters"),
    "later": Mistake([layer("conv", shares="a"), A], "/0/shares", "'a' comes later"),
    "the container around it": Mistake(
        [layer("residual", name="r", layers=[layer("conv", shares="r")])], "/0/layers/0/shares", "'r' comes later"
    ),
    "the input": Mistake([layer("conv", shares="input")], "/0/shares", "input has no parameters", None, "input"),
    "another type": Mistake(
        [A, layer("prelu", shares="a")],
        "/1/shares",
        "names an earlier prelu layer, but 'a' is of type conv",
        "prelu",
        "conv",
    ),
    "another width": Mistake([A, conv(5, shares="a")], "/1/out_channels", "is 5 here, but 3 at 'a'", 3, 5),
    "another kernel": Mistake(
        [A, layer("conv", shares="a", kernel_size=[3, 1])], "/1/kernel_size", "is [3, 1] here, but 3 at 'a'", 3, [3, 1]
    ),
    "another bias": Mistake(
        [A, layer("conv", shares="a", bias=False)], "/1/bias", "is false here, but true at 'a'", True, False
    ),
    "another stride": Mistake([A, layer("conv", shares="a", stride=2)], "/1/stride", "is 2 here, but 1", 1, 2),
    "another eps": Mistake(
        [layer("layer_norm"), layer("layer_norm", shares="layer_norm1", eps=0.1)], "/1/eps", "is 0.1 here", 1e-5, 0.1
    ),
    "other input channels": Mistake(
        [conv(4, name="a"), layer("conv", shares="a")], "/1/shares", "takes 3 channels, but 4 arrive here", 3, 4
    ),
    "other input features": Mistake(
        [layer("flatten"), layer("linear", out_features=7), layer("linear", shares="linear1")],
        "/2/shares",
        "takes 192 features, but 7 arrive here",
        192,
        7,
    ),
    "another rank": Mistake(
        [
            *[conv(5), layer("prelu", name="p"), layer("flatten")],
            *[layer("linear", out_features=5), layer("prelu", shares="p")],
        ],
        "/4/shares",
        "takes inputs with 2 spatial axes, but 0 arrive here",
        2,
        0,
    ),
    "a batch norm": Mistake(
        [layer("batch_norm", name="n"), layer("batch_norm", shares="n")],
        "/1/shares",
        "running statistics are those of one",
    ),
    "a layer without parameters": Mistake(
        [layer("relu"), layer("relu", shares="relu1")], "/1/shares", "is not a field"
    ),
    "a window that does not fit here": Mistake(
        [conv(3, 5, padding=0, name="a"), layer("max_pool", kernel_size=2), layer("conv", shares="a")],
        "/2",
        "reaches over 5 positions",
        2,
        5,
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_fault_with_its_place_and_both_numbers(name: str) -> None:
    mistake = MISTAKES[name]
    (fault,) = faults_of(mistake.layers)
    assert fault.pointer == "/model/layers" + mistake.pointer
    assert mistake.words in fault.message
    if name != "a layer without parameters" and name != "unknown":
        assert (fault.limit, fault.value) == (mistake.limit, mistake.value)


def test_every_field_that_disagrees_is_reported_and_faults_of_the_shared_layer_only_once() -> None:
    pointers = [fault.pointer for fault in faults_of([A, conv(5, 1, name="b", shares="a"), layer("conv", shares="b")])]
    assert pointers == ["/model/layers/1/out_channels", "/model/layers/1/kernel_size"]


def test_the_schema_of_a_layer_asks_for_its_fields_or_for_shares() -> None:
    schema = LAYERS["conv"].model_json_schema()
    assert schema["anyOf"] == [{"required": ["out_channels", "kernel_size"]}, {"required": ["shares"]}]
    assert "default" not in schema["properties"]["out_channels"]
    assert "earlier layer" in schema["properties"]["shares"]["description"]
    assert "anyOf" not in LAYERS["prelu"].model_json_schema()


# --- cost and channels -----------------------------------------------------------------------------------------------


def test_parameters_and_bytes_count_once_and_multiplications_at_each_use() -> None:
    graph = graph_of(TWICE, PICTURE)
    own = graph_of([entry if "shares" not in entry else conv(4, 5, bias=False, name="b") for entry in TWICE], PICTURE)
    assert cost(graph).macs == cost(own).macs
    assert cost(own).params - cost(graph).params == 4 * 4 * 25
    assert cost(graph).bytes < cost(own).bytes - 4 * 4 * 4 * 25
    rows = {row.name: row for row in layer_rows(graph)}
    assert (rows["a"].params, rows["b"].params) == (400, 0)
    assert rows["a"].macs == rows["b"].macs == 400 * 64
    assert sum(row.params for row in rows.values()) == cost(graph).params
    assert "b.weight" not in graph.tensors()


def test_inputs_and_outputs_of_both_uses_are_tied_and_the_tensor_is_cut_once() -> None:
    layers = [conv(4, name="s"), conv(5, name="a"), conv(4, 1, name="t"), layer("conv", shares="a", name="b"), *HEAD]
    graph = graph_of(layers, PICTURE)
    classes = channel_classes(graph)
    assert classes.slots["s"].ids.tolist() == classes.slots["t"].ids.tolist()
    assert classes.slots["a"].ids.tolist() == classes.slots["b"].ids.tolist()
    assert {axis.layer for axis in classes.axes} == {"s", "a", "t", "linear1"}
    gone = [int(classes.slots["t"].ids[1]), int(classes.slots["b"].ids[0]), int(classes.slots["a"].ids[3])]
    smaller = shrink_graph(graph, gone, classes)
    assert [smaller[name].shape[0] for name in "satb"] == [3, 3, 3, 3]
    assert smaller["b"].layer == smaller["a"].layer.model_copy(update={"shares": "a"})


def test_a_layer_that_reads_its_own_output_has_one_width() -> None:
    layers = [conv(4, name="s"), conv(4, name="a"), layer("conv", shares="a"), layer("conv", shares="a"), *HEAD]
    classes = channel_classes(graph_of(layers, PICTURE))
    ids = {name: classes.slots[name].ids.tolist() for name in ("s", "a", "conv1", "conv2")}
    assert len({tuple(found) for found in ids.values()}) == 1


def test_one_head_on_maps_of_other_sizes_ties_each_channel_with_its_features() -> None:
    """Behind flatten a channel has 4 features on the left and 2 on the right: blocks of 4 leave together."""
    layers = [
        *[conv(2, name="left"), layer("flatten"), layer("linear", out_features=3, name="head")],
        conv(4, [1, 2], padding=0, stride=[1, 2], inputs=["input"], name="right"),
        *[layer("flatten"), layer("linear", shares="head", name="again"), layer("add", inputs=["head", "again"])],
    ]
    graph = graph_of(layers, (1, 2, 2))
    classes = channel_classes(graph)
    left, right = classes.slots["left"].ids.tolist(), classes.slots["right"].ids.tolist()
    assert right == [left[0], left[0], left[1], left[1]]
    smaller = shrink_graph(graph, left[:1], classes)
    assert [smaller[name].shape[0] for name in ("left", "right")] == [1, 2]
    assert smaller.tensors()["head.weight"].shape == (3, 4)


# --- rewrites --------------------------------------------------------------------------------------------------------


def rewritten(layers: Layers, step: Rewrite) -> Graph:
    return rewrite(graph_of(layers, PICTURE), step)


def test_batch_norm_is_inserted_at_each_place_and_the_bias_is_removed_where_all_have_one() -> None:
    layers = [conv(3, name="a"), layer("relu"), layer("conv", shares="a", name="b"), layer("relu"), *HEAD]
    graph = rewritten(layers, InsertBatchNorm())
    assert [node.name for node in graph.nodes if node.type == "batch_norm"] == ["a_bn", "b_bn"]
    assert not graph["a"].layer.bias  # type: ignore[attr-defined]
    assert list(graph.tensors())[:2] == ["a.weight", "a_bn.weight"]
    named = rewritten(layers, InsertBatchNorm(layers=("b",)))
    assert [node.name for node in named.nodes if node.type == "batch_norm"] == ["b_bn"]
    assert named["a"].layer.bias  # type: ignore[attr-defined]


def test_small_kernels_gives_both_places_the_same_stack_with_shared_weights() -> None:
    graph = rewritten(TWICE, SmallKernels())
    assert {node.name: node.shares for node in graph.nodes if node.shares} == {"b_k1": "a_k1", "b": "a"}
    assert graph["b"].layer.kernel_size == 3  # type: ignore[attr-defined]
    assert graph["b_k1"].inputs == ("relu2",)
    assert graph["a"].shape == graph["b"].shape == (4, 8, 8)
    assert rewritten(TWICE, SmallKernels(layers=("b", "a"))) == graph


def test_small_kernels_on_one_of_two_places_is_refused_with_the_other() -> None:
    with pytest.raises(InvalidSpec) as caught:
        rewritten(TWICE, SmallKernels(layers=("a",)))
    (fault,) = caught.value.faults
    assert (fault.pointer, fault.message) == (
        "/optimizations/0/layers/0",
        "a has its parameters in common with b: name all of them",
    )


def test_copies_of_a_shared_activation_have_slopes_of_their_own() -> None:
    layers = [
        *[conv(4, 1), layer("prelu", name="p"), conv(4, 5, name="wide"), layer("prelu", shares="p", name="q")],
        *HEAD,
    ]
    graph = rewritten(layers, SmallKernels())
    assert graph["wide_k1_prelu"].shares is None
    assert graph["q"].shares == "p"


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_the_plan_of_a_mask_counts_shared_weights_once_and_says_whose_they_are() -> None:
    made = plan(model=model(with_classes(TWICE)), optimizations=[{"type": "prune", "sparsity": 0.5, "scope": "layer"}])
    rows = {row.layer: row for row in made.layers}
    assert (rows["a"].before, rows["a"].after) == (400, 200)
    assert (rows["b"].action, rows["b"].before, rows["b"].reason) == ("follow", None, "uses the weights of a")
    assert made.planned_cost.nonzero_params == made.planned_cost.params - 18 - 200 - 20


def test_the_plan_of_channels_narrows_both_places_and_the_budget_is_met() -> None:
    made = plan(
        model=model(with_classes(TWICE)),
        optimizations=[{"type": "prune", "structure": "channels", "budget": {"macs": 0.5}, "round_to": 1}],
    )
    rows = {row.layer: row for row in made.layers}
    assert rows["a"].action == rows["b"].action == "narrow"
    assert rows["a"].after == rows["b"].after == made.planned["b"].shape[0]
    assert made.planned_cost == cost(made.planned)
    assert made.planned_cost.macs <= 0.5 * made.baseline_cost.macs
    assert plan_answer(made)["spec"]["model"]["layers"][4] == {"type": "conv", "name": "b", "shares": "a"}


@pytest.mark.parametrize("structure", ["weights", "channels"])
@pytest.mark.parametrize(
    ("part", "at"), [({"exclude": ["b"]}, "/exclude/0"), ({"overrides": {"b": {"sparsity": 0.1}}}, "/overrides/b")]
)
def test_pruning_names_shared_weights_by_the_layer_that_has_them(structure: str, part: dict[str, Any], at: str) -> None:
    step = {"type": "prune", "structure": structure, "sparsity": 0.5, **part}
    (fault,) = misplanned(model=model(with_classes(TWICE)), optimizations=[step])
    assert fault.pointer == "/optimizations/0" + at
    assert fault.message == "has the weights of a, which it shares: name a"


def test_an_excluded_layer_keeps_its_channels_at_every_place() -> None:
    step = {"type": "prune", "structure": "channels", "sparsity": 0.5, "round_to": 1, "exclude": ["a"]}
    layers = [conv(4, name="s"), conv(6, name="a"), conv(4, 1), layer("conv", shares="a", name="b"), conv(8), *HEAD]
    made = plan(model=model(with_classes([*layers])), optimizations=[step])
    reasons = {row.layer: row.reason for row in made.layers}
    assert "width 6 stays: excluded" in reasons["a"]
    assert "tied to a, which is excluded" in reasons["b"]
    assert made.planned["b"].shape[0] == 6
    assert made.planned["conv2"].shape[0] == 4


def test_freezing_names_the_layer_that_has_the_weights() -> None:
    assert plan(model=model(with_classes(TWICE)), training={"frozen": ["a"]}).frozen == {"a"}
    (fault,) = misplanned(model=model(with_classes(TWICE)), training={"frozen": ["b"]})
    assert fault.message == "names only layers without parameters of their own: b shares those of a"


def test_the_scores_of_a_wrong_shared_head_point_at_the_width_that_was_sent() -> None:
    wide = layer("linear", out_features=4, name="a")
    layers = [conv(4), layer("global_avg_pool"), layer("flatten"), wide, layer("relu"), layer("linear", shares="a")]
    (fault,) = misplanned(model=model(layers))
    assert (fault.pointer, fault.limit, fault.value) == ("/model/layers/3/out_features", 10, 4)


def test_a_shared_head_is_made_anew_for_another_number_of_classes() -> None:
    layers = [entry | {"out_features": 3} if entry.get("name") == "head" else entry for entry in ONE_HEAD]
    source = source_of(layers, names=("x", "y", "z"))
    made = planned(GREY, {"job-j1-pruned": source}, model={"job": "j1"})
    assert made.start is not None
    assert made.start.fresh == ("head",)
