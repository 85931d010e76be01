"""Loss curves are those of real cuts, and measuring them leaves no trace."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.pruning.budget import Curve, choose_removals
from app.pruning.channel_classes import Classes, channel_classes
from app.pruning.group_limits import free_limits
from app.spec.job import Training
from app.spec.prune import Prune, PruneOverride
from tests.support.networks.dags import random_graph
from tests.support.networks.topologies import HEAD, PICTURE, TOPOLOGIES, Layers, conv, layer, topology, trained
from worker.evaluation import evaluate
from worker.network import Network, build_network
from worker.precision import choose_precision
from worker.pruning.importance import channel_scores
from worker.pruning.loss_curves import curve_effort, loss_curves
from worker.pruning.recalibration import recalibrate_batch_norm
from worker.pruning.surgery import shrink

CLOSE = 1e-5  # nats, relative to the loss: float32 sums in another order
STEP = Prune.model_validate({"budget": {"macs": 0.5}, "max_sparsity": 0.8})


def batches(network: Network, count: int = 24, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Noise with random labels."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, *network.graph.input_shape, generator=generator)
    labels = torch.randint(0, network.graph.nodes[-1].shape[0], (count,), generator=generator)
    return list(zip(images.split(size), labels.split(size), strict=True))


def measured(network: Network, classes: Classes, step: Prune = STEP, **options: Any) -> dict[int, Curve]:
    scores = channel_scores(network, classes, "l2", seed=0)
    precision = choose_precision(Training(), "cpu", spatial_axes=len(network.graph.input_shape) - 1)
    return loss_curves(network, classes, step, scores, batches(network), precision, images=24, **options)


def by_surgery(network: Network, classes: Classes) -> dict[int, Curve]:
    """The same curves by choosing with the whole budget's code, building each smaller network, and evaluating that."""
    scores = channel_scores(network, classes, "l2", seed=0)
    precision = choose_precision(Training(), "cpu", spatial_axes=len(network.graph.input_shape) - 1)
    found = batches(network)
    step = STEP.model_copy(update={"round_to": 1})
    whole = evaluate(network, found, precision).loss
    curves = {}
    for limits in free_limits(network.graph, classes, step, shared=True):
        points: list[tuple[float, float]] = []
        for kept in (0.75, 0.5, 0.25, 1 - step.max_sparsity):
            alone = {"budget": None, "scope": "layer", "sparsity": min(1 - kept, step.max_sparsity)}
            wanted = step.model_copy(update=alone)
            dropped = choose_removals(network.graph, classes, scores, wanted, only=limits.group.index).dropped
            left = 1 - len(dropped) / len(limits.group.classes)
            if left < min([1.0, *(kept for kept, _ in points)]):
                smaller = shrink(network, classes, dropped)
                recalibrate_batch_norm(smaller, (images for images, _ in found))
                points.append((left, max(0.0, evaluate(smaller, found, precision).loss - whole)))
        curves[limits.group.index] = Curve(tuple(points))
    return curves


def assert_same_curves(found: Mapping[int, Curve], wanted: Mapping[int, Curve]) -> None:
    assert found.keys() == wanted.keys()
    for index, curve in found.items():
        assert [kept for kept, _ in curve.points] == [kept for kept, _ in wanted[index].points]
        losses = [rise for _, rise in wanted[index].points]
        assert [rise for _, rise in curve.points] == pytest.approx(losses, rel=CLOSE, abs=CLOSE)


def bits(network: Network) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in network.state_dict().items()}


def assert_curves_equal_surgery(network: Network) -> None:
    classes = channel_classes(network.graph)
    wanted, before = by_surgery(network, classes), bits(network)
    modes = {name: module.training for name, module in network.named_modules()}
    momenta = {name: getattr(module, "momentum", None) for name, module in network.named_modules()}
    assert_same_curves(measured(network, classes), wanted)
    assert bits(network) == before
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert {name: getattr(module, "momentum", None) for name, module in network.named_modules()} == momenta


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_curves_are_those_of_networks_that_were_really_cut(name: str) -> None:
    assert_curves_equal_surgery(trained(topology(name)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 1_000_000))
def test_curves_are_those_of_networks_that_were_really_cut_on_random_graphs(seed: int) -> None:
    assert_curves_equal_surgery(trained(random_graph(seed), seed))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 1_000_000),
    st.floats(0.01, 0.99),
    st.sampled_from([1, 2, 4]),
    st.floats(0.3, 0.99),
    st.integers(1, 3),
)
def test_what_leaves_of_one_group_is_what_a_prune_step_takes_of_it(
    seed: int, part: float, round_to: int, most: float, fewest: int
) -> None:
    graph = random_graph(seed)
    classes = channel_classes(graph)
    fields = {"round_to": round_to, "max_sparsity": max(part, most), "min_channels": fewest}
    step = Prune.model_validate({"sparsity": part, "structure": "channels", "scope": "layer", **fields})
    scores = {c: float((c * 7919) % 13) for c in classes.all().tolist()}
    for limits in free_limits(graph, classes, step):
        wanted = choose_removals(graph, classes, scores, step, only=limits.group.index).dropped
        assert set(limits.weakest(scores, part)) == wanted


