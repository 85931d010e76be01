"""What is true of channels and budgets in every network: each topology, each trap, each preset, and random ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.network.cost import CostMeasure, cost
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.pruning.budget import FINER_BLOCKS, choose_block, choose_removals
from app.pruning.channel_classes import Classes, Group, channel_classes, shrink_graph
from app.pruning.group_limits import BLOCKS, STEPS, prunable_groups
from app.pruning.incremental_cost import CostWalk, IncrementalCost
from app.spec.prune import Prune
from tests.support.networks.dags import one_class, random_drop, random_graph
from tests.support.networks.known import NETWORKS, network_named
from tests.support.networks.traps import TRAPS, trap

SEEDS = st.integers(0, 100_000)
MEASURES: tuple[CostMeasure, ...] = ("macs", "params", "bytes")
FEW = 25
SAMPLED = 4  # groups of a large network whose last block is given back


def prune(**fields: Any) -> Prune:
    return Prune.model_validate({"type": "prune", "structure": "channels"} | fields)


def random_scores(classes: Classes, seed: int) -> dict[int, float]:
    rng = random.Random(seed)
    return {c: rng.lognormvariate(0, 1) for c in classes.all().tolist()}


def ids(classes: Classes, name: str) -> list[int]:
    return classes.slots[name].runs(1).tolist()


def drops(classes: Classes, seed: int) -> Iterator[list[int]]:
    yield one_class(classes, seed)
    for share in (0.2, 0.7, 1.0):
        yield random_drop(classes, share, seed)


def products_of_one(graph: Graph) -> bool:
    """Whether a layer that was weighed by a map of one channel has itself one left: read anew, the two are tied."""
    return any(node.type == "multiply" and node.shape[0] == 1 for node in graph.nodes)


# --- classes and surgery of the graph --------------------------------------------------------------------------------


def check_classes(graph: Graph, seed: int) -> None:
    classes = channel_classes(graph)
    for node in graph.nodes:
        assert classes.slots[node.name].width == node.shape[0]
    shapes = graph.tensors()
    for axis in classes.axes:
        assert axis.slots.width == shapes[f"{axis.layer}.{axis.tensor}"].shape[axis.axis]
    assert len({(axis.layer, axis.tensor, axis.axis) for axis in classes.axes}) == len(classes.axes)
    in_groups = [c for group in classes.groups for c in group.classes.tolist()]
    assert sorted(in_groups) == classes.all().tolist()
    for group in classes.groups:
        assert len({classes.pins.get(c) for c in group.classes.tolist()}) == 1
        assert group.channels >= 1
        for name, count in zip(group.nodes, group.counts, strict=True):
            found = ids(classes, name)
            assert {found.count(c) for c in group.classes.tolist()} == {count}
    costs = IncrementalCost(graph, classes)
    assert costs.cost_at([0] * len(classes.groups)) == cost(graph)
    check_walks(graph, classes, costs, seed)


def check_walks(graph: Graph, classes: Classes, costs: IncrementalCost, seed: int) -> None:
    """Savings, removals and returns in random order against whole graphs, in each measure."""
    numbers = random.Random(seed)
    free = [group for group in classes.groups if int(group.classes[0]) not in classes.pins]
    for measure in MEASURES if free else ():
        walk = CostWalk(costs, measure, [0] * len(classes.groups))
        for _ in range(4):
            group = numbers.choice(free)
            now, target = walk.gone[group.index], numbers.randrange(len(group.classes))
            spared = walk.saving(group.index, target - now)
            before = walk.amount
            walk.move(group.index, target - now)
            assert walk.amount == before - spared
        dropped = [c for group in free for c in group.classes[: walk.gone[group.index]].tolist()]
        exact = cost(shrink_graph(graph, dropped, classes))
        assert costs.cost_at(walk.gone) == exact
        assert walk.fits(exact.of(measure))
        assert not walk.fits(exact.of(measure) - 1)
        assert measure == "bytes" or walk.amount == exact.of(measure)
        group = numbers.choice(free)
        if count := walk.gone[group.index]:
            whole = cost(shrink_graph(graph, [c for c in dropped if c not in group.classes], classes)).of(measure)
            assert walk.may_return(group.index, count, whole)
            assert not walk.may_return(group.index, count, whole - 1)


def check_surgery(graph: Graph, seed: int) -> None:
    classes = channel_classes(graph)
    assert shrink_graph(graph, [], classes) == graph
    for dropped in drops(classes, seed):
        smaller = shrink_graph(graph, dropped, classes)
        kept = classes.kept(dropped)
        assert smaller.input_shape == graph.input_shape
        assert smaller[graph.output].shape == graph[graph.output].shape
        for before, after in zip(graph.nodes, smaller.nodes, strict=True):
            assert (after.name, after.inputs, after.shape[1:]) == (before.name, before.inputs, before.shape[1:])
            assert 1 <= after.shape[0] == kept.count(classes.slots[before.name])
        written = json.loads(json.dumps(smaller.to_layers()))
        again = build_graph(read_layers(written), smaller.input_shape)
        assert again == smaller
        assert json.loads(json.dumps(again.to_layers())) == written
        if not products_of_one(smaller):
            left = [c for c in classes.all().tolist() if c not in set(dropped)]
            new = channel_classes(smaller, graph)
            number = dict(zip(left, new.all().tolist(), strict=True))
            for node in graph.nodes:
                assert ids(new, node.name) == [number[c] for c in ids(classes, node.name) if c in number]


def check_two_drops(graph: Graph, seed: int) -> None:
    classes = channel_classes(graph)
    both = random_drop(classes, 0.7, seed)
    random.Random(seed).shuffle(both)
    first, second = both[::2], both[1::2]
    between = shrink_graph(graph, first, classes)
    if products_of_one(between):
        return
    new = channel_classes(between, graph)
    left = [c for c in classes.all().tolist() if c not in set(first)]
    number = dict(zip(left, new.all().tolist(), strict=True))
    assert as_words(shrink_graph(between, [number[c] for c in second], new)) == as_words(
        shrink_graph(graph, both, classes)
    )


def as_words(graph: Graph) -> list[dict[str, Any]]:
    """The layers, with depthwise convolutions called so: 3 groups of 3 channels are the same function."""
    layers = graph.to_layers()
    for entry in layers:
        if entry["type"] in ("conv", "conv_transpose") and entry["groups"] == entry["in_channels"]:
            entry["groups"] = "depthwise"
    return layers


CHECKS = {"classes": check_classes, "surgery": check_surgery, "two drops": check_two_drops}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("check", CHECKS)
def test_channels_of_every_known_network(check: str, name: str) -> None:
    CHECKS[check](network_named(name), 1)


@pytest.mark.parametrize("check", CHECKS)
@settings(max_examples=FEW, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_channels_of_random_networks(check: str, seed: int) -> None:
    CHECKS[check](random_graph(seed), seed)


@pytest.mark.parametrize("name", TRAPS)
def test_something_may_leave_every_trap(name: str) -> None:
    assert random_drop(channel_classes(trap(name)), 1.0, 0)


def in_another_order(graph: Graph, seed: int) -> tuple[Graph, dict[str, str]]:
    """The same network with other names, its layers in another order in which they can be computed; new -> old name."""
    rng = random.Random(seed)
    names = [node.name for node in graph.nodes]
    fresh = dict(zip(names, rng.sample([f"x{number}" for number in range(len(names))], len(names)), strict=True))
    fresh["input"] = "input"
    done, waiting, layers = {"input"}, graph.to_layers(), []
    last = waiting.pop()
    while waiting:
        ready = [entry for entry in waiting if done.issuperset([*entry["inputs"], entry.get("shares") or "input"])]
        entry = rng.choice(ready)
        waiting.remove(entry)
        done.add(entry["name"])
        layers.append(entry)
    for entry in [*layers, last]:
        entry["name"], entry["inputs"] = fresh[entry["name"]], [fresh[name] for name in entry["inputs"]]
        if entry.get("shares"):
            entry["shares"] = fresh[entry["shares"]]
    other = build_graph(read_layers([*layers, last]), graph.input_shape)
    return other, {new: old for old, new in fresh.items()}


def partition(graph: Graph, names: dict[str, str]) -> dict[frozenset[tuple[str, int]], str | None]:
    """Each class as its positions, and why it stays, with the layers called by `names`."""
    classes = channel_classes(graph)
    found: dict[int, set[tuple[str, int]]] = {}
    for node in graph.nodes:
        for place, c in enumerate(ids(classes, node.name)):
            found.setdefault(c, set()).add((names[node.name], place))
    pinned = {c: reason.split(" by ")[0] for c, reason in classes.pins.items()}
    return {frozenset(places): pinned.get(c) for c, places in found.items()}


@settings(max_examples=FEW, deadline=None, derandomize=True)
@given(SEEDS)
def test_classes_depend_neither_on_names_nor_on_the_order_of_layers(seed: int) -> None:
    graph = random_graph(seed)
    other, names = in_another_order(graph, seed)
    mine, theirs = partition(graph, {name: name for name in names.values()}), partition(other, names)
    assert mine.keys() == theirs.keys()
    for places, reason in mine.items():  # of two reasons the first layer's counts
        assert (reason is None) == (theirs[places] is None)


# --- budgets ---------------------------------------------------------------------------------------------------------


def together(group: Group, step: Prune, block: int) -> int:
    """How many classes leave together."""
    wide = len(group.classes) * group.channels
    aligned = step.round_to or next((size for size in BLOCKS if size <= block and STEPS * size <= wide), 1)
    return aligned // math.gcd(aligned, group.channels)


def sizes(step: Prune, block: int) -> list[int]:
    """The block, and those in which the rest of a budget is used."""
    return [block, *(size for size in FINER_BLOCKS if size < block and step.round_to is None)]


def blocks_of(group: Group, scores: dict[int, float], step: Prune, block: int) -> list[list[int]]:
    """The classes of a group in the blocks in which they may leave, weakest first."""
    ascending = sorted(group.classes.tolist(), key=lambda c: (scores[c], c))
    width, size = len(ascending), together(group, step, block)
    least = max(1, math.ceil((1 - step.max_sparsity) * width - 1e-9), math.ceil(step.min_channels / group.channels))
    if size > 1 and width <= size:
        return []
    ends = [0, *range(width % size or size, width - least + 1, size)]
    return [ascending[a:b] for a, b in pairwise(ends)]


def order_of(
    graph: Graph, classes: Classes, scores: dict[int, float], step: Prune, block: int
) -> list[tuple[int, list[int]]]:
    """(group, classes) of every block in the order in which they leave: the definition, word for word."""
    ranked = []
    for group in classes.groups:
        if int(group.classes[0]) in classes.pins:
            continue
        mean = sum(scores[c] for c in group.classes.tolist()) / len(group.classes)
        gone, highest = 0, 0.0
        for place, channel_block in enumerate(blocks_of(group, scores, step, block)):
            gone += len(channel_block)
            strength = sum(scores[c] for c in channel_block) / len(channel_block)
            highest = max(highest, strength if step.criterion == "taylor" else strength / mean)
            rank = gone / len(group.classes) if step.scope == "layer" else highest
            ranked.append((rank, group.index, place, channel_block))
    return [(index, channel_block) for _, index, _, channel_block in sorted(ranked)]


@settings(max_examples=FEW, deadline=None, derandomize=True)
@given(
    seed=SEEDS,
    measure=st.sampled_from(MEASURES),
    scope=st.sampled_from(["layer", "global"]),
    criterion=st.sampled_from(["l2", "taylor"]),
    round_to=st.sampled_from([None, 1, 2, 3]),
    share=st.floats(0, 1),
)
def test_a_budget_takes_the_first_prefix_that_fits_and_gives_back_what_may_return(
    seed: int, measure: str, scope: str, criterion: str, round_to: int | None, share: float
) -> None:
    """Against a linear scan over whole graphs, which is the definition; and a smaller budget's prefix is longer."""
    graph = random_graph(seed)
    classes = channel_classes(graph)
    scores = random_scores(classes, seed)
    options = {"scope": scope, "criterion": criterion, "round_to": round_to, "max_sparsity": 0.8}
    everything = choose_removals(graph, classes, scores, prune(budget={measure: 1.0}, **options))
    floor, whole = (getattr(of, measure) for of in (everything.floor, cost(graph)))
    block = BLOCKS[seed % len(BLOCKS)]

    def spent(without: set[int]) -> int:
        return int(getattr(cost(shrink_graph(graph, without, classes)), measure))

    before: set[int] = set()
    for allowed in (floor + int(share * (whole - floor)), floor + int(0.5 * share * (whole - floor))):
        step = prune(budget={measure: max(2, allowed)}, **options)
        order = order_of(graph, classes, scores, step, block)
        if spent({c for _, channel_block in order for c in channel_block}) > allowed:
            return  # with this block nothing fits
        prefix: set[int] = set()
        count = 0
        while spent(prefix) > allowed:
            prefix |= set(order[count][1])
            count += 1
        assert before <= prefix
        before, expected = prefix, set(prefix)
        for size in sizes(step, block):
            stays: set[int] = set()
            for group, channel_block in reversed(order_of(graph, classes, scores, step, size)):
                if not expected.issuperset(channel_block):
                    continue
                if group not in stays and spent(expected - set(channel_block)) <= allowed:
                    expected -= set(channel_block)
                else:
                    stays.add(group)
        removals = choose_removals(graph, classes, scores, step, block=block)
        assert removals.dropped == expected
        assert getattr(removals.cost, measure) == spent(expected) <= allowed


