"""Behind a cut the network gives again what it gave before: exactly where that is possible, and never less than without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.network.cost import cost
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.pruning.channel_classes import channel_classes
from app.spec.low_rank import LowRank, Separable
from app.spec.prune import Prune
from tests.support.networks.dags import random_drop, random_graph
from tests.support.networks.topologies import HEAD, PICTURE, TOPOLOGIES, Layers, conv, layer, topology, trained
from worker.compression.low_rank import replace_trained_layers
from worker.network import Network
from worker.pruning import reconstruction
from worker.pruning.normal_equations import NormalEquations, NoSolution
from worker.pruning.reconstruction import Reconstruction, images_within, products_within, reconstruct
from worker.pruning.surgery import kept_channels, shrink
from worker.pruning.weight_masks import joined_masks
from worker.training.masks import Masks

EXACT = 1e-9
"""A ridge that pulls at nothing that the images determine."""


def network_of(layers: Layers, shape: tuple[int, ...] = PICTURE) -> Network:
    return trained(build_graph(read_layers(layers), shape))


def images(graph: Graph, count: int = 96) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return list(torch.randn(count, *graph.input_shape, generator=generator).split(32))


def repeat_channel(network: Network, name: str, original: int, copied: int, factor: float = 2.0) -> None:
    """Make channel `copied` of a layer's output `factor` times the channel `original`."""
    node = network.graph[name]
    axis = 1 if node.type == "conv_transpose" else 0
    with torch.no_grad():
        for key in node.uses:
            tensor = network.get_parameter(f"{name}.{key}")
            along = tensor if key == "bias" or axis == 0 else tensor.transpose(0, 1)
            along[copied] = factor * along[original]


def cut_channel(network: Network, name: str, channel: int) -> tuple[Network, dict[str, Tensor]]:
    """The network without one channel of a layer, and which are left."""
    classes = channel_classes(network.graph)
    dropped = [int(classes.slots[name].runs(1)[channel])]
    return shrink(network, classes, dropped), kept_channels(classes, dropped)


@torch.no_grad()
def distance(one: Network, other: Network) -> float:
    """The largest difference of outputs on images that no fit has seen, relative to the largest output."""
    generator = torch.Generator().manual_seed(12)
    unseen = torch.randn(32, *one.graph.input_shape, generator=generator)
    found, expected = one.eval()(unseen), other.eval()(unseen)
    return float((found - expected).abs().max() / expected.abs().max())


REDUNDANT: dict[str, tuple[tuple[int, ...], Layers]] = {
    "conv 2-D": (PICTURE, [conv(4, name="cut"), conv(5), *HEAD]),
    "conv 1-D": ((2, 12), [conv(4, name="cut"), conv(5, stride=2, padding=1), *HEAD]),
    "conv 3-D": ((1, 4, 5, 6), [conv(4, [1, 3, 3], name="cut"), conv(5, [3, 1, 3], padding=1, dilation=1), *HEAD]),
    "conv without bias": (PICTURE, [conv(4, name="cut"), layer("relu"), conv(5, bias=False), *HEAD]),
    "linear": (PICTURE, [conv(4, name="cut"), layer("relu"), layer("flatten"), layer("linear", out_features=3)]),
    "transposed": (
        (2, 6, 6),
        [conv(4, name="cut"), layer("conv_transpose", out_channels=4, kernel_size=3, stride=2, padding=1), *HEAD],
    ),
    "from a transposed": (
        (2, 6, 6),
        [layer("conv_transpose", out_channels=4, kernel_size=2, stride=2, name="cut"), layer("relu"), conv(4), *HEAD],
    ),
    "shared": (
        PICTURE,
        [
            conv(4, name="cut"),
            layer("relu"),
            conv(4, name="twice"),
            layer("relu"),
            layer("conv", shares="twice"),
            *HEAD,
        ],
    ),
}


@pytest.mark.parametrize("name", [name for name in REDUNDANT if name != "shared"])
def test_a_channel_that_others_can_replace_is_replaced_exactly(name: str) -> None:
    shape, layers = REDUNDANT[name]
    network = network_of(layers, shape)
    repeat_channel(network, "cut", 0, 3)
    smaller, kept = cut_channel(network, "cut", 3)
    assert distance(smaller, network) > 1e-2
    found = reconstruct(smaller, network, images(network.graph, 400), kept=kept, ridges=[EXACT])
    assert found.kept
    assert distance(smaller, network) < 1e-4


