"""Scores of channels and weights: what the formulas say, and that nothing else decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from app.errors import Diverged
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.pruning.channel_classes import Classes, channel_classes
from app.spec.job import Training
from app.spec.prune import CHANNEL_CRITERIA, PATTERN_CRITERIA, WEIGHT_CRITERIA, Criterion
from tests.support.networks.topologies import HEAD, PICTURE, TOPOLOGIES, Layers, conv, layer, topology, trained
from worker.network import Network
from worker.precision import choose_precision
from worker.pruning.importance import CHANNEL_SCORES, WEIGHT_SCORES, channel_scores, distance_sums, weight_scores

CHAIN: Layers = [conv(6, name="a"), layer("batch_norm", name="n"), layer("relu"), conv(4, name="b"), *HEAD]


def network_of(layers: Layers, seed: int = 0) -> Network:
    return trained(build_graph(read_layers(layers), PICTURE), seed).double()


def batches(network: Network, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    shape = network.graph.input_shape
    made = []
    for _ in range(count):
        images = torch.randn(8, *shape, generator=generator, dtype=next(network.parameters()).dtype)
        made.append((images, torch.randint(0, 3, (8,), generator=generator)))
    return made


def scores(network: Network, criterion: Criterion, **more: Any) -> dict[int, float]:
    classes = channel_classes(network.graph)
    more.setdefault("batches", batches(network))
    return channel_scores(network, classes, criterion, seed=0, **more)


def of_node(network: Network, found: dict[int, float], name: str) -> list[float]:
    return [found[c] for c in channel_classes(network.graph).slots[name].ids.tolist()]


def test_every_criterion_that_a_job_can_name_has_a_score_and_no_score_is_without_a_name() -> None:
    assert set(CHANNEL_SCORES) == set(CHANNEL_CRITERIA)
    assert set(WEIGHT_SCORES) == {*WEIGHT_CRITERIA, *PATTERN_CRITERIA}
    assert {*CHANNEL_SCORES, *WEIGHT_SCORES} == set(get_args(Criterion))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
def test_every_criterion_gives_every_class_of_every_topology_a_finite_score(name: str, criterion: Criterion) -> None:
    network = trained(topology(name))
    found = scores(network, criterion)
    assert sorted(found) == channel_classes(network.graph).all().tolist()
    assert all(np.isfinite(value) and value >= 0 for value in found.values())


def test_l1_and_l2_are_the_mean_over_the_tensors_of_a_class() -> None:
    network = network_of(CHAIN)
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    producer, consumer, scale = state["a.weight"], state["b.weight"], state["n.weight"]
    l1 = [(np.abs(producer[c]).sum() + np.abs(consumer[:, c]).sum()) / 2 for c in range(6)]
    l2 = [((producer[c] ** 2).sum() + (consumer[:, c] ** 2).sum() + scale[c] ** 2) / 3 for c in range(6)]
    np.testing.assert_allclose(of_node(network, scores(network, "l1"), "a"), l1, rtol=1e-12)
    np.testing.assert_allclose(of_node(network, scores(network, "l2"), "a"), l2, rtol=1e-12)


def test_a_class_behind_flatten_counts_all_its_columns() -> None:
    graph = build_graph(read_layers([conv(3, name="a"), layer("flatten"), layer("linear", out_features=2)]), (1, 2, 2))
    network = trained(graph).double()
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    columns = state["linear1.weight"].reshape(2, 3, 4)
    expected = [((state["a.weight"][c] ** 2).sum() + (columns[:, c] ** 2).sum()) / 2 for c in range(3)]
    np.testing.assert_allclose(of_node(network, scores(network, "l2"), "a"), expected, rtol=1e-12)


def test_bn_scale_reads_the_scales_and_takes_l2_where_there_are_none() -> None:
    network = network_of(CHAIN)
    found = scores(network, "bn_scale")
    scale = network.state_dict()["n.weight"].abs().numpy()
    np.testing.assert_allclose(of_node(network, found, "a"), scale, rtol=1e-12)
    assert of_node(network, found, "b") == of_node(network, scores(network, "l2"), "b")


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "fpgm", "taylor"])
def test_permuting_filters_permutes_the_scores(criterion: Criterion) -> None:
    network, permuted = network_of(CHAIN), network_of(CHAIN)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        for name, tensor in permuted.state_dict().items():
            if name.startswith(("a.", "n.")) and tensor.dim():
                tensor.copy_(tensor[order].clone())
        permuted.state_dict()["b.weight"].copy_(network.state_dict()["b.weight"][:, order])
    before = of_node(network, scores(network, criterion), "a")
    after = of_node(permuted, scores(permuted, criterion), "a")
    np.testing.assert_allclose(after, np.array(before)[order.numpy()], rtol=1e-9)


def test_scores_depend_neither_on_threads_nor_on_the_order_of_batches() -> None:
    network = trained(topology("residual"))
    for criterion in CHANNEL_CRITERIA:
        one = scores(network, criterion)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            other = scores(network, criterion, batches=batches(network)[::-1])
        finally:
            torch.set_num_threads(threads)
        tolerance = 1e-5 if criterion == "taylor" else 1e-12  # gradients are float32, as the network is
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=tolerance)


def test_random_is_the_same_for_the_same_seed_and_differs_between_groups() -> None:
    network = network_of([conv(6, name="a"), conv(6, name="b"), *HEAD])
    classes = channel_classes(network.graph)
    one, again, other = (channel_scores(network, classes, "random", seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert of_node(network, one, "a") != of_node(network, one, "b")


def test_fpgm_ranks_a_duplicated_filter_below_the_others() -> None:
    network = network_of(CHAIN)
    with torch.no_grad():
        weight = network.get_parameter("a.weight")
        weight[4] = weight[1]
    found = of_node(network, scores(network, "fpgm"), "a")
    flat = weight.detach().flatten(1).numpy()
    expected = [sum(float(np.linalg.norm(flat[c] - flat[other])) for other in range(6)) for c in range(6)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[1] == found[4]
    assert sorted(range(6), key=lambda c: found[c])[:2] in ([1, 4], [4, 1])


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-9], ids=["far", "near", "nearly equal"])
@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (40, 27), (700, 12)])
def test_sums_of_distances_are_exact_however_near_the_rows_are(shape: tuple[int, int], spread: float) -> None:
    generator = np.random.default_rng(0)
    rows = 1 + spread * generator.normal(size=shape)
    rows[len(rows) // 2 :] *= 1 + generator.normal(size=(len(rows) - len(rows) // 2, 1))
    expected = np.sqrt(np.square(rows[:, None] - rows[None]).sum(axis=2)).sum(axis=1)
    np.testing.assert_allclose(distance_sums(rows), expected, rtol=1e-12)


def test_equal_rows_have_no_distance_and_equal_sums() -> None:
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(600, 33))
    rows[1::3] = rows[::3]
    rows[7::50] = 0.0
    rows[8::50] = -0.0
    found = distance_sums(rows)
    assert (found[1::3][~np.isin(np.arange(1, 600, 3) % 50, (7, 8))] > 0).all()
    for row in np.unique(rows + 0.0, axis=0):
        assert len(set(found[(rows == row).all(axis=1)])) == 1
    assert not distance_sums(np.ones((50, 9)) / 3).any()
    assert not distance_sums(np.zeros((3, 4))).any()


def gate_derivative(network: Network, layer_name: str, channel: int, images: Tensor, labels: Tensor) -> float:
    """d loss / d gate of one channel after a layer, by central differences."""
    values = []
    for gate in (1 + 1e-5, 1 - 1e-5):

        def scale(module: Any, inputs: Any, output: Tensor, gate: float = gate) -> Tensor:
            factors = torch.ones(output.shape[1], dtype=output.dtype)
            factors[channel] = gate
            return output * factors.view(1, -1, *[1] * (output.dim() - 2))

        handle = network.get_submodule(layer_name).register_forward_hook(scale)
        with torch.no_grad():
            values.append(float(cross_entropy(network(images), labels)))
        handle.remove()
    return (values[0] - values[1]) / 2e-5


def test_taylor_is_the_squared_derivative_of_the_loss_by_a_gate_on_the_channel() -> None:
    network = network_of(CHAIN).eval()
    data = batches(network)
    found = scores(network, "taylor", batches=data)
    for gated, layer_name in (("a", "n"), ("b", "b")):  # after the batch norm; after the convolution itself
        for channel, score in enumerate(of_node(network, found, gated)):
            expected = np.mean([gate_derivative(network, layer_name, channel, *batch) ** 2 for batch in data])
            assert score == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_taylor_sums_the_producers_of_a_class_before_it_squares() -> None:
    network = network_of([conv(4, name="a"), layer("residual", name="r", layers=[conv(4)]), *HEAD]).eval()
    data = batches(network, 1)
    found = of_node(network, scores(network, "taylor", batches=data), "a")
    for channel in range(4):
        total = sum(gate_derivative(network, name, channel, *data[0]) for name in ("a", "r_conv1"))
        assert found[channel] == pytest.approx(total**2, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("at_a_time", [1, 3, 8, 100])
def test_taylor_in_pieces_of_a_batch_adds_their_gradients_before_it_squares(at_a_time: int) -> None:
    network = network_of(CHAIN).eval()
    data = batches(network)
    whole = scores(network, "taylor", batches=data)
    pieces = channel_scores(
        network, channel_classes(network.graph), "taylor", seed=0, batches=data, images_at_a_time=at_a_time
    )
    assert pieces == pytest.approx(whole, rel=1e-4, abs=1e-12)


def test_taylor_computes_in_the_jobs_number_format_but_not_in_float16() -> None:
    network = network_of(CHAIN).float().eval()
    classes, data, seen = channel_classes(network.graph), batches(network), []
    network.get_submodule("b").register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    wide = channel_scores(network, classes, "taylor", seed=0, batches=data)
    narrow = choose_precision(Training(precision="bf16"), "cpu", spatial_axes=2)
    found = channel_scores(network, classes, "taylor", seed=0, batches=data, precision=narrow)
    halves = replace(narrow, dtype=torch.float16)
    assert channel_scores(network, classes, "taylor", seed=0, batches=data, precision=halves) == wide
    assert [seen[0], seen[len(data)], seen[-1]] == [torch.float32, torch.bfloat16, torch.float32]
    assert found != wide
    assert found == pytest.approx(wide, rel=0.2, abs=0.1 * max(wide.values()))


def test_scoring_leaves_the_network_as_it_is() -> None:
    network = trained(topology("chain")).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for criterion in CHANNEL_CRITERIA:
        scores(network, criterion)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    network = trained(topology("chain"))
    with torch.no_grad():
        network.get_parameter("conv2.weight")[0, 0, 0, 0] = value
    with pytest.raises(Diverged, match=r"conv2\.weight"):
        scores(network, "l2")


def test_scores_of_single_weights_are_their_absolute_values_or_come_from_the_seed() -> None:
    weight = torch.tensor([[-2.0, 0.5], [0.0, 1.0]])
    assert weight_scores("w", weight, "l1", seed=0).tolist() == [2.0, 0.5, 0.0, 1.0]
    assert weight_scores("w", weight, "l2", seed=0).tolist() == [2.0, 0.5, 0.0, 1.0]
    one, again, other = (weight_scores(name, weight, "random", seed=0).tolist() for name in ("w", "w", "v"))
    assert one == again
    assert one != other


def test_groups_of_one_stage_are_ranked_by_their_own_members() -> None:
    """A grouped convolution's input axis stands for all blocks: its whole column counts, once."""
    network = network_of([conv(4, name="a"), conv(4, name="g", groups=2), *HEAD])
    classes: Classes = channel_classes(network.graph)
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    found = scores(network, "l2")
    for position in range(2):
        producers = (state["a.weight"][[position, position + 2]] ** 2).sum()
        consumers = (state["g.weight"][:, position] ** 2).sum()
        c = int(classes.slots["a"].ids[position])
        assert found[c] == pytest.approx((producers + consumers) / 2, rel=1e-12)


