"""One removal of a pruning step, and what the report says of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from app.errors import BudgetMissed
from app.network.cost import cost
from app.spec.job import Training
from app.spec.prune import Prune
from tests.support.jobs.blobs import BlobBatches, graph_of, small_cnn
from worker.network import Network, build_network, snapshot
from worker.precision import choose_precision
from worker.pruning.schedules import PruningRound
from worker.pruning.weight_masks import joined_masks
from worker.run.removal import (
    RemovalContext,
    check_budget,
    cut_channels,
    cut_weights,
    layer_rows,
    recalibrate,
)

ONCE = PruningRound(1, 1, 1.0, 1)


def step_of(**fields: Any) -> Prune:
    """A pruning step."""
    return Prune.model_validate(fields)


def materials_for(network: Network) -> RemovalContext:
    """What removals need, with blobs as images."""

    def plain() -> Iterator[tuple[Tensor, Tensor]]:
        return BlobBatches(48, batch_size=16).epoch(0)

    dense = build_network(network.graph)
    dense.load_state_dict(network.state_dict())
    precision = choose_precision(Training(), "cpu", spatial_axes=2)
    return RemovalContext(plain, 0, precision, cost(network.graph), lambda: dense, images=48)


def three_convolutions() -> Network:
    """Three convolutions of 8 channels and a linear layer."""
    layers: list[dict[str, Any]] = []
    for _ in range(3):
        layers += [{"type": "conv", "out_channels": 8, "kernel_size": 3, "padding": 1}, {"type": "batch_norm"}]
        layers += [{"type": "relu"}]
    layers += [{"type": "global_avg_pool"}, {"type": "flatten"}, {"type": "linear", "out_features": 3}]
    return build_network(graph_of(layers), seed=0)


def test_a_later_step_keeps_the_zeros_of_layers_that_it_leaves_alone() -> None:
    network = three_convolutions()
    first = joined_masks(network, step_of(sparsity=0.5, exclude=("linear1",)), 0.5, None, seed=0)
    first.apply(network)
    second = joined_masks(network, step_of(sparsity=0.8, exclude=("conv1",)), 0.8, first, seed=0)
    assert torch.equal(second["conv1.weight"], first["conv1.weight"])
    assert float((second["conv2.weight"] == 0).float().mean()) > 0.5
    assert "linear1.weight" in second


def test_rewinding_chooses_on_the_trained_weights_and_masks_the_early_ones() -> None:
    network = three_convolutions()
    early = snapshot(build_network(network.graph, seed=1))
    trained = snapshot(network)
    masks = cut_weights(network, step_of(sparsity=0.5), ONCE, None, materials_for(network), early)
    kept = masks["conv2.weight"] != 0
    threshold = trained["conv2.weight"].abs()[kept].min()
    assert float(trained["conv2.weight"].abs()[~kept].max()) <= float(threshold)
    assert torch.equal(network.get_parameter("conv2.weight")[kept], early["conv2.weight"][kept])
    assert not network.get_parameter("conv2.weight")[~kept].any()


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "fpgm", "taylor", "random"])
def test_every_criterion_lands_within_the_budget(criterion: str) -> None:
    network = three_convolutions()
    step = step_of(budget={"macs": 0.4}, criterion=criterion, round_to=1)
    smaller = cut_channels(network, step, ONCE, materials_for(network), start=network.graph).network
    check_budget(smaller, step, materials_for(network))
    assert cost(smaller.graph).macs > 0.3 * cost(network.graph).macs


def test_a_budget_that_is_not_met_fails_with_both_numbers() -> None:
    network = three_convolutions()
    whole = cost(network.graph)
    with pytest.raises(BudgetMissed, match=rf"has {whole.params} params, the budget allows {whole.params // 2}"):
        check_budget(network, step_of(budget={"params": 0.5}), materials_for(network))
    step = step_of(budget={"macs": 0.001})
    with pytest.raises(BudgetMissed, match="at least"):
        cut_channels(network, step, ONCE, materials_for(network), start=network.graph)
    check_budget(network, step_of(sparsity=0.5), materials_for(network))


def test_recalibration_sets_the_statistics_of_the_images_and_nothing_else() -> None:
    network = build_network(small_cnn(), seed=0)
    network.get_buffer("batch_norm1.running_mean").fill_(5.0)
    before = snapshot(network)
    assert recalibrate(network, materials_for(network))
    after = snapshot(network)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"batch_norm1.running_mean", "batch_norm1.running_var"}
    assert float(after["batch_norm1.running_mean"].abs().max()) < 2
    assert not recalibrate(build_network(small_cnn(norm=False), seed=0), materials_for(network))


def test_every_layer_that_was_left_alone_has_a_reason() -> None:
    network = three_convolutions()
    step = step_of(sparsity=0.5, structure="channels", round_to=1, exclude=("conv1",))
    smaller = cut_channels(network, step, ONCE, materials_for(network), start=network.graph).network
    rows = {row["name"]: row for row in layer_rows(smaller, network.graph, step)}
    assert rows["conv1"]["reason"] == "excluded"
    assert rows["linear1"]["reason"] == "network output"
    assert (rows["conv2"]["channels_before"], rows["conv2"]["channels_after"]) == (8, 4)
    assert "reason" not in rows["conv2"]
    coarse = step_of(sparsity=0.5, structure="channels", round_to=1, exclude=("conv2",))
    rows = {row["name"]: row for row in layer_rows(network, network.graph, coarse)}
    assert rows["conv3"]["reason"].startswith("the budget was met without it")
    narrow = step_of(sparsity=0.5, structure="channels", round_to=16)
    rows = {row["name"]: row for row in layer_rows(network, network.graph, narrow)}
    assert rows["conv3"]["reason"] == "8 channels, and round_to is 16"


def test_weights_that_were_not_chosen_are_told_apart_from_excluded_ones() -> None:
    network = three_convolutions()
    network.get_parameter("conv2.weight").data += 100.0
    step = step_of(sparsity=0.2, exclude=("linear1",))
    cut_weights(network, step, ONCE, None, materials_for(network), None)
    rows = {row["name"]: row for row in layer_rows(network, network.graph, step)}
    assert rows["conv2"]["reason"] == "no weight of it was among the weakest"
    assert rows["linear1"]["reason"] == "excluded"
    assert 0 < rows["conv3"]["sparsity"] < 1
    assert "reason" not in rows["conv3"]
