"""One layer at two places: one module, one tensor, one mask; every use counts in gradients, scores and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from app.network.architecture import Preprocessing, read_architecture
from app.network.cost import cost
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.pruning.channel_classes import channel_classes
from app.spec.optimizations import Regularization
from app.spec.prune import Prune
from tests.support.jobs.tiny import SHAPE, task_of, tiny_data, tiny_spec
from tests.support.networks.topologies import HEAD, PICTURE, Layers, conv, layer, pictures, topology, trained
from worker.export.files import export_network, portable_tensors
from worker.export.onnx_model import onnx_bytes
from worker.export.pytorch_source import model_source
from worker.journal import MemoryJournal
from worker.network import Network, build_network, calls_of
from worker.pipeline import Delivered, run
from worker.pruning.importance import channel_scores
from worker.pruning.weight_masks import weight_masks
from worker.run.removal import layer_rows
from worker.training.freezing import freeze
from worker.training.losses import Penalty

PREPROCESSING = Preprocessing(1.0, (0.0,) * 3, (1.0,) * 3)
NORMED: Layers = [
    *[conv(4, name="s"), layer("tanh"), conv(4, name="a", bias=False), layer("batch_norm", name="one"), layer("relu")],
    *[layer("conv", shares="a", name="b"), layer("batch_norm", name="two"), layer("sigmoid"), *HEAD],
]
BARE: Layers = [*[entry for entry in NORMED if entry.get("name") != "two"]]


def network_of(layers: Layers, seed: int = 0) -> Network:
    return trained(build_graph(read_layers(layers), PICTURE), seed)


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, *PICTURE, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (count,), generator=generator)


def with_copies(network: Network) -> Network:
    """The same function with a layer of its own at each place."""
    graph = network.graph
    own = {node.name: node.layer.model_copy(update={"shares": None}) for node in graph.nodes if node.shares}
    twin = build_network(graph.replace(own)).to(next(network.parameters()).dtype)
    state = network.state_dict()
    for node in graph.nodes:
        state |= {f"{node.name}.{key}": state[f"{node.home}.{key}"] for key in node.uses}
    twin.load_state_dict(state)
    return twin.train(network.training)


# --- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared", "shared in residuals", "one head for two branches"])
def test_each_place_computes_what_a_layer_of_its_own_with_equal_weights_does(name: str) -> None:
    network = trained(topology(name))
    twin = with_copies(network)
    images = torch.from_numpy(pictures(network.graph, 4))
    with torch.no_grad():
        assert torch.equal(network(images), twin(images))
    assert [key for key, _ in network.named_parameters()] == [
        key for key, tensor in network.graph.tensors().items() if tensor.trainable
    ]
    assert len(twin.state_dict()) > len(network.state_dict())


def test_the_gradient_of_a_shared_weight_is_the_sum_over_its_places() -> None:
    network = network_of(NORMED).double()
    twin = with_copies(network)
    images, labels = batch()
    for each in (network, twin):
        cross_entropy(each(images), labels).backward()
    found = network.get_parameter("a.weight").grad
    total = twin.get_parameter("a.weight").grad + twin.get_parameter("b.weight").grad  # type: ignore[operator]
    torch.testing.assert_close(found, total, rtol=1e-12, atol=1e-14)


def test_the_calls_name_the_places_of_a_module_in_the_order_in_which_they_run() -> None:
    network = network_of(NORMED)
    assert calls_of(network, "a") == ("a", "b")
    assert calls_of(network, "one") == ("one",)
    assert "b" not in dict(network.named_children())


def test_a_shared_layer_is_frozen_and_penalised_once() -> None:
    network = network_of(NORMED)
    weights = [network.get_parameter(f"{name}.weight") for name in ("s", "a", "linear1")]
    term = Penalty(network, [Regularization(l1=1.0)]).terms()["l1"]
    torch.testing.assert_close(term, torch.stack([weight.abs().sum() for weight in weights]).sum())
    freeze(network, ["a"])
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["a.weight"]


# --- scores ----------------------------------------------------------------------------------------------------------


def gate_of(network: Network, behind: str, factors: Tensor) -> Any:
    """A hook that multiplies the channels of one node's output, also where its module is called at other places."""
    turns = iter(calls_of(network, network.graph[behind].home))

    def scale(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * factors.view(1, -1, 1, 1) if next(turns) == behind else output

    return network.get_submodule(network.graph[behind].home).register_forward_hook(scale)


def gated(network: Network, class_number: int, places: dict[str, str], gate: float) -> float:
    """The loss with a gate on the channels of one class at each place, behind the node that is named for it."""
    classes = channel_classes(network.graph)
    handles = []
    for place, behind in places.items():
        inside = torch.from_numpy(classes.slots[place].ids == class_number).double()
        handles.append(gate_of(network, behind, 1 + inside * (gate - 1)))
    images, labels = batch()
    with torch.no_grad():
        value = float(cross_entropy(network(images), labels))
    for handle in handles:
        handle.remove()
    return value


@pytest.mark.parametrize("layers", [NORMED, BARE])
def test_taylor_is_the_squared_derivative_by_a_gate_at_every_place(layers: Layers) -> None:
    network = network_of(layers).double()
    classes = channel_classes(network.graph)
    normed = "two" in network.graph
    # "s" and "b" are the two inputs of the convolution, and it reads its own output: all of them are one class
    places = {"s": "s", "a": "one" if normed else "a", "b": "two" if normed else "b"}
    found = channel_scores(network, classes, "taylor", seed=0, batches=[batch()])
    for c in classes.slots["a"].ids.tolist():
        derivative = (gated(network, c, places, 1 + 1e-5) - gated(network, c, places, 1 - 1e-5)) / 2e-5
        assert found[c] == pytest.approx(derivative**2, rel=1e-4, abs=1e-12)


def test_activation_is_the_mean_over_every_place_behind_its_own_norm_and_activation() -> None:
    network = network_of(NORMED).double()
    classes = channel_classes(network.graph)
    answers: dict[str, Tensor] = {}
    for name in ("tanh1", "relu1", "sigmoid1"):
        network.get_submodule(name).register_forward_hook(
            lambda m, i, output, name=name: answers.update({name: output})
        )
    images, _ = batch()
    with torch.no_grad():
        network.eval()(images)
    found = channel_scores(network, classes, "activation", seed=0, batches=[batch()])
    means = [answers[name].abs().mean(dim=(0, 2, 3)) for name in ("tanh1", "relu1", "sigmoid1")]
    wanted = torch.stack(means).mean(0).tolist()
    assert [found[c] for c in classes.slots["a"].ids.tolist()] == pytest.approx(wanted, rel=1e-12)


def test_activation_tells_the_places_of_one_module_apart() -> None:
    """Without a norm the convolution itself is watched, and each place has an activation of its own."""
    layers = [
        conv(4, name="s"),
        conv(6, name="a"),
        layer("relu"),
        conv(4),
        layer("conv", shares="a"),
        layer("tanh"),
        *HEAD,
    ]
    network = network_of(layers).double()
    classes = channel_classes(network.graph)
    answers: dict[str, Tensor] = {}
    for name in ("relu1", "tanh1"):
        network.get_submodule(name).register_forward_hook(
            lambda m, i, output, name=name: answers.update({name: output})
        )
    with torch.no_grad():
        network.eval()(batch()[0])
    found = channel_scores(network, classes, "activation", seed=0, batches=[batch()])
    wanted = torch.stack([answers[name].abs().mean(dim=(0, 2, 3)) for name in answers]).mean(0).tolist()
    assert [found[c] for c in classes.slots["a"].ids.tolist()] == pytest.approx(wanted, rel=1e-12)


# --- masks and rows --------------------------------------------------------------------------------------------------


def test_a_shared_weight_has_one_mask_and_counts_once() -> None:
    network = network_of(NORMED)
    masks = weight_masks(network, Prune(sparsity=0.5), 0.5, seed=0)
    assert set(masks) == {"s.weight", "a.weight", "linear1.weight"}
    assert masks.zeros() == round(0.5 * (4 * 3 * 9 + 4 * 4 * 9 + 3 * 4))
    masks.apply(network)
    rows = {row["name"]: row for row in layer_rows(network, network.graph, Prune(sparsity=0.5))}
    assert sum(row["weights"] for row in rows.values()) == masks.sizes()
    assert sum(row["weights"] - row["nonzero"] for row in rows.values()) == masks.zeros()
    assert rows["b"] | {"shares": "a", "weights": 0, "sparsity": 0.0, "reason": "uses the weights of a"} == rows["b"]
    assert "shares" not in rows["a"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_source_calls_one_module_at_both_places() -> None:
    source = model_source(build_graph(read_layers(NORMED), PICTURE), ("x", "y", "z"), PREPROCESSING)
    assert source.count("self.a = nn.Conv2d(") == 1
    assert source.count("self.a(") == 2
    assert "self.b" not in source


def test_the_onnx_file_has_one_initializer_that_two_operators_read() -> None:
    network = network_of(NORMED)
    data = onnx_bytes(network.graph, {name: tensor.numpy() for name, tensor in portable_tensors(network).items()})
    graph = onnx.load_from_string(data).graph
    assert [entry.name for entry in graph.initializer].count("a.weight") == 1
    assert [node.name for node in graph.node if "a.weight" in node.input] == ["a", "b"]
    # folded into a weight of two places, either batch norm would change the other place
    assert [node.op_type for node in graph.node].count("BatchNormalization") == 2


def test_the_weights_are_stored_once_and_the_architecture_says_who_shares_them(tmp_path: Path) -> None:
    network = network_of(NORMED)
    export_network(network, tmp_path, stem="pruned", class_names=("x", "y", "z"), preprocessing=PREPROCESSING)
    tensors = load_file(tmp_path / "pruned.safetensors")
    assert "a.weight" in tensors
    assert "b.weight" not in tensors
    assert (tmp_path / "pruned.safetensors").stat().st_size == cost(network.graph).bytes
    document = json.loads((tmp_path / "architecture.json").read_text())
    assert [(entry["name"], entry["shares"]) for entry in document["layers"] if "shares" in entry] == [("b", "a")]
    graph, _, _ = read_architecture(document)
    assert graph == network.graph
    again = build_network(graph).eval()
    again.load_state_dict(tensors, strict=False)
    images = torch.from_numpy(pictures(graph, 3))
    assert torch.equal(again(images), network(images))


def test_a_job_with_shared_layers_is_pruned_proven_and_delivered(tmp_path: Path) -> None:
    layers = [
        *[conv(8, name="s"), layer("relu"), conv(8, name="a", bias=False), layer("batch_norm"), layer("relu")],
        *[
            layer("max_pool", kernel_size=2),
            layer("conv", shares="a", name="b"),
            layer("batch_norm"),
            layer("relu"),
            *HEAD,
        ],
    ]
    steps = [
        {"type": "prune", "budget": {"macs": 0.5}, "round_to": 1, "retrain": {"epochs": 1}},
        {"type": "prune", "sparsity": 0.5, "retrain": {"epochs": 1}},
    ]
    spec = tiny_spec(
        *steps,
        model={"input_shape": list(SHAPE), "layers": layers},
        exports=["safetensors", "onnx", "pytorch"],
        training={"ema_decay": 0.9},
    )
    outcome = run(task_of(spec, tiny_data(tmp_path / "cache"), tmp_path / "job"), MemoryJournal())
    assert isinstance(outcome, Delivered)
    verification = outcome.report["verification"]
    assert {"pruned.safetensors", "pruned.onnx", "model.py"} <= set(verification)
    tensors = load_file(outcome.artifacts[0].path)
    assert "b.weight" not in tensors
    final = outcome.summary["final"]
    assert final["macs"] <= 0.5 * outcome.summary["baseline"]["macs"]
    assert final["params"] == sum(t.numel() for name, t in tensors.items() if "running" not in name)
    narrow, half = (step["layers"] for step in outcome.report["steps"])
    widths = {row["name"]: row["channels_after"] for row in narrow}
    assert widths["s"] == widths["a"] == widths["b"]
    weights = [tensors[f"{name}.weight"] for name in ("s", "a", "linear1")]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == sum(row["weights"] - row["nonzero"] for row in half) == round(0.5 * sum(w.numel() for w in weights))
    assert np.isfinite(final["loss"])
