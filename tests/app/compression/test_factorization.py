"""Layers as products of smaller ones: which can be, their cost and names, ranks by energy and budget, the dry run."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from app.compression.factorization import factorize, low_rank_layers, part_names, separable_layers, separate
from app.compression.rank_selection import choose_ranks
from app.errors import Fault
from app.network.cost import cost
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.network.presets.registry import PRESETS
from app.pruning.budget import BudgetUnreachable
from app.pruning.channel_classes import channel_classes, shrink_graph
from app.pruning.channel_rules import FloatArray
from app.spec.low_rank import LowRank, Separable
from tests.support.jobs.specs import COLOUR, graph_of, misplanned, plan, preset_graph

Layers = list[dict[str, Any]]


def conv(channels: int, kernel: Any = 3, **more: Any) -> dict[str, Any]:
    return {"type": "conv", "out_channels": channels, "kernel_size": kernel, **more}


def transposed(channels: int, kernel: Any, **more: Any) -> dict[str, Any]:
    return {"type": "conv_transpose", "out_channels": channels, "kernel_size": kernel, **more}


HEAD: Layers = [{"type": "global_avg_pool"}, {"type": "flatten"}, {"type": "linear", "out_features": 3}]
CASES: dict[str, tuple[tuple[int, ...], Layers]] = {
    "plain": ((16, 9, 9), [conv(24, padding=1, name="a")]),
    "stride, padding, dilation": (
        (17, 11, 12),
        [conv(20, [3, 5], stride=[2, 1], padding=[4, 1], dilation=2, name="a")],
    ),
    "same, without bias": ((16, 8, 8), [conv(32, 5, padding="same", bias=False, name="a")]),
    "1-D": ((24, 30), [conv(16, 9, stride=3, padding=4, name="a")]),
    "3-D": ((16, 5, 6, 7), [conv(16, [3, 2, 1], padding=[1, 0, 1], name="a")]),
    "1 x 1": ((20, 8, 8), [conv(48, 1, name="a")]),
    "1 x 1 with stride and padding": ((32, 7, 7), [conv(32, 1, stride=2, padding=1, name="a")]),
    "transposed": ((16, 5, 5), [transposed(24, 4, stride=2, padding=1, name="a")]),
    "transposed, odd": ((32, 5), [transposed(16, 3, stride=3, padding=1, output_padding=2, bias=False, name="a")]),
    "linear": ((2, 5, 5), [{"type": "flatten"}, {"type": "linear", "out_features": 40, "name": "a"}, {"type": "relu"}]),
    "shared": (
        (16, 8, 8),
        [
            *[conv(16, padding=1, name="a"), {"type": "relu"}, {"type": "max_pool", "kernel_size": 2}],
            *[{"type": "conv", "shares": "a", "name": "again"}, {"type": "relu"}],
        ],
    ),
}


def graph(case: str) -> Graph:
    shape, layers = CASES[case]
    tail = HEAD[2:] if case == "linear" else HEAD
    return graph_of([*layers, *tail], shape)


def widths(found: Graph) -> dict[str, int]:
    return {node.name: node.shape[0] for node in found.nodes if node.type in ("conv", "conv_transpose", "linear")}


def rank_grid(full: tuple[int, ...]) -> list[tuple[int, ...]]:
    sides = [sorted({1, 3, width // 2, width - 1, width}) for width in full]
    return list(itertools.product(*sides))


@pytest.mark.parametrize("case", CASES)
def test_a_product_gives_the_shapes_of_the_layer_and_costs_what_was_counted(case: str) -> None:
    before = graph(case)
    layer = low_rank_layers(before)[0]["a"]
    dense, whole = cost(before), layer.costs(layer.widths)
    assert whole == (sum(place.macs for place in before.places("a")), before["a"].tensors["weight"].elements)
    for ranks in rank_grid(layer.widths):
        after = factorize(before, {"a": ranks})
        macs, weights = layer.costs(ranks)
        assert cost(after).macs - dense.macs == macs - whole[0]
        assert cost(after).params - dense.params == weights - whole[1]
        assert [after[node.name].shape for node in before.nodes] == [node.shape for node in before.nodes]
        assert build_graph(read_layers(after.to_layers()), after.input_shape) == after
        assert (after == before) == (ranks == layer.widths)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("linear", "transposed", "transposed, odd")])
def test_separable_layers_give_the_shapes_of_the_convolution(case: str) -> None:
    before = graph(case)
    found, reasons = separable_layers(before)
    if case.startswith("1 x 1"):
        assert not found
        assert reasons["a"] == "its kernel is 1: there is nothing to separate"
        return
    after = separate(before, found)
    assert cost(after).macs < cost(before).macs
    assert [after[node.name].shape for node in before.nodes] == [node.shape for node in before.nodes]
    assert build_graph(read_layers(after.to_layers()), after.input_shape) == after
    depthwise, conv_before = after["a_depthwise"].layer, before["a"].layer
    for field in ("kernel_size", "stride", "padding", "dilation"):
        assert getattr(depthwise, field) == getattr(conv_before, field)
    assert depthwise.groups == "depthwise"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_factorised_separated_and_then_pruned(name: str) -> None:
    before = preset_graph(name)
    found, _ = low_rank_layers(before)
    product = factorize(before, {layer: tool.floor(8, "macs") for layer, tool in found.items()})
    found, _ = separable_layers(before)
    for after in (product, separate(before, found)):
        assert [after[node.name].shape for node in before.nodes] == [node.shape for node in before.nodes]
        assert build_graph(read_layers(after.to_layers()), after.input_shape) == after
        assert (cost(after).macs < cost(before).macs) == (after != before)
        assert len(channel_classes(after).groups) >= len(channel_classes(before).groups)


def test_the_ranks_are_widths_that_later_steps_can_prune() -> None:
    after = factorize(graph("plain"), {"a": (12, 20)})
    assert widths(after) == {"a_reduce": 12, "a_core": 20, "a": 24, "linear1": 3}
    classes = channel_classes(after)
    groups = [group for group in classes.groups if "a_core" in classes.layers_of(group)]
    (group,) = groups
    smaller = shrink_graph(after, group.classes[:4].tolist(), classes)
    assert widths(smaller) == {"a_reduce": 12, "a_core": 16, "a": 24, "linear1": 3}


def test_a_side_that_is_not_cut_has_no_layer_of_its_own() -> None:
    before = graph("plain")
    outputs_only, inputs_only = factorize(before, {"a": (16, 8)}), factorize(before, {"a": (8, 24)})
    assert widths(outputs_only) == {"a_core": 8, "a": 24, "linear1": 3}
    assert widths(inputs_only) == {"a_reduce": 8, "a": 24, "linear1": 3}
    kernels = [getattr(outputs_only[name].layer, "kernel_size") for name in ("a_core", "a")]  # noqa: B009
    assert kernels == [3, 1]
    assert getattr(inputs_only["a"].layer, "kernel_size") == 3  # noqa: B009
    biases = {name: list(after[name].tensors) for after in (outputs_only, inputs_only) for name in widths(after)}
    assert biases["a_core"] == biases["a_reduce"] == ["weight"]


def test_all_places_of_a_shared_layer_change_together() -> None:
    before = graph("shared")
    after = factorize(before, {"a": (8, 8)})
    assert {node.name: node.shares for node in after.nodes if node.shares} == {
        "again_reduce": "a_reduce",
        "again_core": "a_core",
        "again": "a",
    }
    assert low_rank_layers(before)[1]["again"] == "uses the weights of a"


def test_names_are_free_and_do_not_depend_on_what_is_replaced() -> None:
    long = "x" * 198
    layers = [conv(16, padding=1, name=name) for name in ("a", "a_core", "a_core_reduce", f"{long}a", f"{long}b")]
    before = graph_of([*layers, *HEAD], (16, 6, 6))
    names = part_names(before)
    assert names["a"] == {"expand": "a", "reduce": "a_reduce", "core": "a_core2", "depthwise": "a_depthwise"}
    assert names["a_core"]["reduce"] == "a_core_reduce2"
    everything = [name for roles in names.values() for name in roles.values()]
    assert len(set(everything)) == len(everything)
    assert max(map(len, everything)) <= 200
    ranks = {layer["name"]: (8, 8) for layer in layers}
    together = factorize(before, ranks)
    for name, own in ranks.items():
        alone = factorize(before, {name: own})
        assert [node.name for node in alone.nodes if node.name not in before] == [
            node.name for node in together.nodes if node.name in names[name].values() and node.name not in before
        ]


def test_every_layer_that_stays_has_its_reason() -> None:
    layers = [
        conv(16, name="narrow"),
        conv(32, name="fits"),
        conv(32, name="depth", groups="depthwise"),
        conv(64, name="grouped", groups=4),
        conv(12, name="few"),
        transposed(32, 2, name="up"),
        conv(64, 1, name="point"),
        *HEAD[:2],
        {"type": "linear", "out_features": 5, "name": "last"},
    ]
    found = graph_of(layers, (3, 12, 12))
    fit, reasons = low_rank_layers(found, exclude=["point"])
    assert list(fit) == ["fits"]
    assert reasons == {
        "narrow": "3 input channels, fewer than 16",
        "depth": "is depthwise",
        "grouped": "has 4 groups",
        "few": "12 output channels, fewer than 16",
        "up": "12 input channels, fewer than 16",
        "point": "excluded",
        "last": "5 output features, fewer than 16",
    }
    assert low_rank_layers(found, only=["point"])[1]["fits"] == "not among the layers that are named"
    fit, reasons = separable_layers(found)
    assert list(fit) == ["fits", "few"]
    assert reasons["up"] == "is a conv_transpose layer: plain convolutions become separable"
    assert reasons["last"] == "is a linear layer: plain convolutions become separable"
    assert reasons["narrow"].startswith("3 input channels, fewer than 16")
    assert reasons["grouped"] == "has 4 groups"


# --- ranks ------------------------------------------------------------------------------------------------------------


def spectra_for(found: Graph, seed: int = 0) -> dict[str, FloatArray]:
    """What random positive squares lose when the last ranks are dropped."""
    generator = np.random.default_rng(seed)
    spectra: dict[str, FloatArray] = {}
    for name, layer in low_rank_layers(found)[0].items():
        squares = np.ones(())
        for width in layer.widths:
            side = np.sort(generator.exponential(size=width) ** 3)[::-1]
            squares = np.multiply.outer(squares, side)
        kept = np.zeros([width + 1 for width in layer.widths])
        kept[tuple(slice(1, None) for _ in layer.widths)] = squares
        for axis in range(kept.ndim):
            kept = kept.cumsum(axis=axis)
        spectra[name] = 1 - kept / kept.flat[-1]
    return spectra


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.3}, {"bytes": 0.4}, {"macs": 0.9}])
@pytest.mark.parametrize(("name", "round_to"), [("deep_cnn", 1), ("resnet20", 1), ("resnet20", 8), ("unet_encoder", 8)])
def test_a_budget_is_met_from_below_and_no_rank_can_be_one_step_larger(
    name: str, budget: dict[str, float], round_to: int
) -> None:
    found = preset_graph(name)
    step = LowRank.model_validate({"budget": budget, "round_to": round_to})
    choice = choose_ranks(found, step, spectra_for(found))
    ((measure, share),) = budget.items()
    allowed = int(share * getattr(cost(found), measure))
    after = factorize(found, choice.ranks)
    assert cost(after) == choice.cost
    assert getattr(choice.cost, measure) <= allowed
    assert choice.ranks
    for layer_name, layer in choice.layers.items():
        ranks = choice.ranks.get(layer_name, layer.widths)
        for mode, width in enumerate(layer.widths):
            assert ranks[mode] == width or (ranks[mode] % round_to == 0 and ranks[mode] >= max(8, 0.1 * width))
            larger = [rank for rank in layer.grid(mode, round_to) if rank > ranks[mode]][:1]
            for rank in larger:
                raised = layer.worthwhile_ranks((*ranks[:mode], rank, *ranks[mode + 1 :]), measure)
                assert getattr(cost(factorize(found, choice.ranks | {layer_name: raised})), measure) > allowed
    assert cost(after).macs <= cost(found).macs
    assert cost(after).params <= cost(found).params


def test_a_smaller_budget_loses_no_less_of_any_kind_of_cost() -> None:
    found = preset_graph("vgg16")
    spectra = spectra_for(found)
    costs = [
        choose_ranks(found, LowRank.model_validate({"budget": {"macs": share}}), spectra).cost.macs
        for share in (0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    assert costs == sorted(costs)
    assert costs[-1] == cost(found).macs


def test_the_layer_that_has_the_rank_to_spare_gives_it() -> None:
    found = graph_of([conv(64, padding=1, name="full"), conv(64, padding=1, name="spare"), *HEAD], (64, 8, 8))
    grid = np.arange(65)
    flat = 1 - np.multiply.outer(grid / 64, grid / 64)
    spare = 1 - np.multiply.outer(np.minimum(grid, 8) / 8, np.minimum(grid, 8) / 8)
    step = LowRank.model_validate({"budget": {"macs": 0.6}})
    choice = choose_ranks(found, step, {"full": flat, "spare": spare})
    assert list(choice.ranks) == ["spare"]
    assert choice.kept["full"] == "the budget was met without it"
    assert spare[choice.ranks["spare"]] == 0


def test_ranks_by_energy_are_the_cheapest_that_keep_it() -> None:
    found = preset_graph("deep_cnn")
    spectra = spectra_for(found)
    choice = choose_ranks(found, LowRank(energy=0.8), spectra)
    assert set(choice.ranks) | set(choice.kept) == set(widths(found))
    for name, ranks in choice.ranks.items():
        layer = choice.layers[name]
        assert spectra[name][ranks] <= 0.2
        for other in itertools.product(*(layer.grid(mode, 8) for mode in range(len(ranks)))):
            if layer.costs(other)[0] < layer.costs(ranks)[0]:
                assert spectra[name][other] > 0.2


def test_a_rank_is_taken_as_it_is_and_no_layer_becomes_dearer() -> None:
    found = preset_graph("deep_cnn")
    choice = choose_ranks(found, LowRank(rank=60), None)
    assert choice.ranks == {"conv3": (64, 60), "conv4": (60, 60), "linear1": (60,)}
    assert choice.kept["conv2"] == "at rank 60 it would cost no less"


def test_a_budget_out_of_reach_names_the_lowest_and_what_holds_it() -> None:
    found = preset_graph("deep_cnn")
    step = LowRank.model_validate({"budget": {"macs": 0.1}})
    with pytest.raises(BudgetUnreachable, match=r"at least \d+ \(0\.120 of the baseline\) remain") as caught:
        choose_ranks(found, step, None)
    assert "conv1 has 46% of it (3 input channels, fewer than 16)" in str(caught.value)
    assert caught.value.floor is not None
    reached = choose_ranks(found, LowRank.model_validate({"budget": {"macs": caught.value.floor}}), None)
    assert reached.cost.macs == reached.floor.macs == caught.value.floor


# --- the dry run ------------------------------------------------------------------------------------------------------


MODEL = {
    "layers": [
        *[conv(16, padding=1), {"type": "batch_norm"}, {"type": "relu"}, conv(32, padding=1), {"type": "relu"}],
        *[conv(64, padding=1, stride=2), {"type": "relu"}, *HEAD[:2], {"type": "linear", "out_features": 10}],
    ]
}


def faults(*steps: dict[str, Any]) -> list[Fault]:
    return misplanned(COLOUR, model=MODEL, optimizations=list(steps))


def low_rank(**fields: Any) -> dict[str, Any]:
    return {"type": "low_rank", **fields}


@pytest.mark.parametrize("step", [low_rank(rank=8), {"type": "separable"}])
def test_ranks_and_separable_layers_are_planned_exactly(step: dict[str, Any]) -> None:
    planned = plan(COLOUR, model=MODEL, optimizations=[step])
    assert all(row.exact for row in planned.layers)
    assert planned.planned_cost == planned.floor == cost(planned.planned)
    assert planned.planned_cost.macs < planned.baseline_cost.macs
    rows = {row.layer: row for row in planned.layers}
    assert (rows["conv1"].action, rows["conv1"].reason.split(":")[0]) == ("keep", "3 input channels, fewer than 16")
    assert (rows["conv3"].action, rows["conv3"].before, rows["conv3"].after) == ("replace", 64, 64)
    if step["type"] == "separable":
        assert rows["conv3"].reason == "32 -> 32 (depthwise 3 x 3) -> 64 (1 x 1) channels, by separable"
        assert (rows["conv3_depthwise"].action, rows["conv3_depthwise"].after) == ("insert", 32)
    else:
        assert rows["conv3"].reason == "32 -> 8 (1 x 1) -> 8 (3 x 3) -> 64 (1 x 1) channels, by low_rank"
        assert (rows["conv3_core"].action, rows["conv3_core"].after) == ("insert", 8)


@pytest.mark.parametrize("step", [low_rank(budget={"macs": 0.5}), low_rank(energy=0.6)])
def test_what_depends_on_trained_weights_is_said_to_be_an_estimate(step: dict[str, Any]) -> None:
    planned = plan(COLOUR, model=MODEL, optimizations=[step])
    rows = {row.layer: row for row in planned.layers}
    assert rows["conv1"].exact
    assert not rows["conv2"].exact
    assert not rows["conv3"].exact
    assert rows["conv3"].reason.endswith("by low_rank; estimate")
    assert planned.floor is not None
    assert planned.floor.macs <= planned.planned_cost.macs < planned.baseline_cost.macs
    if "budget" in step:
        assert planned.planned_cost.macs <= 0.5 * planned.baseline_cost.macs


def test_later_steps_are_planned_on_the_network_of_products() -> None:
    prune = {"type": "prune", "structure": "channels", "sparsity": 0.5, "round_to": 1}
    zeros = {"type": "prune", "sparsity": 0.5}
    planned = plan(COLOUR, model=MODEL, optimizations=[low_rank(rank=8), prune, zeros])
    assert planned.planned["conv3_core"].shape[0] == 4
    assert {row.layer for row in planned.layers if row.action == "narrow"} >= {"conv3_core", "conv2_reduce"}
    masked = {row.layer for row in planned.layers if row.action == "mask"}
    assert masked >= {"conv3_core", "conv3_reduce", "conv3"}


def test_a_budget_that_holds_already_is_a_warning() -> None:
    planned = plan(COLOUR, model=MODEL, optimizations=[low_rank(budget={"macs": 1.0})])
    (warning,) = planned.warnings
    assert warning.pointer == "/optimizations/0"
    assert "replaces nothing: the network has" in warning.message
    assert planned.planned == planned.baseline


def test_impossible_wishes_are_refused_where_they_stand() -> None:
    (fault,) = faults(low_rank(budget={"macs": 0.05}))
    assert (fault.pointer, fault.value) == ("/optimizations/0/budget/macs", 0.05)
    assert isinstance(fault.limit, float)
    assert not faults(low_rank(budget={"macs": fault.limit}))
    assert [f.pointer for f in faults(low_rank(rank=8, layers=["conv1", "conv2", "nobody", "relu1"]))] == [
        "/optimizations/0/layers/0",
        "/optimizations/0/layers/2",
        "/optimizations/0/layers/3",
    ]
    (fault,) = faults(low_rank(rank=8, layers=["conv1"]))
    assert fault.message == "conv1 stays as it is: 3 input channels, fewer than 16"
    (fault,) = faults(low_rank(rank=8, exclude=["conv9"]))
    assert "did you mean" in fault.message
    (fault,) = faults(low_rank(rank=8, layers=["conv2"], exclude=["conv2"]))
    assert fault.message == "conv2 is excluded: it cannot be named too"
    (fault,) = faults(low_rank(rank=500))
    assert (fault.pointer, fault.message.split(":")[0]) == ("/optimizations/0/rank", "no layer can be replaced")
    (fault,) = faults(low_rank(rank=30, layers=["conv2", "conv3"]))
    assert (fault.pointer, fault.value) == ("/optimizations/0/layers/0", "conv2")
    (fault,) = faults({"type": "separable", "exclude": ["conv2", "conv3"]})
    assert fault.pointer == "/optimizations/0"
    assert "conv2 (excluded), conv3 (excluded)" in fault.message


def test_layers_that_may_not_come_cannot_be_named() -> None:
    prune = {"type": "prune", "budget": {"macs": 0.3}, "round_to": 1}
    (fault,) = faults(low_rank(budget={"macs": 0.5}), prune | {"exclude": ["conv3_core"]})
    assert fault.pointer == "/optimizations/1/exclude/0"
    assert "depends on the trained weights" in fault.message
    (fault,) = faults(low_rank(energy=0.6), {"type": "separable", "layers": ["conv3_core"]})
    assert fault.pointer == "/optimizations/1/layers/0"
    (fault,) = faults(low_rank(energy=0.6), prune | {"overrides": {"conv2_reduce": {"min_channels": 4}}})
    assert fault.pointer == "/optimizations/1/overrides/conv2_reduce"
    assert not faults(low_rank(rank=8), prune | {"exclude": ["conv3_core"]})
    assert not faults(low_rank(budget={"macs": 0.5}), prune | {"exclude": ["conv3"]})


def test_what_an_estimate_leaves_no_layer_for_is_a_warning() -> None:
    planned = plan(
        COLOUR, model=MODEL, optimizations=[low_rank(energy=0.3), {"type": "separable", "layers": ["conv3"]}]
    )
    (warning,) = planned.warnings
    assert warning.pointer == "/optimizations/1"
    assert warning.message.startswith("as estimated, no layer can be replaced: ")
    assert planned.planned["conv3"].tensors["weight"].shape[2:] == (1, 1)


def test_separable_is_read_as_it_was_written() -> None:
    step = Separable(layers=("conv2",))
    assert Separable.model_validate_json(step.model_dump_json()) == step