def test_a_channel_behind_batch_norm_is_replaced_and_norms_before_the_cut_keep_their_statistics() -> None:
    network = network_of([conv(4, name="cut"), layer("batch_norm", name="norm"), layer("relu"), conv(5), *HEAD])
    repeat_channel(network, "cut", 0, 3)
    with torch.no_grad():  # so that the channel is twice the other behind the norm too
        for key, factor in (("running_mean", 2.0), ("running_var", 1.0), ("weight", 1.0), ("bias", 2.0)):
            tensor = network.state_dict()[f"norm.{key}"]
            tensor[3] = factor * tensor[0]
    smaller, kept = cut_channel(network, "cut", 3)
    before = {name: buffer.clone() for name, buffer in smaller.named_buffers()}
    assert reconstruct(smaller, network, images(network.graph), kept=kept, ridges=[EXACT]).kept
    assert distance(smaller, network) < 1e-4
    for name, buffer in smaller.named_buffers():
        assert name.endswith("num_batches_tracked") or torch.equal(buffer, before[name])


def test_a_depthwise_layer_is_left_alone_and_the_layer_behind_it_repaired() -> None:
    layers = [conv(4, name="cut"), layer("relu"), conv(4, groups="depthwise", name="depth"), conv(5, name="mix"), *HEAD]
    network = network_of(layers)
    repeat_channel(network, "cut", 0, 3)
    smaller, kept = cut_channel(network, "cut", 3)
    found = reconstruct(smaller, network, images(network.graph), kept=kept)
    assert not found.layers["depth"]["reconstructed"]
    assert found.layers["mix"]["reconstructed"]


def test_groups_are_fitted_each_on_its_own_inputs() -> None:
    layers = [conv(8, name="cut"), layer("relu"), conv(6, groups=2, name="grouped"), *HEAD]
    network = network_of(layers)
    for start in (0, 4):
        repeat_channel(network, "cut", start, start + 3)
    classes = channel_classes(network.graph)
    dropped = sorted({int(classes.slots["cut"].runs(1)[place]) for place in (3, 7)})
    smaller, kept = shrink(network, classes, dropped), kept_channels(classes, dropped)
    assert smaller.graph["cut"].shape[0] == 6
    assert reconstruct(smaller, network, images(network.graph), kept=kept, ridges=[EXACT]).kept
    assert distance(smaller, network) < 1e-4


def test_a_layer_that_is_used_twice_is_fitted_to_both_places() -> None:
    network = network_of(REDUNDANT["shared"][1])
    classes = channel_classes(network.graph)
    repeat_channel(network, "twice", 0, 3)
    repeat_channel(network, "cut", 0, 3)
    dropped = random_drop(classes, 0.2, 1)
    smaller, kept = shrink(network, classes, dropped), kept_channels(classes, dropped)
    found = reconstruct(smaller, network, images(network.graph), kept=kept)
    assert found.layers["twice"]["reconstructed"]
    before, after = found.layers["twice"]["output_error"]
    assert after < before


def test_layers_before_the_cut_and_frozen_ones_keep_their_bits() -> None:
    layers = [
        conv(4, name="first"),
        conv(6, name="cut"),
        layer("relu"),
        conv(5, name="held"),
        conv(4, name="last"),
        *HEAD,
    ]
    network = network_of(layers)
    smaller, kept = cut_channel(network, "cut", 2)
    before = {name: tensor.clone() for name, tensor in smaller.state_dict().items()}
    found = reconstruct(smaller, network, images(network.graph), kept=kept, frozen={"held"})
    assert found.layers["first"]["not_reconstructed"] == "its outputs are what they were"
    assert found.layers["cut"]["not_reconstructed"] == "its outputs are what they were"
    assert found.layers["held"]["not_reconstructed"] == "frozen"
    changed = {
        name.partition(".")[0] for name, tensor in smaller.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"last", "linear1"}


