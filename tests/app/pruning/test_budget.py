"""Budgets: exact, met from below, never empty, aligned; and what is said where they cannot be met."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.network.cost import Cost, cost
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.network.presets.registry import preset_layers
from app.pruning.budget import BudgetUnreachable, Removals, choose_removals
from app.pruning.channel_classes import Classes, channel_classes, shrink_graph
from app.pruning.group_limits import why_kept
from app.spec.prune import Prune, PruneOverride
from tests.support.networks.dags import random_graph
from tests.support.networks.topologies import HEAD, Layers, conv, layer, topology

MEASURES = ("macs", "params", "bytes")
SCOPES = ("layer", "global")


def prune(**fields: Any) -> Prune:
    return Prune.model_validate({"type": "prune", "structure": "channels", "round_to": 1} | fields)


def preset(name: str, width: float = 1.0, shape: tuple[int, ...] = (3, 32, 32)) -> Graph:
    return build_graph(read_layers(preset_layers(name, shape, 10, width)), shape, classes=10)


def graph_of(layers: Layers) -> Graph:
    return build_graph(read_layers(layers), (3, 8, 8))


def random_scores(classes: Classes, seed: int) -> dict[int, float]:
    rng = random.Random(seed)
    return {c: rng.lognormvariate(0, 1) for c in classes.all().tolist()}


def chosen(graph: Graph, step: Prune, seed: int | None = 0, **more: Any) -> Removals:
    classes = channel_classes(graph)
    return choose_removals(graph, classes, None if seed is None else random_scores(classes, seed), step, **more)


def smaller(graph: Graph, removals: Removals) -> Graph:
    return shrink_graph(graph, removals.dropped)


def budget_between(graph: Graph, step: dict[str, Any], measure: str, share: float) -> int:
    """An absolute budget, `share` of the way from the floor to the cost of the graph."""
    whole = getattr(cost(graph), measure)
    floor = getattr(chosen(graph, prune(budget={measure: whole}, **step)).floor, measure)
    return max(2, floor + int(share * (whole - floor)))


def strongest_dropped(
    classes: Classes, dropped: frozenset[int], scores: dict[int, float], together: int
) -> list[set[int]]:
    """For each group the block that left last: what giving back means."""
    channel_blocks = []
    for group in classes.groups:
        gone = sorted((c for c in group.classes.tolist() if c in dropped), key=lambda c: (scores[c], c))
        if gone:
            first = len(group.classes) % together or together
            channel_blocks.append(set(gone[-together:] if len(gone) > first else gone))
    return channel_blocks


def test_equally_wide_blocks_are_given_back_whole_when_widths_are_aligned() -> None:
    graph = preset("simple_cnn", shape=(1, 28, 28))
    classes = channel_classes(graph)
    scores = random_scores(classes, 3)
    for measure in MEASURES:
        step = prune(budget={measure: 0.37}, scope="global", round_to=8)
        removals = choose_removals(graph, classes, scores, step)
        allowed = step.budget.allowed(getattr(cost(graph), measure))  # type: ignore[union-attr]
        assert getattr(removals.cost, measure) <= allowed
        for channel_block in strongest_dropped(classes, removals.dropped, scores, 8):
            assert getattr(cost(shrink_graph(graph, removals.dropped - channel_block)), measure) > allowed


def test_a_budget_of_everything_drops_nothing() -> None:
    graph = topology("residual")
    removals = chosen(graph, prune(budget={"macs": 1.0}))
    assert removals.dropped == frozenset()
    assert removals.cost == cost(graph)


def test_a_budget_below_the_floor_is_refused_with_the_floor_and_what_holds_it_up() -> None:
    graph = preset("simple_cnn", shape=(1, 28, 28))
    with pytest.raises(BudgetUnreachable) as caught:
        chosen(graph, prune(budget={"macs": 0.001}, exclude=("linear1",)))
    error = caught.value
    floor = chosen(graph, prune(budget={"macs": 0.5}, exclude=("linear1",))).floor
    assert error.measure == "macs"
    assert error.floor == floor.macs
    assert error.allowed == int(0.001 * cost(graph).macs)
    assert str(floor.macs) in str(error)
    assert any("linear1" in phrase and "excluded" in phrase for phrase in error.holds)
    just = chosen(graph, prune(budget={"macs": floor.macs}, exclude=("linear1",)))
    assert just.cost.macs == floor.macs


def test_excluding_everything_is_refused_and_never_silently_does_nothing() -> None:
    graph = graph_of([conv(4, name="a"), *HEAD])
    with pytest.raises(BudgetUnreachable, match=r"a has .* \(excluded\)"):
        chosen(graph, prune(budget={"macs": 0.5}, exclude=("a",)))
    with pytest.raises(BudgetUnreachable, match=r"no channel may be removed: a \(excluded\)"):
        chosen(graph, prune(sparsity=0.5, exclude=("a",)))
    with pytest.raises(BudgetUnreachable, match=r"a \(4 channels, and round_to is 8\)"):
        chosen(graph, prune(sparsity=0.5, round_to=8))


def test_an_excluded_layer_keeps_its_channels_and_those_tied_to_it() -> None:
    block = layer("residual", name="r", layers=[conv(8), conv(8)])
    graph = graph_of([conv(8, name="stem"), block, conv(8, name="end"), *HEAD])
    step = prune(budget={"macs": 0.6}, exclude=("stem",))
    result = smaller(graph, chosen(graph, step))
    assert (result["stem"].shape[0], result["r_conv2"].shape[0]) == (8, 8)
    assert result["end"].shape[0] < 8
    reasons = why_kept(graph, channel_classes(graph), step)
    assert reasons == {
        "stem": "excluded",
        "r_conv2": "tied to stem, which is excluded",
        "linear1": "network output",
    }


def test_the_layer_scope_keeps_the_same_fraction_of_every_group() -> None:
    graph = preset("deep_cnn")
    for budget in (0.2, 0.5, 0.8):
        result = smaller(graph, chosen(graph, prune(budget={"macs": budget}, scope="layer")))
        kept = [
            node.shape[0] / graph[node.name].shape[0]
            for node in result.nodes
            if node.type in ("conv", "linear") and node.name != graph.output
        ]
        assert max(kept) - min(kept) <= 1 / 32 + 1e-9  # one channel of the narrowest layer


def test_the_global_scope_takes_the_weakest_wherever_they_are() -> None:
    graph = graph_of([conv(8, name="a"), conv(8, name="b"), *HEAD])
    classes = channel_classes(graph)
    scores = dict.fromkeys(classes.all().tolist(), 1.0)
    scores |= dict.fromkeys(classes.slots["b"].ids.tolist()[:4], 0.1)
    result = smaller(graph, choose_removals(graph, classes, scores, prune(sparsity=0.25, scope="global")))
    assert (result["a"].shape[0], result["b"].shape[0]) == (8, 4)


def test_learned_gates_rank_all_groups_as_they_are() -> None:
    graph = graph_of([conv(8, name="a"), conv(8, name="b"), *HEAD])
    classes = channel_classes(graph)
    gates = dict.fromkeys(classes.all().tolist(), 0.6)
    gates |= dict.fromkeys(classes.slots["b"].ids.tolist(), 0.5)  # divided by its mean each gate would be 1
    result = smaller(graph, choose_removals(graph, classes, gates, prune(budget={"macs": 0.7}, scope="learned")))
    assert result["a"].shape[0] == 8
    assert result["b"].shape[0] < 8


def test_the_global_scope_does_not_see_the_scale_of_a_group_unless_it_is_taylors() -> None:
    graph = preset("deep_cnn", 0.25)
    classes = channel_classes(graph)
    scores = random_scores(classes, 0)
    scaled = scores | {c: 1000 * scores[c] for c in classes.groups[1].classes.tolist()}
    for criterion, same in (("l2", True), ("taylor", False)):
        step = prune(budget={"macs": 0.5}, scope="global", criterion=criterion)
        one, other = (choose_removals(graph, classes, s, step) for s in (scores, scaled))
        assert (one.dropped == other.dropped) == same


def test_equal_scores_leave_in_the_order_of_groups_and_slots() -> None:
    graph = graph_of([conv(96, name="a"), conv(96, name="b"), *HEAD])  # wide enough for an unstable sort to show
    classes = channel_classes(graph)
    a, b = (classes.slots[name].ids.tolist() for name in "ab")
    scores = dict.fromkeys(classes.all().tolist(), 2.0) | dict.fromkeys([*a[::2], *b[::2]], 1.0)
    one = choose_removals(graph, classes, scores, prune(sparsity=0.125, scope="global"))
    assert one.dropped == frozenset(a[:48:2])
    each = choose_removals(graph, classes, scores, prune(sparsity=0.25, scope="layer"))
    assert each.dropped == frozenset([*a[:48:2], *b[:48:2]])


def test_the_dry_run_lands_where_the_real_scores_do() -> None:
    graph = preset("resnet20")
    for budget in (0.3, 0.5):
        step = prune(budget={"macs": budget}, round_to=8)
        assert chosen(graph, step, seed=None).cost == chosen(graph, step, seed=1).cost
        together = step.model_copy(update={"scope": "global"})
        planned, real = (chosen(graph, together, seed=seed).cost.macs for seed in (None, 1))
        assert abs(planned - real) < 0.06 * cost(graph).macs  # 8 of 16 channels of one layer


def test_widths_are_whole_or_multiples_and_narrow_groups_are_left_alone() -> None:
    graph = graph_of([conv(8, name="a"), conv(20, name="b"), conv(21, name="c"), *HEAD])
    for budget in (0.9, 0.6, 0.45):
        result = smaller(graph, chosen(graph, prune(budget={"macs": budget}, round_to=8)))
        assert result["a"].shape[0] == 8
        assert result["b"].shape[0] in (20, 16, 8)
        assert result["c"].shape[0] in (21, 16, 8)


def test_a_grouped_convolution_is_aligned_in_channels_of_the_whole_layer() -> None:
    grouped = conv(24, name="g", groups=3)
    graph = graph_of([conv(24, name="a"), grouped, *HEAD])
    result = smaller(graph, chosen(graph, prune(sparsity=0.4, round_to=4)))
    assert (result["a"].shape[0], result["g"].shape[0]) == (12, 12)  # multiples of lcm(4, 3)


@pytest.mark.parametrize("fields", [{"max_sparsity": 0.7}, {"max_sparsity": 0.9, "min_channels": 3}])
def test_floors_hold_however_low_the_budget_is(fields: dict[str, Any]) -> None:
    graph = graph_of([conv(10, name="a"), conv(10, name="b"), *HEAD])
    floor = chosen(graph, prune(budget={"macs": 1.0}, **fields)).floor
    result = smaller(graph, chosen(graph, prune(budget={"macs": floor.macs}, **fields)))
    assert (result["a"].shape[0], result["b"].shape[0]) == (3, 3)


def test_overrides_say_what_is_different_for_one_layer() -> None:
    graph = graph_of([conv(16, name="a"), conv(16, name="b"), conv(16, name="c"), *HEAD])
    overrides = {"a": PruneOverride(sparsity=0.25), "b": PruneOverride(min_channels=12, round_to=4)}
    result = smaller(graph, chosen(graph, prune(budget={"macs": 0.42}, overrides=overrides)))
    assert result["a"].shape[0] == 12
    assert result["b"].shape[0] in (12, 16)
    assert result["c"].shape[0] < 8
    untouched = chosen(graph, prune(sparsity=0.5, overrides={"a": PruneOverride(sparsity=0.0)}))
    assert [smaller(graph, untouched)[name].shape[0] for name in "abc"] == [16, 8, 8]


def test_a_sparsity_takes_that_part_of_each_group_and_more_takes_a_superset() -> None:
    graph = preset("deep_cnn", 0.25)
    for scope in SCOPES:
        before: frozenset[int] = frozenset()
        for sparsity in (0.1, 0.25, 0.5, 0.75):
            dropped = chosen(graph, prune(sparsity=sparsity, scope=scope)).dropped
            assert before < dropped
            before = dropped
    result = smaller(graph, chosen(graph, prune(sparsity=0.25, scope="layer")))
    assert [result[f"conv{n}"].shape[0] for n in (1, 2, 3, 4)] == [6, 12, 24, 48]


def test_stages_keep_the_same_part_each_time_and_end_on_the_target() -> None:
    graph = preset("deep_cnn")
    dense = cost(graph)
    for target in ({"macs": 0.3}, {"params": 100_000}):
        step = prune(budget=target, round_to=4)
        now, reached = graph, []
        for fraction in (1 / 3, 2 / 3, 1.0):
            removals = chosen(now, step, start=graph, baseline=dense, fraction=fraction)
            now = smaller(now, removals)
            reached.append(getattr(removals.cost, step.budget.measure))  # type: ignore[union-attr]
        whole, allowed = (getattr(dense, step.budget.measure), step.budget.allowed(dense.macs))  # type: ignore[union-attr]
        assert reached[-1] <= allowed
        for part, fraction in zip(reached, (1 / 3, 2 / 3, 1.0), strict=True):
            assert part == pytest.approx(whole * (allowed / whole) ** fraction, rel=0.06)


def test_stages_of_a_sparsity_end_on_it_and_floors_refer_to_the_widths_before_the_first() -> None:
    graph = graph_of([conv(20, name="a"), conv(20, name="b"), *HEAD])
    step = prune(sparsity=0.8, max_sparsity=0.75)
    now = graph
    for number in (1, 2, 3, 4):
        now = smaller(now, chosen(now, step, start=graph, fraction=number / 4))
    assert (now["a"].shape[0], now["b"].shape[0]) == (5, 5)


def in_stages(graph: Graph, step: Prune, count: int) -> list[Graph]:
    """The graph after each of so many stages; scores are drawn anew for each."""
    graphs = [graph]
    for number in range(1, count + 1):
        now = graphs[-1]
        classes = channel_classes(now, graph)
        scores, fraction = random_scores(classes, number), number / count
        removals = choose_removals(now, classes, scores, step, start=graph, baseline=cost(graph), fraction=fraction)
        graphs.append(shrink_graph(now, removals.dropped, classes))
        assert cost(graphs[-1]) == removals.cost
    return graphs[1:]


def test_a_stage_that_finds_all_of_it_done_removes_nothing() -> None:
    graph = graph_of([conv(4, name="a"), *HEAD])
    reached = [stage["a"].shape[0] for stage in in_stages(graph, prune(sparsity=0.6, max_sparsity=0.5), 4)]
    assert reached == [3, 3, 2, 2]


def test_a_grouped_convolution_with_one_input_left_in_each_group_does_not_become_free_between_stages() -> None:
    """It computes what a depthwise convolution does, and read anew it would be cut to fewer groups than its floor."""
    kinds = ({"type": "conv", "padding": "same"}, {"type": "conv_transpose", "padding": 1})
    for kind in kinds:
        grouped = kind | {"name": "g", "out_channels": 9, "kernel_size": 3, "groups": 3}
        graph = graph_of([conv(6, name="a"), grouped, conv(4, name="b"), *HEAD])
        *_, last = in_stages(graph, prune(sparsity=0.9, scope="global"), 3)
        assert [last[name].shape[0] for name in "agb"] == [3, 3, 1]
        assert channel_classes(last).slots["a"].ids.tolist() == channel_classes(last).slots["g"].ids.tolist()
        tied = channel_classes(last, graph)
        assert len(set(tied.slots["a"].ids.tolist())) == len(set(tied.slots["g"].ids.tolist())) == 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from(SCOPES), st.sampled_from([0.5, 0.6, 0.9]), st.sampled_from([None, 1, 2]))
def test_on_random_networks_stages_end_on_the_target_and_above_the_floors_of_the_start(
    seed: int, scope: str, most: float, round_to: int | None
) -> None:
    graph = random_graph(seed)
    options = {"scope": scope, "max_sparsity": most, "round_to": round_to}
    allowed = budget_between(graph, options, "macs", 0.1 + seed % 7 / 10)
    *_, last = in_stages(graph, prune(budget={"macs": allowed}, **options), 3)
    assert cost(last).macs <= allowed
    before, after = channel_classes(graph), channel_classes(last, graph)
    widths = {after.key(group): len(group.classes) for group in after.groups}
    for group in before.groups:
        least = -(-len(group.classes) * round(10 * (1 - most)) // 10)
        assert widths.get(before.key(group), 1) >= max(1, least)


def test_pruning_twice_to_the_same_absolute_budget_is_pruning_once() -> None:
    graph = preset("resnet20")
    step = prune(budget={"macs": cost(graph).macs // 2}, round_to=8)
    once = smaller(graph, chosen(graph, step))
    assert chosen(once, step).dropped == frozenset()


def test_a_fraction_refers_to_the_baseline_where_one_is_given() -> None:
    graph = preset("deep_cnn", 0.5)
    whole = cost(preset("deep_cnn"))
    assert chosen(graph, prune(budget={"macs": 0.5}), baseline=whole).dropped == frozenset()
    assert isinstance(chosen(graph, prune(budget={"macs": 0.1}), baseline=whole).cost, Cost)


def test_choosing_among_the_channels_of_a_network_as_large_as_resnet50_takes_less_than_a_second() -> None:
    layers: Layers = [{"type": "conv", "out_channels": 64, "kernel_size": 7, "stride": 2, "padding": 3}]
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(blocks):
            middle = {"stride": 2 if stage and block == 0 else 1, "padding": 1}
            inner = [conv(width, 1), layer("batch_norm"), layer("relu"), conv(width, 3, **middle), layer("batch_norm")]
            inner += [layer("relu"), conv(4 * width, 1), layer("batch_norm")]
            layers += [layer("residual", shortcut="auto" if block else "projection", layers=inner), layer("relu")]
    layers += [layer("global_avg_pool"), layer("flatten"), layer("linear", out_features=1000)]
    graph = build_graph(read_layers(layers), (3, 224, 224))
    began = time.process_time()
    classes = channel_classes(graph)
    scores = dict.fromkeys(classes.all().tolist(), 1.0)
    removals = choose_removals(graph, classes, scores, prune(budget={"bytes": 0.3}, scope="global"))
    seconds = time.process_time() - began  # 0.2 s on one core at 2.1 GHz
    assert removals.cost.bytes <= 0.3 * cost(graph).bytes
    assert seconds < 1.0
