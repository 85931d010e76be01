"""Gates on classes of channels: exact at 0 and 1, within the budget at every step, and shut first where nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.network.cost import FLOAT_BYTES, cost
from app.network.graph import Graph
from app.pruning.budget import BudgetUnreachable, choose_removals
from app.pruning.channel_classes import Classes, channel_classes, shrink_graph
from app.spec.job import Training
from app.spec.prune import Prune
from tests.support.jobs.blobs import BlobBatches, graph_of
from tests.support.jobs.tiny import resume_folder, task_of, tiny_data, tiny_spec
from tests.support.networks.dags import random_drop, random_graph
from tests.support.networks.known import network_named
from tests.support.networks.topologies import TOPOLOGIES, pictures, trained
from tests.support.networks.traps import TRAPS
from worker.journal import MemoryJournal, Progress, Wish
from worker.network import Network, build_network, snapshot
from worker.pipeline import Cancelled, Delivered, Paused, run
from worker.precision import choose_precision
from worker.pruning.importance import channel_scores
from worker.pruning.learned_gates import GatedCost, GatedNetwork, learned_gates
from worker.pruning.surgery import masked_reference

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

EXACT = 1e-10
PRECISION = choose_precision(Training(), "cpu", spatial_axes=2)
LEARNED = {"type": "prune", "scope": "learned", "retrain": {"policy": "none"}}


def gates_without(classes: Classes, dropped: Any) -> Tensor:
    """By class number: 0 for the dropped, else 1."""
    gates_C = torch.ones(classes.slot_count, dtype=torch.float64)
    gates_C[list(dropped)] = 0.0
    return gates_C


# --- the cost --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1_000_000), share=st.floats(0, 1))
def test_the_cost_of_gates_of_0_and_1_is_what_the_smaller_network_costs(seed: int, share: float) -> None:
    graph = random_graph(seed)
    classes = channel_classes(graph)
    dropped = random_drop(classes, share, seed)
    smaller, gates_C = shrink_graph(graph, dropped, classes), gates_without(classes, dropped)
    found = {measure: float(GatedCost(graph, classes, measure)(gates_C)) for measure in ("macs", "params", "bytes")}
    stored = sum(int(np.prod(tensor.shape)) for tensor in smaller.tensors().values())
    assert found["macs"] == cost(smaller).macs
    assert found["params"] == cost(smaller).params
    assert found["bytes"] == FLOAT_BYTES * stored


@pytest.mark.parametrize("name", ["residual", "depthwise", "dense"])
def test_the_derivative_of_the_cost_is_that_of_the_products(name: str) -> None:
    graph = network_named(name)
    classes = channel_classes(graph)
    cost_of = GatedCost(graph, classes, "macs")
    gates_C = torch.rand(classes.slot_count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(cost_of, (gates_C.requires_grad_(),))


# --- the forward pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TOPOLOGIES, *TRAPS])
def test_gates_of_0_and_1_give_the_masked_network(name: str) -> None:
    check_masked(network_named(name), 0.5, 1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1_000_000), share=st.floats(0, 1))
def test_gates_of_0_and_1_give_the_masked_network_whatever_its_layers(seed: int, share: float) -> None:
    check_masked(random_graph(seed), share, seed)


@torch.no_grad()
def check_masked(graph: Graph, share: float, seed: int) -> None:
    """The gated network computes what the masked one does, and leaves the network's own weights as they are."""
    network, classes = trained(graph, seed).double(), channel_classes(graph)
    before = snapshot(network)
    dropped = random_drop(classes, share, seed)
    images_NCx = torch.from_numpy(pictures(graph, 3)).double()
    expected_NK = masked_reference(network, classes, dropped)(images_NCx)
    found_NK = GatedNetwork(network, classes)(images_NCx, gates_without(classes, dropped))
    assert float((found_NK - expected_NK).abs().max()) <= EXACT * (1 + float(expected_NK.abs().max()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(network).items())


# --- what is learned -------------------------------------------------------------------------------------------------


def plain() -> Iterator[tuple[Tensor, Tensor]]:
    """Blobs in equal batches, in the same order at each call."""
    return BlobBatches(96, batch_size=32).epoch(0)


def learnt(widths: tuple[int, ...] = (8, 8, 8), *, epochs: int = 6, rate: float = 0.05) -> Network:
    """A network of convolutions of these widths that tells blobs apart, in training mode."""
    layers: list[dict[str, Any]] = []
    for width in widths:
        layers += [{"type": "conv", "out_channels": width, "kernel_size": 3, "padding": 1}, {"type": "batch_norm"}]
        layers += [{"type": "relu"}]
    layers += [{"type": "flatten"}, {"type": "linear", "out_features": 3}]
    network = build_network(graph_of(layers), seed=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    for epoch in range(epochs):
        for images_NCHW, labels_N in BlobBatches(96, batch_size=16).epoch(epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images_NCHW), labels_N).backward()
            optimizer.step()
    return network


def step_of(**fields: Any) -> Prune:
    """A prune step whose gates are learned."""
    return Prune.model_validate({"type": "prune", "scope": "learned", "round_to": 1, **fields})


def gates_of(network: Network, step: Prune, **options: Any) -> dict[int, float]:
    """The gates that are learned from blobs within the budget of `step`."""
    classes = channel_classes(network.graph)
    scores = channel_scores(network, classes, "l2", seed=0)
    assert step.budget is not None
    assert step.budget.cost_measure is not None
    allowed = step.budget.allowed(cost(network.graph).of(step.budget.cost_measure))
    given: dict[str, Any] = {"allowed": allowed, "images": 960, "start": network.graph}
    return learned_gates(network, classes, step, scores, plain, PRECISION, **given | options)


@pytest.mark.parametrize("measure", ["macs", "params", "bytes"])
@pytest.mark.parametrize("kept", [0.6, 0.2])
def test_the_gates_land_on_the_budget_and_are_nearly_0_or_1(measure: str, kept: float) -> None:
    network = learnt()
    step = step_of(budget={measure: kept})
    gates = gates_of(network, step)
    classes = channel_classes(network.graph)
    assert gates.keys() == set(classes.all().tolist())
    free = [gate for c, gate in gates.items() if c not in classes.pins]
    assert all(0 <= gate <= 1 for gate in free)
    assert sum(0.05 < gate < 0.95 for gate in free) <= len(free) // 3
    dense = cost(network.graph)
    removals = choose_removals(network.graph, classes, gates, step)
    reached, allowed = removals.cost.of(step.budget.measure), kept * dense.of(step.budget.measure)  # type: ignore[union-attr,arg-type]
    assert 0.8 * allowed <= reached <= allowed
    open_C = torch.ones(classes.slot_count, dtype=torch.float64)
    for c, gate in gates.items():
        open_C[c] = gate
    header = dense.bytes - FLOAT_BYTES * sum(int(np.prod(t.shape)) for t in network.graph.tensors().values())
    spent = float(GatedCost(network.graph, classes, step.budget.measure)(open_C))  # type: ignore[union-attr,arg-type]
    assert spent == pytest.approx(allowed, rel=1e-3, abs=header if measure == "bytes" else 0)


def test_the_same_network_and_images_give_the_same_bits_and_the_network_stays_as_it_is() -> None:
    network = learnt()
    network.get_submodule("batch_norm2").eval()
    before = snapshot(network)
    modes = [module.training for module in network.modules()]
    step = step_of(budget={"macs": 0.4})
    assert gates_of(network, step) == gates_of(network, step)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(network).items())
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None or parameter.requires_grad for parameter in network.parameters())