@pytest.mark.parametrize(
    "step",
    [
        {"sparsity": 0.8},
        {"sparsity": 0.5, "structure": "blocks", "block": (2, 2)},
        {"structure": "n:m", "pattern": "2:4"},
    ],
)
def test_zeros_stay_zeros_and_the_error_falls(step: dict[str, Any]) -> None:
    layers = [
        conv(8),
        layer("relu"),
        conv(8, groups=2),
        layer("relu"),
        layer("conv_transpose", out_channels=4, kernel_size=2),
    ]
    network = network_of([*layers, *HEAD], (4, 8, 8))
    target = copy.deepcopy(network)
    masks = joined_masks(network, Prune.model_validate(step), step.get("sparsity"), None, seed=0)
    masks.apply(network)
    before = distance(network, target)
    found = reconstruct(network, target, images(network.graph), masks=masks)
    assert found.kept
    assert distance(network, target) < before
    assert any(outcome["reconstructed"] for outcome in found.layers.values())
    for name in masks:
        weight = network.get_parameter(name)
        assert torch.equal(weight[masks[name] == 0].view(torch.int32), torch.zeros_like(weight[masks[name] == 0]).int())


@pytest.mark.parametrize("step", [LowRank(rank=4), LowRank(energy=0.5, round_to=1), Separable()])
def test_products_come_nearer_to_the_layers_that_they_replace(step: LowRank | Separable) -> None:
    layers = [
        conv(20),
        layer("relu"),
        conv(24, bias=False),
        layer("batch_norm"),
        layer("relu"),
        conv(16, 1),
        layer("flatten"),
    ]
    network = network_of([*layers, layer("linear", out_features=3)], (16, 6, 6))
    smaller, outcomes = replace_trained_layers(network, step, baseline=cost(network.graph))
    assert any("parts" in outcome for outcome in outcomes.values())
    before = distance(smaller, network)
    found = reconstruct(smaller, network, images(network.graph, 256))
    assert found.kept
    assert distance(smaller, network) < before
    errors = [done["output_error"] for name, done in found.layers.items() if done["reconstructed"]]
    assert errors
    assert all(new < old for old, new in errors)


def test_both_layers_of_a_product_are_found_at_once_where_the_inputs_lie_in_few_directions() -> None:
    """The weights have full rank; what they do to these inputs has not."""
    layers = [
        layer("flatten"),
        layer("linear", out_features=16, bias=False, name="few"),
        layer("linear", out_features=24),
    ]
    network = network_of([*layers, layer("tanh"), layer("linear", out_features=3)], (16, 4, 4))
    with torch.no_grad():
        weight = network.get_parameter("few.weight")
        weight.copy_(torch.randn(16, 4) @ torch.randn(4, weight.shape[1]) / 8)
    step = LowRank(rank=4, layers=("linear1",))
    smaller, outcomes = replace_trained_layers(network, step, baseline=cost(network.graph))
    assert "parts" in outcomes["linear1"]
    assert distance(smaller, network) > 1e-2
    assert reconstruct(smaller, network, images(network.graph, 256), ridges=[EXACT]).kept
    assert distance(smaller, network) < 1e-3


def repaired(network: Network, seed: int, part: float = 0.4) -> tuple[Network, Reconstruction]:
    classes = channel_classes(network.graph)
    dropped = random_drop(classes, part, seed)
    smaller = shrink(network, classes, dropped).train()
    return smaller, reconstruct(
        smaller, network, images(network.graph), kept=kept_channels(classes, dropped), seed=seed
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology_is_repaired_and_never_ends_farther_away(name: str) -> None:
    network = trained(topology(name))
    smaller, found = repaired(network, 1)
    assert smaller.training
    if found.kept:
        assert found.divergence_after is not None
        assert found.divergence_before is not None
        assert found.divergence_after < found.divergence_before
    else:
        assert not any(outcome["reconstructed"] for outcome in found.layers.values())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 1_000_000))
def test_random_graphs_keep_shapes_types_and_layouts(seed: int) -> None:
    network = trained(random_graph(seed), seed)
    classes = channel_classes(network.graph)
    dropped = random_drop(classes, 0.5, seed)
    smaller = shrink(network, classes, dropped).to(memory_format=torch.preserve_format)
    before = {name: (t.shape, t.dtype, t.stride(), t.data_ptr()) for name, t in smaller.state_dict().items()}
    found = reconstruct(smaller, network, images(network.graph, 32), kept=kept_channels(classes, dropped), seed=seed)
    after = {name: (t.shape, t.dtype, t.stride(), t.data_ptr()) for name, t in smaller.state_dict().items()}
    assert after == before
    assert all(torch.isfinite(tensor).all() for tensor in smaller.state_dict().values())
    assert {name for name in found.layers if smaller.graph[name].shares is not None} == set()