def test_lamp_divides_by_what_is_not_weaker_so_the_strongest_of_every_group_has_one() -> None:
    network = network_of(CHAIN)
    strength, found = scores(network, "l2"), scores(network, "lamp")
    for group in channel_classes(network.graph).groups:
        members = group.classes.tolist()
        for c in members:
            rest = sum(strength[other] for other in members if strength[other] >= strength[c])
            assert found[c] == pytest.approx(strength[c] / rest, rel=1e-12)
        assert max(found[c] for c in members) == pytest.approx(1.0, rel=1e-12)


def test_activation_is_the_mean_absolute_output_behind_norm_and_activation() -> None:
    network = network_of(CHAIN)
    data = batches(network)
    answers: list[Tensor] = []
    relu = network.graph.nodes[2].name
    network.get_submodule(relu).register_forward_hook(lambda module, inputs, output: answers.append(output.detach()))
    network.eval()
    with torch.no_grad():
        for images, _ in data:
            network(images)
    wanted = torch.cat(answers).abs().mean(dim=(0, 2, 3)).tolist()
    assert of_node(network, scores(network, "activation", batches=data), "a") == pytest.approx(wanted, rel=1e-12)


def test_activation_leaves_hooks_and_mode_as_they_were() -> None:
    network = network_of(CHAIN).train()
    scores(network, "activation")
    assert all(module.training and not module._forward_hooks for module in network.modules())
