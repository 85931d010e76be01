"""Patterns and blocks: what stays, in every kind of layer, against torch's own sparsifier and by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.ao.pruning import WeightNormSparsifier

from app.errors import Diverged
from app.network.blocks import WEIGHTED
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.pruning.weight_matrix import WeightMatrix, weight_matrix, why_dense
from app.pruning.zeros import dense_layers, planned_zeros
from app.spec.prune import Prune, PruneOverride
from tests.support.networks.topologies import TOPOLOGIES, conv, layer, topology, trained
from worker.network import Network
from worker.pruning.importance import prunable_weights
from worker.pruning.semi_structured import BlockScores, blocks_keep, pattern_keep
from worker.pruning.weight_masks import weight_masks
from worker.training.masks import Masks


def pattern(text: str = "2:4", **fields: Any) -> Prune:
    return Prune(structure="n:m", pattern=text, **fields)


def blocks(sparsity: float, shape: tuple[int, int] = (2, 2), **fields: Any) -> Prune:
    return Prune(structure="blocks", block=shape, sparsity=sparsity, **fields)


def network_of(*layers: dict[str, Any], shape: tuple[int, ...] = (8, 6, 6)) -> Network:
    head = [layer("global_avg_pool"), layer("flatten"), layer("linear", out_features=3)]
    return trained(build_graph(read_layers([*layers, *head]), shape))


def wide(name: str) -> Graph:
    """A topology with four times the channels, so that patterns and blocks have room."""
    shape, layers = TOPOLOGIES[name]

    def widened(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        changed = []
        for entry in layers:
            wider = {key: 4 * entry[key] for key in ("out_channels", "out_features", "stop", "start") if key in entry}
            inner = {"layers": widened(entry["layers"])} if "layers" in entry else {}
            changed.append(entry | wider | inner)
        return changed

    return build_graph(read_layers(widened(layers)), shape)


def most_in_a_row(weight: Tensor, node_matrix: WeightMatrix, of: int) -> int:
    """The most non-zero weights among M inputs in a row, at one output and position of the kernel."""
    rows_GOIP = node_matrix.rows(weight.numpy().ravel())
    groups, outputs, inputs, positions = rows_GOIP.shape
    counted = (rows_GOIP != 0).reshape(groups, outputs, inputs // of, of, positions).sum(axis=3)
    return int(counted.max())


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "shuffle", "transposed", "sound", "video"])
@pytest.mark.parametrize("text", ["2:4", "1:4", "1:2", "3:8"])
def test_at_most_n_of_m_inputs_in_a_row_stay_and_layers_that_do_not_fit_are_untouched(name: str, text: str) -> None:
    network = trained(wide(name))
    step = pattern(text)
    kept, of = step.kept_of
    before = {name: weight.clone() for name, weight in prunable_weights(network).items()}
    masks = weight_masks(network, step, None, seed=0)
    masks.apply(network)
    for key, weight in prunable_weights(network).items():
        node = network.graph[key.removesuffix(".weight")]
        matrix = weight_matrix(node)
        if matrix.inputs % of:
            assert key not in masks
            assert f"{text} on {matrix.inputs} input" in (why_dense(node, step) or "")
            assert torch.equal(weight, before[key])
        else:
            assert most_in_a_row(weight, matrix, of) == kept
            assert int((weight == 0).sum()) == weight.numel() * (of - kept) // of
    assert len(masks) > 0


@pytest.mark.parametrize("text", ["2:4", "1:4", "1:2", "5:8"])
def test_the_pattern_of_a_linear_layer_is_that_of_torchs_sparsifier(text: str) -> None:
    kept, of = Prune(structure="n:m", pattern=text).kept_of
    model = torch.nn.Sequential(torch.nn.Linear(40, 12))
    weight = model[0].weight.detach().clone()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, of), zeros_per_block=of - kept)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    scores = weight.abs().numpy().ravel()
    keep = pattern_keep(scores, WeightMatrix(1, 12, 40, 1, False), kept, of, None)
    assert np.array_equal(keep.reshape(12, 40), model[0].weight.detach().numpy() != 0)


def test_of_equal_weights_the_first_go_and_the_count_stays_exact() -> None:
    matrix = WeightMatrix(1, 1, 8, 1, False)
    keep = pattern_keep(np.ones(8, np.float32), matrix, 2, 4, None)
    assert keep.tolist() == [False, False, True, True] * 2
    assert pattern_keep(np.zeros(8, np.float32), matrix, 1, 8, None).tolist() == [False] * 7 + [True]


def test_what_was_pruned_before_counts_in_its_row_and_stays_pruned() -> None:
    matrix = WeightMatrix(1, 1, 4, 1, False)
    scores = np.array([4, 3, 2, 1], np.float32)
    dead = np.array([True, False, False, False])
    assert pattern_keep(scores, matrix, 2, 4, dead).tolist() == [False, True, True, False]
    three = np.array([True, False, True, True])
    assert pattern_keep(scores, matrix, 2, 4, three).tolist() == [False, True, False, False]


def test_a_layer_may_have_a_pattern_of_its_own() -> None:
    network = network_of(conv(8, name="a"), conv(8, name="b"))
    step = pattern("2:4", overrides={"b": PruneOverride(pattern="1:8")}, exclude=("linear1",))
    masks = weight_masks(network, step, None, seed=0)
    assert list(masks) == ["a.weight", "b.weight"]
    assert float(masks["a.weight"].mean()) == 0.5
    assert float(masks["b.weight"].mean()) == 0.125


def test_random_patterns_come_from_the_seed() -> None:
    network = network_of(conv(8, name="a"))
    one, same, other = (
        weight_masks(network, pattern(criterion="random"), None, seed=seed)["a.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float(one.mean()) == float(other.mean()) == 0.5


# --- blocks ----------------------------------------------------------------------------------------------------------


def block_sizes(mask: Tensor, matrix: WeightMatrix, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """(weights that stay, weights) of each block, by slices."""
    rows_GOIP = matrix.rows(mask.numpy().ravel())
    height, width = shape
    return [
        (int(part.sum()), part.size)
        for group in rows_GOIP
        for top in range(0, matrix.outputs, height)
        for left in range(0, matrix.inputs, width)
        for part in [group[top : top + height, left : left + width]]
    ]


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "shuffle", "transposed", "sound", "video"])
@pytest.mark.parametrize("shape", [(2, 2), (4, 3), (1, 8)])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_whole_blocks_go_and_as_many_as_come_nearest(name: str, shape: tuple[int, int], scope: Any) -> None:
    network = trained(wide(name))
    masks = weight_masks(network, blocks(0.6, shape, scope=scope), 0.6, seed=0)
    found = {}
    for key in masks:
        matrix = weight_matrix(network.graph[key.removesuffix(".weight")])
        found[key] = block_sizes(masks[key], matrix, shape)
        assert all(left in (0, size) for left, size in found[key])
        assert any(left for left, _ in found[key])
    parts = [[entry for entries in found.values() for entry in entries]] if scope == "global" else list(found.values())
    for part in parts:
        total = sum(size for _, size in part)
        zeros = sum(size - left for left, size in part)
        only_floors_left = zeros < round(0.6 * total) and sum(left > 0 for left, _ in part) <= len(found)
        assert abs(zeros - round(0.6 * total)) <= max(size for _, size in part) / 2 or only_floors_left


def test_the_blocks_with_the_smallest_mean_square_go_ragged_ones_on_equal_terms() -> None:
    weight = np.zeros((3, 5, 2), np.float32)
    weight[:2, :2] = 3.0
    weight[:2, 2:4] = 1.0
    weight[:2, 4:] = 2.0  # ragged: the sum of its squares is that of 8 weights of 1.4
    weight[2:, :2] = 0.5
    weight[2:, 2:4] = 4.0
    weight[2:, 4:] = 5.0
    matrix = WeightMatrix(1, 3, 5, 2, False)
    made = BlockScores.of(np.abs(weight).ravel(), matrix, (2, 2), "l2", None)
    assert made.scores.tolist() == [9.0, 1.0, 4.0, 0.25, 16.0, 25.0]
    assert made.alive.tolist() == [8, 8, 4, 4, 4, 2]
    assert BlockScores.of(np.abs(weight).ravel(), matrix, (2, 2), "l1", None).scores.tolist() == [3, 1, 2, 0.5, 4, 5]
    keep = blocks_keep({"a": made}, 0.5)["a"].reshape(3, 5, 2)  # 15 of 30: 4 + 8 + 4 are nearer than 4 + 8
    assert int((~keep).sum()) == 16
    assert not keep[2, :2].any()
    assert not keep[:2, 2:].any()
    assert keep[:2, :2].all()


def test_of_equal_blocks_the_first_go_and_each_layer_keeps_its_strongest() -> None:
    network = network_of(conv(4, 1, name="a"), conv(4, 1, name="b"))
    with torch.no_grad():
        for weight in prunable_weights(network).values():
            weight.fill_(0.5)
    masks = weight_masks(network, blocks(0.5, exclude=("linear1",)), 0.5, seed=0)
    gone = torch.cat([(masks[name] == 0).flatten() for name in masks])
    assert int(gone.sum()) == round(0.5 * 48)
    assert int((masks["a.weight"] == 0).sum()) == 24
    network.get_parameter("a.weight").data.mul_(1e-3)
    almost = weight_masks(network, blocks(0.95, exclude=("linear1",)), 0.95, seed=0)
    assert [int(almost[name].sum()) for name in almost] == [4, 4]


def test_groups_have_blocks_of_their_own() -> None:
    network = network_of(conv(6, 3, groups=2, name="a"))
    masks = weight_masks(network, blocks(0.5, (2, 2), exclude=("linear1",)), 0.5, seed=0)
    sizes = block_sizes(masks["a.weight"], weight_matrix(network.graph["a"]), (2, 2))
    assert [size for _, size in sizes] == [36, 36, 18, 18] * 2  # 3 outputs of a group: 2 and 1


def test_a_block_that_is_partly_dead_goes_for_what_lives_in_it() -> None:
    network = network_of(conv(8, name="a"), conv(8, name="b"))
    unstructured = weight_masks(network, Prune(sparsity=0.3), 0.3, seed=0)
    unstructured.apply(network)
    masks = weight_masks(network, blocks(0.5), 0.5, seed=0, previous=unstructured)
    for name in masks:
        assert not bool(((unstructured[name] == 0) & (masks[name] == 1)).any())
    assert abs(masks.zeros() - round(0.5 * masks.sizes())) <= 36 / 2


def test_random_blocks_come_from_the_seed_and_are_not_drawn_by_size() -> None:
    network = network_of(conv(8, name="a"))
    one, same, other = (
        weight_masks(network, blocks(0.5, criterion="random"), 0.5, seed=seed)["a.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [pattern(), blocks(0.5), blocks(0.5, scope="layer")], ids=lambda s: s.structure)
def test_a_weight_that_is_not_finite_is_refused(step: Prune) -> None:
    network = network_of(conv(8, name="a"))
    network.get_parameter("a.weight").data[0, 0, 0, 0] = float("nan")
    with pytest.raises(Diverged, match=r"a\.weight"):
        weight_masks(network, step, step.sparsity, seed=0)


@pytest.mark.parametrize("step", [pattern(), pattern("1:4"), blocks(0.4), blocks(0.7, (4, 3))], ids=str)
def test_the_scores_do_not_depend_on_the_memory_layout(step: Prune) -> None:
    plain, last = trained(wide("residual")), trained(wide("residual")).to(memory_format=torch.channels_last)
    one, other = (weight_masks(network, step, step.sparsity, seed=0) for network in (plain, last))
    assert isinstance(one, Masks)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "shuffle", "transposed", "video", "shared"])
def test_what_the_dry_run_counts_as_exact_is_what_the_masks_have(name: str) -> None:
    network = trained(wide(name))
    owners = [node for node in network.graph.nodes if node.type in WEIGHTED and node.shares is None]
    exact = 0
    for step in (
        *[pattern(text) for text in ("2:4", "1:4", "3:8")],
        *[blocks(sparsity, shape, scope="layer") for sparsity in (0.3, 0.85) for shape in ((4, 4), (3, 2))],
        *[Prune(sparsity=sparsity, criterion="erk") for sparsity in (0.3, 0.85, 0.97)],
        Prune(sparsity=0.5, scope="layer", overrides={"linear1": PruneOverride(sparsity=0.25)}),
    ):
        dense = dense_layers(owners, step)
        found = planned_zeros([node for node in owners if node.name not in dense], step, {}, ())
        masks = weight_masks(network, step, step.sparsity, seed=0)
        assert {f"{key}.weight" for key in found} == set(masks)
        for name_of_layer, plan in found.items():
            mask = masks[f"{name_of_layer}.weight"]
            zeros = int((mask == 0).sum())
            assert plan.zeros is not None
            if plan.exact:
                exact += 1
                assert plan.zeros == zeros, (name_of_layer, step)
            else:
                assert abs(plan.zeros - zeros) <= 0.5 * mask.numel()
    assert exact > 10


def test_a_dead_layer_keeps_a_weight_in_each_row_and_one_block() -> None:
    network = network_of(conv(8, name="a"))
    network.get_parameter("a.weight").data.zero_()
    assert float(weight_masks(network, pattern(), None, seed=0)["a.weight"].mean()) == 0.5
    assert int(weight_masks(network, blocks(0.99), 0.99, seed=0)["a.weight"].sum()) == 36


def test_the_topologies_of_the_language_all_take_both() -> None:
    for name in TOPOLOGIES:
        network = trained(topology(name))
        for step in (pattern("1:2"), blocks(0.5, (1, 1))):
            for key, mask in weight_masks(network, step, step.sparsity, seed=0).state().items():
                assert mask.any(), (name, key)
