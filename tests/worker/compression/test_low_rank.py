"""Trained layers become products: exact where they can be, the best there is, the same function in every geometry."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from app.compression.factorization import low_rank_layers
from app.errors import BudgetMissed, Diverged
from app.network.cost import cost
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.spec.low_rank import LowRank, Separable
from tests.support.jobs.specs import graph_of, preset_graph
from tests.support.jobs.tiny import SHAPE, task_of, tiny_data, tiny_layers, tiny_spec, train_alone
from worker.compression.low_rank import (
    Factors,
    factorized,
    loss_note,
    matrix_of,
    replace_trained_layers,
    separated,
    spectra_of,
)
from worker.journal import MemoryJournal, Progress, Wish
from worker.network import Network, build_network
from worker.pipeline import Delivered, run

RETRAIN = {"epochs": 1}


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def squares(tensor: Tensor) -> float:
    return float(tensor.square().sum())


# --- decompositions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 24, 9), (40, 16, 5), (17, 17, 27)])
def test_products_of_full_rank_are_the_weight(shape: tuple[int, int, int]) -> None:
    weight_OIK = weights(*shape)
    outputs, inputs, _ = shape
    # a product of two full ranks is the layer itself; a weight that has no higher ones is taken apart on both sides
    low_OIK = torch.einsum("os,srk,ri->oik", weights(outputs, 11), weights(11, 9, shape[2], seed=1), weights(9, inputs))
    for matrix, ranks in ((weight_OIK[:, :, :1], (min(outputs, inputs),)), (low_OIK, (9, 11)), (low_OIK, (9, outputs))):
        factors = factorized(matrix, ranks)
        assert float((factors.product() - matrix).abs().max() / matrix.abs().max()) < 1e-10
        rounded = Factors(*(None if factor is None else factor.float().double() for factor in factors))
        assert 1e-10 < float((rounded.product() - matrix).abs().max() / matrix.abs().max()) < 1e-5


def test_the_error_of_a_matrix_is_that_of_the_singular_values_it_drops() -> None:
    weight_OIK = weights(20, 30, 1)
    values = torch.linalg.svdvals(weight_OIK[:, :, 0])
    for rank in (1, 8, 19):
        factors = factorized(weight_OIK, (rank,))
        assert squares(weight_OIK - factors.product()) == pytest.approx(squares(values[rank:]), rel=1e-9)
        first, second = factors.layers()
        assert squares(first) == pytest.approx(squares(second))  # the root of the values on both sides


def test_the_error_falls_with_every_rank_and_hooi_does_not_exceed_what_was_foreseen() -> None:
    network = build_network(graph_of([conv(24, 3, name="a"), *HEAD], (20, 6, 6)), seed=0)
    layer = low_rank_layers(network.graph)[0]["a"]
    weight_OIK = matrix_of(layer, network.get_parameter("a.weight"))
    foreseen = spectra_of(network, LowRank(energy=0.5))["a"]
    assert foreseen.shape == (21, 25)
    assert foreseen[0, 0] == 1
    assert foreseen[-1, -1] == pytest.approx(0, abs=1e-12)
    whole = squares(weight_OIK)
    errors = {
        ranks: squares(weight_OIK - factorized(weight_OIK, ranks).product()) / whole
        for ranks in itertools.product((4, 8, 16, 20), (4, 8, 16, 24))
    }
    for (before, behind), error in errors.items():
        assert error <= foreseen[before, behind] + 1e-12
        if before == 20 or behind == 24:
            assert error == pytest.approx(foreseen[before, behind], abs=1e-12)
        for other in ((before * 2, behind), (before, behind * 2)):
            assert errors.get(other, 0.0) <= error + 1e-12
    one_sweep = squares(weight_OIK - factorized(weight_OIK, (8, 8), sweeps=1).product()) / whole
    assert errors[8, 8] < one_sweep < foreseen[8, 8]


def test_a_separable_convolution_drops_all_but_the_first_singular_value_of_each_input() -> None:
    weight_OIK = weights(24, 18, 9)
    weight_OIK[:, 5] = 0
    factors = separated(weight_OIK)
    dropped = sum(squares(torch.linalg.svdvals(weight_OIK[:, i])[1:]) for i in range(18))
    assert squares(weight_OIK - factors.product()) == pytest.approx(dropped, rel=1e-9)
    depthwise, pointwise = factors.layers()
    assert (depthwise.shape, pointwise.shape) == ((18, 1, 9), (24, 18, 1))
    assert float(pointwise[:, 5].abs().max()) == 0
    assert squares(depthwise[5]) == pytest.approx(1)  # or nothing of it could be learnt again
    exact = depthwise[None, :, 0] * pointwise
    assert float((separated(exact).product() - exact).abs().max()) < 1e-10


# --- networks ---------------------------------------------------------------------------------------------------------

HEAD: list[dict[str, Any]] = [{"type": "global_avg_pool"}, {"type": "flatten"}, {"type": "linear", "out_features": 3}]


def conv(channels: int, kernel: Any, **more: Any) -> dict[str, Any]:
    return {"type": "conv", "out_channels": channels, "kernel_size": kernel, **more}


def transposed(channels: int, kernel: Any, **more: Any) -> dict[str, Any]:
    return {"type": "conv_transpose", "out_channels": channels, "kernel_size": kernel, **more}


GEOMETRIES: dict[str, tuple[tuple[int, ...], list[dict[str, Any]]]] = {
    "padding": ((16, 7, 7), [conv(18, 3, padding=1, name="a")]),
    "stride and dilation": ((18, 11, 12), [conv(20, [3, 5], stride=[2, 1], padding=[4, 1], dilation=2, name="a")]),
    "same, without bias": ((16, 8, 8), [conv(24, 5, padding="same", bias=False, name="a")]),
    "1-D": ((24, 30), [conv(16, 9, stride=3, padding=4, name="a")]),
    "3-D": ((16, 5, 6, 4), [conv(16, [3, 2, 1], padding=[1, 0, 1], name="a")]),
    "1 x 1": ((20, 7, 7), [conv(30, 1, stride=2, padding=1, name="a")]),
    "transposed": ((16, 5, 4), [transposed(24, [4, 3], stride=2, padding=1, output_padding=1, name="a")]),
    "linear": ((2, 4, 5), [{"type": "flatten"}, {"type": "linear", "out_features": 30, "name": "a"}]),
    "shared": (
        (16, 8, 8),
        [conv(16, 3, padding=1, name="a"), {"type": "relu"}, {"type": "conv", "shares": "a"}, {"type": "relu"}],
    ),
}


def network_of(geometry: str) -> Network:
    """In float64, with biases that are not zero, and a layer `a` whose weight has the ranks 9 and 10."""
    shape, layers = GEOMETRIES[geometry]
    network = build_network(graph_of([*layers, *(HEAD[2:] if geometry == "linear" else HEAD)], shape), seed=1).double()
    layer = low_rank_layers(network.graph)[0]["a"]
    (inputs, outputs), positions = layer.channels, layer.positions
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(3))
        weight = network.get_parameter("a.weight")
        low = torch.einsum(
            "os,srk,ri->oik", weights(outputs, 10), weights(10, 9, positions, seed=1), weights(9, inputs)
        )
        turned = low.transpose(0, 1) if geometry == "transposed" else low
        weight.copy_(turned.reshape(weight.shape) / 30)
    return network.eval()


def logits(network: nn.Module, graph_network: Network) -> Tensor:
    images = weights(3, *graph_network.graph.input_shape, seed=5)
    with torch.no_grad():
        found: Tensor = network.eval()(images)
    return found


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_network_whose_ranks_suffice_computes_the_same_from_fewer_weights(geometry: str) -> None:
    network = network_of(geometry)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    step = LowRank(energy=1 - 1e-9, round_to=1)
    smaller, outcomes = replace_trained_layers(network, step, baseline=cost(network.graph))
    assert smaller is not network
    assert cost(smaller.graph).macs < cost(network.graph).macs
    assert cost(smaller.graph).params < cost(network.graph).params
    assert outcomes["a"]["relative_error"] < 1e-10
    assert float((logits(smaller, network) - logits(network, network)).abs().max()) < 1e-10
    assert {name: tuple(t.shape) for name, t in smaller.state_dict().items() if "num_batches" not in name} == {
        name: tensor.shape for name, tensor in smaller.graph.tensors().items()
    }
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    storages = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    assert all(parameter.untyped_storage().data_ptr() not in storages for parameter in smaller.parameters())
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in smaller.parameters())


@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES if name not in ("1 x 1", "transposed", "linear")])
def test_a_network_of_one_kernel_an_input_computes_the_same_when_it_is_separated(geometry: str) -> None:
    network = network_of(geometry)
    weight = network.get_parameter("a.weight")
    with torch.no_grad():
        outer = torch.einsum("oi,ik->oik", weights(*weight.shape[:2]), weights(weight.shape[1], weight[0, 0].numel()))
        weight.copy_(outer.reshape(weight.shape) / 10)
    smaller, outcomes = replace_trained_layers(network, Separable(), baseline=cost(network.graph))
    assert outcomes["a"]["parts"] == ["a_depthwise", "a"]
    assert cost(smaller.graph).macs < cost(network.graph).macs
    assert float((logits(smaller, network) - logits(network, network)).abs().max()) < 1e-10


def test_every_layer_keeps_the_energy_that_was_asked_for() -> None:
    network = build_network(preset_graph("resnet20"), seed=0)
    with torch.no_grad():  # weights that fall off, as trained ones do
        for parameter in network.parameters():
            if parameter.ndim == 4:
                left, values, right = torch.linalg.svd(parameter.flatten(1), full_matrices=False)
                parameter.copy_(((left * values.square()) @ right).reshape(parameter.shape))
    smaller, outcomes = replace_trained_layers(network, LowRank(energy=0.9, round_to=1), baseline=cost(network.graph))
    errors = [outcome["relative_error"] ** 2 for outcome in outcomes.values() if "parts" in outcome]
    assert len(errors) > 10
    assert 0.02 < max(errors) <= 0.1
    assert cost(smaller.graph).macs < 0.9 * cost(network.graph).macs
    assert {name for name, outcome in outcomes.items() if "reason" in outcome} >= {"conv1", "linear1"}


def test_a_budget_is_met_on_trained_weights_and_an_impossible_one_fails() -> None:
    network = build_network(preset_graph("deep_cnn"), seed=0)
    dense = cost(network.graph)
    smaller, outcomes = replace_trained_layers(
        network, LowRank.model_validate({"budget": {"macs": 0.4}}), baseline=dense
    )
    assert 0.37 * dense.macs < cost(smaller.graph).macs <= 0.4 * dense.macs
    assert outcomes["conv1"] == {"reason": "3 input channels, fewer than 16"}
    with pytest.raises(BudgetMissed, match="conv1 has"):
        replace_trained_layers(network, LowRank.model_validate({"budget": {"macs": 0.05}}), baseline=dense)


def test_weights_that_are_zero_or_no_numbers_are_told_apart() -> None:
    network = build_network(graph_of([conv(32, 3, name="a"), *HEAD], (16, 6, 6)), seed=0)
    with torch.no_grad():
        network.get_parameter("a.weight").zero_()
    smaller, outcomes = replace_trained_layers(network, LowRank(energy=0.9), baseline=cost(network.graph))
    assert outcomes["a"]["relative_error"] == 0
    assert smaller.graph["a_core"].shape[0] == 8
    with torch.no_grad():
        network.get_parameter("a.weight")[0] = float("nan")
    with pytest.raises(Diverged, match=r"a\.weight"):
        replace_trained_layers(network, LowRank(rank=8), baseline=cost(network.graph))


def test_a_network_that_no_rank_makes_cheaper_is_given_back() -> None:
    network = build_network(graph_of([conv(32, 3, name="a"), *HEAD], (16, 6, 6)), seed=0)
    same, outcomes = replace_trained_layers(network, LowRank(energy=0.999), baseline=cost(network.graph))
    assert same is network
    assert outcomes["a"] == {"reason": "the ranks that keep 0.999 of its energy cost no less"}


def test_a_loss_of_more_than_a_point_is_said_with_the_layers_it_comes_from() -> None:
    outcomes: dict[str, dict[str, Any]] = {
        "a": {"parts": ["a_reduce", "a"], "relative_error": 0.25},
        "b": {"parts": ["b_reduce", "b"], "relative_error": 0.5},
        "c": {"reason": "excluded"},
    }
    assert loss_note("low_rank", {"accuracy": 0.9}, {"accuracy": 0.891}, outcomes) is None
    sentence = loss_note("low_rank", {"accuracy": 0.9}, {"accuracy": 0.85}, outcomes)
    assert sentence is not None
    assert sentence.startswith("low_rank cost 5.0 points of accuracy: before retraining, its products differ from the")
    assert "by b 50%, a 25% of their norm" in sentence
    assert "Larger ranks, more epochs of retraining" in sentence


# --- whole jobs -------------------------------------------------------------------------------------------------------

WIDE = {"input_shape": list(SHAPE), "layers": tiny_layers(channels=24)}
HALF = {"type": "low_rank", "budget": {"macs": 0.5}, "retrain": RETRAIN}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


def test_a_job_delivers_a_network_of_products_that_goes_on_to_channels_and_zeros(data: Path, tmp_path: Path) -> None:
    channels = {"type": "prune", "budget": {"macs": 0.3}, "round_to": 1, "retrain": {"policy": "none"}}
    zeros = {"type": "prune", "sparsity": 0.5, "retrain": {"policy": "none"}}
    spec = tiny_spec(HALF, channels, zeros, model=WIDE, exports=["safetensors", "onnx", "pytorch"])
    journal = MemoryJournal()
    outcome = run(task_of(spec, data, tmp_path), journal)
    assert isinstance(outcome, Delivered)
    low, narrow, masked = outcome.report["steps"]
    dense = outcome.summary["baseline"]["macs"]
    assert low["before"]["macs"] == dense
    assert low["after"]["macs"] <= 0.5 * dense < low["before"]["macs"]
    assert narrow["after"]["macs"] <= 0.3 * dense
    assert low["complete"]
    assert low["after_cut"] is not None
    rows = {row["name"]: row for row in low["layers"]}
    assert list(rows) == ["conv1", "conv2", "linear1"]
    assert rows["conv1"]["reason"] == "1 input channel, fewer than 16"
    parts = [part["name"] for part in rows["conv2"]["parts"]]
    assert parts[-1] == "conv2"
    assert 0 < rows["conv2"]["relative_error"] < 1
    assert {row["name"] for row in narrow["layers"]} >= set(parts)
    assert {row["name"] for row in masked["layers"]} >= set(parts)
    files = {artifact.name: artifact.path for artifact in outcome.artifacts}
    assert {"model.py", "pruned.onnx", "architecture.json"} <= files.keys()
    document = json.loads(files["architecture.json"].read_text())
    graph = build_graph(read_layers(document["layers"]), tuple(document["input_shape"]))
    assert cost(graph).macs == outcome.summary["final"]["macs"]
    tensors = load_file(files["pruned.safetensors"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in graph.tensors().items()
    }
    (applied, *_) = journal.of_type("prune.applied")
    assert applied.message.startswith("low_rank applied: ")
    again = tiny_spec(
        {"type": "prune", "sparsity": 0.5, "retrain": RETRAIN},
        model={"input_shape": list(SHAPE), "layers": document["layers"]},
        training={"epochs": 1},
    )
    assert train_alone(task_of(again, data, tmp_path), MemoryJournal()).network.graph == graph


def test_what_stands_in_the_place_of_a_frozen_layer_trains(data: Path, tmp_path: Path) -> None:
    spec = tiny_spec(
        {"type": "separable", "retrain": RETRAIN}, model=WIDE, training={"epochs": 1, "frozen": ["conv1", "conv2"]}
    )
    reached = train_alone(task_of(spec, data, tmp_path), MemoryJournal())
    start = build_network(build_graph(read_layers(tiny_layers(channels=24)), SHAPE), seed=0)
    dense = {name: tensor for name, tensor in reached.kept["baseline"].items() if name.startswith("conv")}
    assert torch.equal(dense["conv2.weight"], start.get_parameter("conv2.weight"))
    assert torch.equal(reached.network.get_parameter("conv1.weight"), dense["conv1.weight"])
    untrained = separated(dense["conv2.weight"].double().flatten(2)).layers()
    for name, first in zip(("conv2_depthwise", "conv2"), untrained, strict=True):
        now = reached.network.get_parameter(f"{name}.weight").detach().double().flatten(2)
        assert float((now - first).abs().max()) > 1e-4


class StopIn:
    """Wishes to stop from the first moment of a phase on."""

    def __init__(self, phase: str) -> None:
        self._phase = phase

    def __call__(self, progress: Progress | None) -> Wish | None:
        """The wish at this place."""
        return "stop" if progress is not None and progress.phase == self._phase else None


def test_a_job_stopped_while_it_retrains_keeps_its_products(data: Path, tmp_path: Path) -> None:
    spec = tiny_spec(HALF | {"retrain": {"epochs": 5}}, {"type": "prune", "sparsity": 0.5}, model=WIDE)
    outcome = run(task_of(spec, data, tmp_path), MemoryJournal(wishes=StopIn("retraining")))
    assert isinstance(outcome, Delivered)
    assert outcome.stopped_early
    low, zeros = outcome.report["steps"]
    assert (low["applied"], low["complete"]) == (True, False)
    assert not zeros["applied"]
    assert low["after"]["macs"] == outcome.summary["final"]["macs"] < outcome.summary["baseline"]["macs"]
    assert any("parts" in row for row in low["layers"])


def test_a_step_that_replaces_nothing_says_so(data: Path, tmp_path: Path) -> None:
    step = {"type": "low_rank", "energy": 0.999, "retrain": {"policy": "none"}}
    reached = train_alone(task_of(tiny_spec(step, model=WIDE), data, tmp_path), MemoryJournal())
    assert reached.network.graph == build_graph(read_layers(tiny_layers(channels=24)), SHAPE)
    assert "/optimizations/0: no layer was replaced; the rows of its layers say why" in reached.record.notes
    (record,) = reached.record.steps
    assert [("reason" in row) for row in record.layers] == [True, True, True]
    assert record.after is not None
    assert record.after["accuracy"] == pytest.approx(record.before["accuracy"], abs=0.1)
    assert np.isfinite(record.after["loss"])
