"""Where `round_to` is not stated: blocks of 16 channels, less in narrow layers and where a wish would be missed."""

from __future__ import annotations

import random
from typing import Any

import pytest

from app.network.cost import cost
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.planning.plan import Plan
from app.pruning.budget import choose_block, choose_removals, choose_removals_in_blocks
from app.pruning.channel_classes import channel_classes, shrink_graph
from app.spec.prune import Prune
from tests.support.jobs.specs import COLOUR, misplanned, plan

Layers = list[dict[str, Any]]


def conv(channels: int, kernel: int = 3, **fields: Any) -> dict[str, Any]:
    return {"type": "conv", "out_channels": channels, "kernel_size": kernel, "padding": kernel // 2, **fields}


def layer(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


NORMED: Layers = [layer("batch_norm"), layer("relu")]
HEAD: Layers = [layer("global_avg_pool"), layer("flatten"), layer("linear", out_features=10)]


def densely_connected(growth: int, blocks: int = 2, depth: int = 4) -> Layers:
    """Each layer reads all before it, as in DenseNet; transitions halve the size."""
    layers: Layers = [conv(2 * growth, name="stem")]
    last = "stem"
    for block in range(blocks):
        for place in range(depth):
            name = f"b{block}_{place}"
            layers += [layer("batch_norm", inputs=[last], name=f"{name}_norm"), layer("relu"), conv(growth, name=name)]
            layers.append(layer("concat", inputs=[last, name], name=f"{name}_all"))
            last = f"{name}_all"
        layers += [layer("batch_norm"), layer("relu"), conv(3 * growth, 1, name=f"t{block}")]
        layers.append(layer("avg_pool", kernel_size=2, name=f"t{block}_pool"))
        last = f"t{block}_pool"
    return [*layers, *NORMED, *HEAD]


def shuffled(width: int, units: int = 3) -> Layers:
    """Half of the channels pass, the others go through 1 x 1, depthwise, 1 x 1, then all are shuffled (ShuffleNetV2)."""
    layers: Layers = [conv(width, stride=2), *NORMED]
    layers.append(layer("channel_shuffle", groups=2, name="u"))
    last = "u"
    for unit in range(units):
        half, name = width // 2, f"u{unit}"
        layers += [
            layer("slice", stop=half, inputs=[last], name=f"{name}_left"),
            layer("slice", start=half, stop=width, inputs=[last], name=f"{name}_right"),
            *[conv(half, 1), *NORMED, conv(half, groups="depthwise"), layer("batch_norm"), conv(half, 1)],
            *[layer("batch_norm"), layer("relu", name=f"{name}_out")],
            layer("concat", inputs=[f"{name}_left", f"{name}_out"]),
            layer("channel_shuffle", groups=2, name=name),
        ]
        last = name
    return [*layers, conv(2 * width, 1), *NORMED, *HEAD]


NETWORKS = {
    "dense 12": densely_connected(12),
    "dense 10": densely_connected(10),
    "dense 32": densely_connected(32),
    "shuffle 48": shuffled(48),
    "shuffle 32": shuffled(32),
    "shuffle 116": shuffled(116),
    "narrow chain": [conv(8), *NORMED, conv(8), *NORMED, conv(16), *NORMED, *HEAD],
    "wide chain": [conv(64), *NORMED, conv(96), *NORMED, conv(128), *NORMED, *HEAD],
}


def pruned(name: str, **fields: Any) -> Plan:
    step = {"type": "prune", **fields}
    return plan(COLOUR, model={"layers": NETWORKS[name]}, optimizations=[step])


def kept(planned: Plan) -> float:
    return planned.planned_cost.macs / planned.baseline_cost.macs


def widths(planned: Plan) -> dict[str, int | None]:
    return {row.layer: row.after for row in planned.layers if row.action == "narrow"}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.5, 0.4, 0.25])
def test_budgets_are_met_within_a_tenth_of_themselves(name: str, share: float) -> None:
    assert 0.9 * share <= kept(pruned(name, budget={"macs": share})) <= share


def test_wide_layers_keep_multiples_of_sixteen_and_narrower_ones_of_less() -> None:
    step = {"type": "prune", "budget": {"macs": 0.5}}
    found = widths(plan(COLOUR, model={"preset": "deep_cnn"}, optimizations=[step]))
    assert found["conv1"] == 24
    assert all(width is not None and width % 16 == 0 for name, width in found.items() if name != "conv1")
    narrow = widths(pruned("dense 12", budget={"macs": 0.5}))
    assert all(width is not None and width % 4 == 0 for width in narrow.values())