@dataclass
class Notes:
    """A monitor that keeps what it is told, and ends after so many cuts."""

    known: dict[tuple[int, float], float] = field(default_factory=dict)
    patience: int = 1000
    told: int = 0

    def rises(self) -> Mapping[tuple[int, float], float]:
        """What was told so far."""
        return self.known

    def cut_measured(self, group: int, kept: float, rise: float, *, share: float) -> None:
        """Keep it."""
        assert 0 < share <= 1
        self.known[group, kept] = rise
        self.told += 1
        if self.told == self.patience:
            raise KeyboardInterrupt


def test_measuring_can_be_left_after_any_cut_and_gone_on_with() -> None:
    network = trained(topology("residual"))
    classes = channel_classes(network.graph)
    whole, before = measured(network, classes), bits(network)
    cuts = sum(len(curve.points) for curve in whole.values())
    for patience in range(1, cuts):
        first = Notes(patience=patience)
        with pytest.raises(KeyboardInterrupt):
            measured(network, classes, monitor=first)
        assert bits(network) == before
        second = Notes(known=first.known)
        assert measured(network, classes, monitor=second) == whole
        assert second.told == cuts - patience


def test_a_cut_that_fails_leaves_the_network_as_it_was() -> None:
    network = trained(topology("residual"))
    classes, before = channel_classes(network.graph), bits(network)

    def failing(network: Network, dropped: Collection[int]) -> None:
        with torch.no_grad():
            next(network.parameters()).fill_(0.5)
        raise MemoryError

    with pytest.raises(MemoryError):
        measured(network, classes, repair=failing)
    assert bits(network) == before


def test_a_cut_is_repaired_before_it_is_evaluated() -> None:
    network = trained(topology("chain"))
    classes, before = channel_classes(network.graph), bits(network)
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seen: list[int] = []

    def perfect(network: Network, dropped: Collection[int]) -> None:
        seen.append(len(dropped))
        network.load_state_dict(tensors)

    curves = measured(network, classes, repair=perfect)
    rises = {rise for curve in curves.values() for _, rise in curve.points}
    assert len(seen) == sum(len(curve.points) for curve in curves.values())
    assert len(rises) == 1, "the whole network again, whose statistics were counted again"
    assert bits(network) == before


@pytest.mark.parametrize("images", [10, 300, 2_000, 5_000, 60_000])
@pytest.mark.parametrize("groups", [1, 5, 17, 57, 100, 1_000])
def test_all_cuts_cost_no_more_than_an_epoch_and_a_hundred_groups_a_hundred_evaluations(
    groups: int, images: int
) -> None:
    effort = curve_effort(groups, images)
    cuts = effort.forwards(groups) - effort.images
    least = 4 * groups * min(32, images)
    assert cuts <= max(3 * max(images, 2_000), least)
    assert cuts <= 512 * max(groups, 100)
    assert min(32, images) <= effort.images <= min(512, images)


def test_a_small_job_has_four_points_a_curve_and_a_deep_network_fewer() -> None:
    assert curve_effort(4, 5_000).parts == (0.75, 0.5, 0.25)
    assert curve_effort(4, 5_000).images == 468
    assert curve_effort(100, 60_000).images == 64
    assert len(curve_effort(100, 60_000).parts) == 3
    assert curve_effort(100, 5_000).parts == (0.5,)
    assert curve_effort(100, 5_000).images == 37


def test_a_curve_goes_as_far_as_an_override_lets_its_group_go() -> None:
    network = topology_network()
    classes = channel_classes(network.graph)
    step = Prune.model_validate({"budget": {"macs": 0.5}, "max_sparsity": 0.5})
    looser = step.model_copy(update={"overrides": {"first": PruneOverride(max_sparsity=0.875)}})
    ends = [
        {classes.layers_of(classes.groups[index])[0]: curve.points[-1][0] for index, curve in found.items()}
        for found in (measured(network, classes, step), measured(network, classes, looser))
    ]
    assert ends == [{"first": 0.5, "second": 0.5}, {"first": 0.125, "second": 0.5}]


def topology_network() -> Network:
    """Two groups of eight channels."""
    layers: Layers = [conv(8, name="first"), layer("relu"), conv(8, name="second"), layer("relu"), *HEAD]
    return build_network(build_graph(read_layers(layers), PICTURE), seed=0)


def test_batches_are_equally_large_whatever_the_number_of_images() -> None:
    """A rest of one image would be half of the statistics."""
    network = trained(topology("chain"))
    classes = channel_classes(network.graph)
    scores = channel_scores(network, classes, "l2", seed=0)
    precision = choose_precision(Training(), "cpu", spatial_axes=2)
    sizes: list[int] = []

    def note(network: Network, dropped: Collection[int]) -> None:
        network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))

    loss_curves(network, classes, STEP, scores, batches(network, 26, 13), precision, images=25, repair=note)
    assert set(sizes) == {12, 13}
