"""The moving average of a network."""

from __future__ import annotations

import pytest
import torch

from tests.support.jobs.blobs import small_cnn
from worker.network import assign_tensors, build_network, floating_tensors, snapshot
from worker.training.averaging import Average


def test_the_average_follows_its_formula_over_weights_and_running_statistics() -> None:
    network = build_network(small_cnn(), seed=0)
    average = Average(network, 0.5)
    wanted = snapshot(network)
    assert "batch_norm1.running_mean" in wanted
    for step in range(12):
        for tensor in floating_tensors(network).values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step)))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in floating_tensors(network).items():
            wanted[name] = decay * wanted[name] + (1 - decay) * tensor
    for name, tensor in average.tensors.items():
        torch.testing.assert_close(tensor, wanted[name])


def test_the_network_has_the_average_inside_the_block_and_its_own_weights_behind_it() -> None:
    network = build_network(small_cnn(), seed=0)
    average = Average(network, 0.9)
    own = snapshot(build_network(small_cnn(), seed=1))
    assign_tensors(network, own)
    with average.inside(network):
        assert all(torch.equal(t, average.tensors[name]) for name, t in floating_tensors(network).items())
    assert all(torch.equal(t, own[name]) for name, t in floating_tensors(network).items())


def test_values_of_another_network_are_refused() -> None:
    network = build_network(small_cnn(), seed=0)
    with pytest.raises(KeyError, match="batch_norm1"):
        assign_tensors(network, snapshot(build_network(small_cnn(norm=False), seed=0)))
    with pytest.raises(RuntimeError, match=r"conv1.weight has shape \(5, 1, 3, 3\), the network \(4, 1, 3, 3\)"):
        assign_tensors(network, snapshot(build_network(small_cnn(channels=5), seed=0)))