def test_channels_that_do_nothing_are_closed_first_whatever_their_scores_are() -> None:
    network = learnt(epochs=1, rate=0.005)  # it still errs: gates learn from a loss
    norm, conv = network.get_submodule("batch_norm2"), network.get_submodule("conv2")
    assert isinstance(norm, torch.nn.BatchNorm2d)
    assert isinstance(conv, torch.nn.Conv2d)
    with torch.no_grad():  # half of the second layer's channels are dead, with the largest weights of all
        norm.weight[:4], norm.bias[:4] = 0.0, -1.0
        conv.weight[:4] *= 100.0
    classes = channel_classes(network.graph)
    (second,) = [group.classes.tolist() for group in classes.groups if classes.layers_of(group) == ("conv2",)]
    gates = gates_of(network, step_of(budget={"macs": 0.7}))
    dead, alive = [sorted(gates[c] for c in half) for half in (second[:4], second[4:])]
    assert dead[2] < 0.5 < alive[0]  # one stays: the floor keeps that of the largest score


def test_a_stage_closes_its_own_part_of_what_an_override_takes() -> None:
    network = learnt((8, 16, 8))
    step = step_of(budget={"macs": 0.3}, overrides={"conv2": {"sparsity": 0.75}})
    classes = channel_classes(network.graph)
    (group,) = (group for group in classes.groups[1:] if classes.layers_of(group)[0] == "conv2")
    for fraction, closed in ((0.5, 8), (1.0, 12)):  # a half of the way to a quarter of the channels is a half of them
        gates = gates_of(network, step, fraction=fraction)
        assert sum(gates[c] == 0.0 for c in group.classes.tolist()) == closed