@pytest.mark.parametrize("name", ["chain", "residual", "shared"])
def test_two_runs_give_the_same_bits(name: str) -> None:
    (one, first), (other, second) = (repaired(trained(topology(name)), 3) for _ in range(2))
    assert first == second
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])


def test_a_fit_that_brings_the_network_no_nearer_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of([conv(4, name="cut"), layer("relu"), conv(5), *HEAD])
    smaller, kept = cut_channel(network, "cut", 2)
    before = {name: tensor.clone() for name, tensor in smaller.state_dict().items()}
    divergences = iter([2.0, 1.0])  # of the fit, and of the network as the removal left it
    monkeypatch.setattr(reconstruction, "_recalibrated_divergence", lambda *given: next(divergences))
    found = reconstruct(smaller, network, images(network.graph), kept=kept)
    assert not found.kept
    assert "no nearer" in found.layers["conv1"]["not_reconstructed"]
    for name, tensor in smaller.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_layer_whose_equations_are_too_large_is_left_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "MOST_FEATURES", 30)
    network = network_of([conv(6, name="cut"), layer("relu"), conv(5, name="large"), *HEAD])
    smaller, kept = cut_channel(network, "cut", 2)
    found = reconstruct(smaller, network, images(network.graph), kept=kept)
    assert found.layers["large"]["not_reconstructed"] == "45 inputs of one output, more than 30"


def test_images_are_as_many_as_the_outputs_of_both_networks_leave_room_for() -> None:
    graph = topology("chain")
    assert images_within(graph, graph) == reconstruction.MOST_IMAGES
    wide = 2 * 4 * 8 * 8  # a convolution of 4 channels and the norm behind it, 8 x 8
    assert images_within(graph, limit_bytes=4 * wide * 10) == 10
    assert images_within(graph, limit_bytes=1) == 1


def test_one_image_to_fit_on_is_too_few_and_none_is_refused() -> None:
    network = network_of([conv(4, name="cut"), layer("relu"), conv(5), *HEAD])
    smaller, kept = cut_channel(network, "cut", 2)
    for count in (1, 2):  # of two, one is left to judge
        found = reconstruct(smaller, network, images(network.graph, count), kept=kept)
        assert found.images == 1
        assert not found.kept
        assert {outcome["not_reconstructed"] for outcome in found.layers.values()} == {
            "two images to fit on are needed"
        }
    with pytest.raises(ValueError, match="at least one image"):
        reconstruct(smaller, network, [], kept=kept)


def test_it_is_looked_at_between_batches_and_can_be_ended() -> None:
    network = network_of([conv(4, name="cut"), layer("relu"), conv(5), *HEAD])
    smaller, kept = cut_channel(network, "cut", 2)
    looks: list[int] = []
    reconstruct(smaller, network, images(network.graph), kept=kept, look=lambda: looks.append(1))
    batches = len(images(network.graph)) + 1  # one of them is partly fitted on, partly judged on
    assert len(looks) > len(network.graph.nodes) * 2 * batches

    def end() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        reconstruct(smaller, network, images(network.graph), kept=kept, look=end)
    assert smaller.training == network.training


