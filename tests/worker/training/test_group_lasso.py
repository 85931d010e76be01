"""Group lasso against its formula, class by class."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from app.pruning.channel_classes import channel_classes
from app.spec.optimizations import Regularization
from tests.support.networks.topologies import TOPOLOGIES, topology, trained
from worker.network import Network
from worker.training.group_lasso import GroupLasso
from worker.training.losses import Penalty

WEIGHTS = ("conv", "conv_transpose", "linear", "batch_norm", "group_norm", "layer_norm")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def slices(network: Network, channel_class: int) -> list[torch.Tensor]:
    """Every weight slice that leaves with a class, found position by position."""
    classes, parameters = channel_classes(network.graph), dict(network.named_parameters())
    return [
        parameters[f"{layer}.{tensor}"].detach().select(axis, index).flatten()
        for layer, tensor, axis, index in classes.members(channel_class)
        if tensor == "weight" and network.graph[layer].type in WEIGHTS
    ]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_term_is_the_sum_of_the_weighted_norms_of_all_classes_that_may_leave(name: str) -> None:
    network = trained(topology(name))
    classes = channel_classes(network.graph)
    wanted = 0.0
    for c in classes.all().tolist():
        if c not in classes.pins:
            joined = torch.cat(slices(network, c)).double()
            wanted += math.sqrt(joined.numel()) * float(joined.norm())
    assert float(GroupLasso(network).value().detach()) == pytest.approx(wanted, rel=1e-5)


def test_a_class_of_zeros_has_a_gradient_of_zero_and_no_nan() -> None:
    network = trained(topology("residual"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    GroupLasso(network).value().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients
    assert all(bool((gradient == 0).all()) for gradient in gradients)


def test_descent_on_the_term_alone_brings_whole_channels_down_together() -> None:
    network = trained(topology("residual"))
    penalty = Penalty(network, (Regularization(group_lasso=0.01),))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    terms = []
    for _ in range(30):
        optimizer.zero_grad()
        (term,) = penalty.terms().values()
        terms.append(float(term.detach()))
        term.backward()
        optimizer.step()
    assert terms[-1] < 0.9 * terms[0]
    assert all(later < earlier for earlier, later in pairwise(terms))