def test_what_is_stated_is_never_changed() -> None:
    found = widths(pruned("dense 32", budget={"macs": 0.5}, round_to=4))
    assert all(width is not None and width % 4 == 0 for width in found.values())
    assert any(width is not None and width % 8 for width in found.values())
    step = {"type": "prune", "budget": {"macs": 0.1}, "round_to": 8}
    (fault,) = misplanned(COLOUR, model={"layers": NETWORKS["dense 12"]}, optimizations=[step])
    assert fault.pointer == "/optimizations/0/budget/macs"


def test_a_sparsity_of_narrow_layers_is_met_too() -> None:
    planned = pruned("narrow chain", sparsity=0.5, structure="channels")
    assert widths(planned) == {"conv1": 4, "conv2": 4, "conv3": 8}


@pytest.mark.parametrize(("seed", "helps"), [(10, True), (15, True), (2, False)])
def test_shares_that_miss_the_budget_in_large_blocks_are_taken_in_smaller_ones(seed: int, helps: bool) -> None:
    graph = build_graph(read_layers(NETWORKS["shuffle 32"]), (3, 32, 32), classes=10)
    classes, dense = channel_classes(graph), cost(graph)
    numbers = random.Random(seed)
    scores = {c: numbers.random() ** 3 for c in classes.all().tolist()}
    step = Prune.model_validate({"budget": {"macs": 0.85}, "scope": "global"})
    allowed = int(0.85 * dense.macs)
    block, _ = choose_block(graph, classes, step)
    coarse = choose_removals(graph, classes, scores, step, block=block)
    fine = choose_removals_in_blocks(graph, classes, scores, step, start=graph, baseline=dense, fraction=1.0)
    assert coarse.cost.macs < 0.9 * allowed
    assert fine == coarse if not helps else 0.9 * allowed <= fine.cost.macs <= allowed


def test_blocks_are_not_halved_for_a_sparsity() -> None:
    graph = build_graph(read_layers(NETWORKS["shuffle 32"]), (3, 32, 32), classes=10)
    classes = channel_classes(graph)
    scores = dict(zip(classes.all().tolist(), range(10_000), strict=False))
    step = Prune.model_validate({"structure": "channels", "sparsity": 0.3, "scope": "global"})
    block, _ = choose_block(graph, classes, step)
    found = choose_removals_in_blocks(graph, classes, scores, step, start=graph, baseline=cost(graph), fraction=1.0)
    assert found == choose_removals(graph, classes, scores, step, block=block)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_plan_of_equal_shares_is_what_the_worker_removes(name: str) -> None:
    graph = build_graph(read_layers(NETWORKS[name]), (3, 32, 32), classes=10)
    classes, dense = channel_classes(graph), cost(graph)
    scores = dict(zip(classes.all().tolist(), range(100_000), strict=False))
    for measure in ("macs", "params", "bytes"):
        for share in (0.85, 0.55, 0.3):
            step = Prune.model_validate({"budget": {measure: share}, "scope": "layer"})
            _, planned = choose_block(graph, classes, step)
            found = choose_removals_in_blocks(graph, classes, scores, step, start=graph, baseline=dense, fraction=1.0)
            assert found.cost == planned.cost


@pytest.mark.parametrize("name", ["wide chain", "dense 32"])
def test_what_blocks_leave_of_a_budget_is_used_in_multiples_of_four(name: str) -> None:
    graph = build_graph(read_layers(NETWORKS[name]), (3, 32, 32), classes=10)
    classes, dense = channel_classes(graph), cost(graph)
    for share in (0.7, 0.5, 0.3):
        step = Prune.model_validate({"budget": {"macs": share}, "scope": "layer"})
        _, removals = choose_block(graph, classes, step)
        smaller = shrink_graph(graph, removals.dropped)
        for before, after in zip(graph.nodes, smaller.nodes, strict=True):
            assert before.type != "conv" or after.shape[0] == before.shape[0] or after.shape[0] % 4 == 0
        assert removals.in_blocks.macs <= removals.cost.macs <= share * dense.macs
        assert removals.cost.macs > 0.95 * share * dense.macs