NORM_OF_ONE_VALUE = [
    layer("flatten"),
    layer("linear", out_features=6, name="wide"),
    layer("batch_norm"),
    layer("relu"),
    layer("linear", out_features=3),
]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 9))
def test_any_number_of_images_in_any_batches_can_be_fitted_on(count: int, size: int) -> None:
    """A norm behind a linear layer has one value per channel of a batch of one image: no variance."""
    target, network = (network_of(NORM_OF_ONE_VALUE) for _ in range(2))
    masks = joined_masks(network, Prune.model_validate({"sparsity": 0.5}), 0.5, None, seed=0)
    masks.apply(network)
    found = reconstruct(network, target, torch.cat(images(network.graph, count)).split(size), masks=masks)
    assert found.images == max(1, count - -(-count // reconstruction.JUDGING_PART))
    assert all(torch.isfinite(tensor).all() for tensor in network.state_dict().values())


def masked_copy(target: Network, *names: str) -> tuple[Network, Masks]:
    """The network with half of the weights of some layers zero."""
    network, generator = copy.deepcopy(target), torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": network.get_parameter(f"{name}.weight") for name in names}
    masks = Masks({key: (torch.rand(w.shape, generator=generator) > 0.5).float() for key, w in weights.items()})
    masks.apply(network)
    return network, masks


def test_layers_that_cost_more_than_is_left_are_left_with_the_reason() -> None:
    stem = [conv(6), layer("relu")]
    target = network_of([*stem, conv(6, name="one"), layer("relu"), conv(6, name="two"), layer("relu"), *HEAD])
    network, masks = masked_copy(target, "one", "two")
    bare = copy.deepcopy(network)
    whole = reconstruct(network, target, images(target.graph, 400), masks=masks)
    assert all(whole.layers[name]["reconstructed"] for name in ("one", "two"))
    found = reconstruct(bare, target, images(target.graph, 400), masks=masks, products=1.2e8)
    assert found.layers["one"]["reconstructed"]
    assert "more than the layers before it have left" in found.layers["two"]["not_reconstructed"]


def test_a_layer_that_costs_too_much_alone_is_left_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "MOST_LAYER_PRODUCTS", 1e3)
    target = network_of([conv(6, name="one"), layer("relu"), *HEAD])
    network, masks = masked_copy(target, "one")
    found = reconstruct(network, target, images(target.graph), masks=masks)
    assert "more than 1e+03" in found.layers["one"]["not_reconstructed"]


def test_a_repair_may_cost_an_epoch_of_training_or_a_few_seconds() -> None:
    graph = topology("chain")
    assert products_within(graph, 1) == reconstruction.MOST_JOB_PRODUCTS
    assert products_within(graph, 10**9) == 3e9 * cost(graph).macs


def test_norms_behind_a_frozen_layer_count_again_only_if_its_outputs_have_changed() -> None:
    layers = [conv(4, name="held"), layer("batch_norm", name="norm"), layer("relu"), conv(6, name="cut"), *HEAD]
    target = network_of(layers)
    for cut, counted in (("cut", False), ("held", True)):
        network, masks = masked_copy(target, cut)
        before = network.get_buffer("norm.running_mean").clone()
        found = reconstruct(network, target, images(target.graph), masks=masks, frozen={"held"})
        assert found.layers["held"]["not_reconstructed"] == "frozen"
        assert found.kept
        assert torch.equal(network.get_buffer("norm.running_mean"), before) != counted


SHARED = [conv(8, name="stem"), layer("relu"), conv(8, padding=1, name="twice"), layer("relu")]
AGAIN = [layer("conv", shares="twice"), layer("batch_norm", name="norm"), layer("relu")]


def test_the_second_sweep_counts_norms_behind_a_shared_layer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    count = reconstruction._Sweep._recount
    monkeypatch.setattr(reconstruction._Sweep, "_recount", lambda *given: (counted.append(1), count(*given)))
    target = network_of([*SHARED, *AGAIN, *HEAD])
    network, masks = masked_copy(target, "twice")
    found = reconstruct(network, target, images(target.graph), masks=masks)
    assert found.layers["twice"]["reconstructed"]
    assert len(counted) == 2


def test_a_shared_layer_does_not_keep_a_fit_that_is_good_at_one_place_only(monkeypatch: pytest.MonkeyPatch) -> None:
    target = network_of([*SHARED, *AGAIN, *HEAD])
    network, masks = masked_copy(target, "twice")
    before = network.get_parameter("twice.weight").clone()
    solve, solved = NormalEquations.solve, []

    def first_place_only(self: NormalEquations, start: Tensor, **given: Any) -> Tensor:
        if start.shape[1:] == (8, 73):
            solved.append(self.rows)
            if self.rows > solved[0]:
                raise NoSolution
        return solve(self, start, **given)

    monkeypatch.setattr(NormalEquations, "solve", first_place_only)
    found = reconstruct(network, target, images(target.graph), masks=masks)
    assert len(set(solved)) == 2
    assert not found.layers["twice"]["reconstructed"]
    assert torch.equal(network.get_parameter("twice.weight"), before)