def check_budget(graph: Graph, step: Prune, seed: int) -> None:
    """The removal for `step`: exact, from below, aligned, above the floors, and no block can be given back."""
    assert step.budget is not None
    classes = channel_classes(graph)
    scores = random_scores(classes, seed)
    block, planned = choose_block(graph, classes, step)
    removals = choose_removals(graph, classes, scores, step, block=block)
    measure = step.budget.measure
    allowed = step.budget.allowed(getattr(cost(graph), measure))
    smaller = shrink_graph(graph, removals.dropped, classes)
    assert cost(smaller) == removals.cost
    assert getattr(removals.cost, measure) <= allowed
    assert removals.floor == cost(shrink_graph(graph, removals.floor_dropped, classes))
    last = []
    finest = sizes(step, block)[-1]
    for group in classes.groups:
        channel_blocks = blocks_of(group, scores, step, finest) if int(group.classes[0]) not in classes.pins else []
        gone = [channel_block for channel_block in channel_blocks if removals.dropped.issuperset(channel_block)]
        assert sum(map(len, gone)) == len(removals.dropped.intersection(group.classes.tolist()))
        assert gone == channel_blocks[: len(gone)]
        left = len(group.classes) - sum(map(len, gone))
        assert left == len(group.classes) or left % together(group, step, finest) == 0
        last += [set(gone[-1])] if gone else []
    for channel_block in random.Random(seed).sample(last, min(SAMPLED, len(last))):
        assert getattr(cost(shrink_graph(graph, removals.dropped - channel_block, classes)), measure) > allowed
    assert planned.floor == removals.floor  # whatever the scores are: what the dry run lets pass is reached
    assert step.scope == "global" or planned.cost == removals.cost
    again = step.model_copy(update={"budget": step.budget.model_copy(update={measure: allowed})})
    if allowed > 1:
        now = channel_classes(smaller)
        assert not choose_removals(smaller, now, random_scores(now, seed), again, block=block).dropped