def test_floors_and_overrides_hold() -> None:
    network = learnt((8, 16, 8))
    step = step_of(
        budget={"macs": 0.5},
        exclude=("conv1",),
        min_channels=3,
        overrides={"conv3": {"sparsity": 0.5}},
    )
    gates = gates_of(network, step)
    classes = channel_classes(network.graph)
    by_layer = {classes.layers_of(g)[0]: [gates[c] for c in g.classes.tolist()] for g in classes.groups[1:]}
    assert by_layer["conv1"] == [1.0] * 8
    assert sorted(by_layer["conv3"]) == [0.0] * 4 + [1.0] * 4
    assert sum(gate == 1.0 for gate in by_layer["conv2"]) >= 3
    removals = choose_removals(network.graph, classes, gates, step)
    smaller = shrink_graph(network.graph, removals.dropped, classes)
    assert smaller["conv1"].shape[0] == 8
    assert smaller["conv3"].shape[0] == 4


def test_a_budget_below_the_floors_is_refused_before_anything_is_learned() -> None:
    def never() -> None:
        raise AssertionError("a step was taken")

    with pytest.raises(BudgetUnreachable):
        gates_of(learnt(), step_of(budget={"macs": 0.01}, min_channels=6), look=never)


def test_one_epoch_is_the_most_that_it_costs() -> None:
    looks: list[int] = []
    gates_of(learnt(), step_of(budget={"macs": 0.5}), images=48, look=lambda: looks.append(1))
    assert len(looks) == 48 // 16


# --- jobs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set of tiny jobs."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_job_meets_its_budget_by_learned_gates(data: Path, tmp_path: Path, steps: int) -> None:
    rounds = {"schedule": {"name": "iterative", "steps": steps}, "retrain": {"epochs": 2}} if steps > 1 else {}
    outcome = run(task_of(tiny_spec(LEARNED | {"budget": {"params": 0.5}} | rounds), data, tmp_path), MemoryJournal())
    assert isinstance(outcome, Delivered)
    final, baseline = outcome.report["final"], outcome.report["baseline"]
    assert 0.4 * baseline["params"] < final["params"] <= 0.5 * baseline["params"]


class AtALook:
    """Wishes for something at the n-th question in phase pruning."""

    def __init__(self, wish: Wish, turn: int) -> None:
        self.wish: Wish = wish
        self.turns = turn

    def __call__(self, progress: Progress | None) -> Wish | None:
        if progress is None or progress.phase != "pruning":
            return None
        self.turns -= 1
        return self.wish if self.turns < 0 else None


STEP = LEARNED | {"budget": {"macs": 0.5}}


def test_a_job_is_cancelled_while_gates_are_learned(data: Path, tmp_path: Path) -> None:
    journal = MemoryJournal(wishes=AtALook("cancel", 3))
    assert isinstance(run(task_of(tiny_spec(STEP), data, tmp_path), journal), Cancelled)
    assert journal.of_type("prune.planned")
    assert not journal.of_type("prune.applied")


def test_a_job_paused_while_gates_are_learned_ends_as_if_it_had_not_been(data: Path, tmp_path: Path) -> None:
    whole = run(task_of(tiny_spec(STEP), data, tmp_path), MemoryJournal())
    journal = MemoryJournal(wishes=AtALook("pause", 3))
    assert isinstance(run(task_of(tiny_spec(STEP), data, tmp_path), journal), Paused)
    assert journal.of_type("prune.planned")
    resume = resume_folder(journal.checkpoints[-1], tmp_path / "resume")
    again = run(task_of(tiny_spec(STEP), data, tmp_path, resume=resume), MemoryJournal())
    assert isinstance(whole, Delivered)
    assert isinstance(again, Delivered)
    assert len(again.report["steps"][0]["rounds"]) == 1
    digests = [
        {a.name: a.path.read_bytes() for a in o.artifacts if a.name == "pruned.safetensors"} for o in (whole, again)
    ]
    assert digests[0] == digests[1]


def test_a_job_stopped_while_gates_are_learned_delivers_the_trained_network(data: Path, tmp_path: Path) -> None:
    journal = MemoryJournal(wishes=AtALook("stop", 3))
    outcome = run(task_of(tiny_spec(STEP), data, tmp_path), journal)
    assert isinstance(outcome, Delivered)
    assert outcome.stopped_early
    assert journal.of_type("prune.planned")
    assert not outcome.report["steps"][0]["applied"]
    assert outcome.report["final"]["macs"] == outcome.report["baseline"]["macs"]