def check_share_of(graph: Graph, measure: str, share: float, scope: str, round_to: int | None, seed: int) -> None:
    """`check_budget` for a budget that is `share` of the way from the least that can be reached to the whole."""
    options: dict[str, Any] = {"scope": scope, "max_sparsity": (0.9, 0.6)[seed % 2]}
    finest = prune(budget={measure: 1.0}, round_to=round_to or 1, **options)
    floor = getattr(choose_removals(graph, channel_classes(graph), None, finest).floor, measure)
    allowed = floor + int(share * (getattr(cost(graph), measure) - floor))
    check_budget(graph, prune(budget={measure: max(2, allowed)}, round_to=round_to, **options), seed)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("scope", "round_to"), [("layer", None), ("global", None), ("global", 2)])
def test_a_budget_of_every_known_network(name: str, scope: str, round_to: int | None) -> None:
    graph = network_named(name)
    seed = NETWORKS.index(name) + (round_to or 0)
    finest = prune(budget={"macs": 1.0}, scope=scope, round_to=round_to or 1, max_sparsity=0.6)
    classes = channel_classes(graph)
    if not prunable_groups(graph, classes, finest):
        assert all(len(group.classes) <= 2 for group in classes.groups if int(group.classes[0]) not in classes.pins)
        return
    check_share_of(graph, MEASURES[seed % 3], (0.15, 0.5, 0.8)[seed // 3 % 3], scope, round_to, seed)


@settings(max_examples=FEW, deadline=None, derandomize=True)
@given(
    seed=SEEDS,
    measure=st.sampled_from(MEASURES),
    scope=st.sampled_from(["layer", "global"]),
    round_to=st.sampled_from([None, 1, 2, 3]),
    share=st.floats(0, 1),
)
def test_a_budget_of_random_networks(seed: int, measure: str, scope: str, round_to: int | None, share: float) -> None:
    check_share_of(random_graph(seed), measure, share, scope, round_to, seed)
