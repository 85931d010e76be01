"""Every preset, narrow and at a small input: it trains, gets smaller without changing its function, and is delivered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from app.network.architecture import Preprocessing, read_architecture
from app.network.cost import cost
from app.network.graph import Graph
from app.network.presets.registry import PRESETS, preset_layers
from app.pruning.budget import choose_removals
from app.pruning.channel_classes import channel_classes
from app.spec.prune import Prune
from tests.support.jobs.specs import graph_of
from tests.support.networks.dags import one_class, random_drop
from tests.support.networks.topologies import pictures, trained
from worker.export.files import export_network
from worker.network import Network, build_network
from worker.pruning.importance import channel_scores
from worker.pruning.surgery import masked_reference, shrink

EXACT = 1e-10
SINGLE = 2e-5
WIDTH = 0.25
CLASSES = 5
SMALL = {1: (64,), 2: (8, 9), 3: (3, 8, 9)}  # unequal on the axes: mixed-up axes must show
LARGE_STEM = (64, 65)  # the smallest size at which networks for ImageNet have their own stem
FOR_IMAGENET = [name for name, preset in PRESETS.items() if preset.usual_shape == (3, 224, 224)]


def small(name: str) -> Graph:
    """The preset on inputs of 3 channels, as small as is reasonable."""
    preset = PRESETS[name]
    shape = (3, *(max(size, preset.smallest) for size in SMALL[preset.axes[-1]]))
    return graph_of(preset_layers(name, shape, CLASSES, WIDTH), shape, CLASSES)


def large(name: str) -> Graph:
    """The preset on inputs for which it has the stem of its paper."""
    shape = (3, *LARGE_STEM)
    return graph_of(preset_layers(name, shape, CLASSES, WIDTH), shape, CLASSES)


@torch.no_grad()
def logits(network: Network, images: np.ndarray) -> torch.Tensor:
    """In eval mode."""
    return network.eval()(torch.from_numpy(images).to(next(network.parameters()).dtype))


def step_down(network: Network, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The loss in training mode; then a step against the gradient, as long as promises a loss lower by 5 %."""
    torch.manual_seed(0)  # the same dropout in each step
    network.zero_grad()
    loss = torch.nn.functional.cross_entropy(network.train()(images), labels)
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(network.parameters()))
    rate = 0.05 * loss.item() / sum(float(gradient.square().sum()) for gradient in gradients)
    with torch.no_grad():
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter -= rate * gradient
    return loss.item()


@pytest.mark.parametrize("name", PRESETS)
def test_the_smaller_network_equals_the_masked_one(name: str) -> None:
    graph = small(name)
    classes = channel_classes(graph)
    network = trained(graph, 1).double()
    images = pictures(graph, 3)
    whole = logits(network, images)
    scale = 1 + float(whole.abs().max())
    for dropped in (one_class(classes, 1), random_drop(classes, 0.3, 1), random_drop(classes, 0.8, 2)):
        smaller, masked = shrink(network, classes, dropped), masked_reference(network, classes, dropped)
        given, expected = logits(smaller, images), logits(masked, images)
        assert float((given - expected).abs().max()) <= EXACT * scale
    assert float((given - whole).abs().max()) > 1e-3, "what left did not matter, so nothing was compared"


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_lowers_the_loss_before_and_after_half_of_the_work_is_gone(name: str) -> None:
    graph = small(name)
    network = build_network(graph, seed=0)
    images = torch.from_numpy(pictures(graph, 2 * CLASSES))
    labels = torch.arange(2 * CLASSES) % CLASSES
    classes = channel_classes(graph)
    step = Prune.model_validate({"type": "prune", "budget": {"macs": 0.5}, "round_to": 1})
    removals = choose_removals(graph, classes, channel_scores(network, classes, "l2", seed=0), step)
    smaller = shrink(network, classes, removals.dropped)
    assert cost(smaller.graph) == removals.cost
    assert cost(smaller.graph).macs <= 0.5 * cost(graph).macs
    for one in (network, smaller):
        before = step_down(one, images, labels)
        assert step_down(one, images, labels) < before


@pytest.mark.parametrize(
    ("name", "graph"),
    [
        *(pytest.param(name, small, id=name) for name in PRESETS),
        *(pytest.param(name, large, id=f"{name}-large") for name in FOR_IMAGENET),
    ],
)
def test_what_is_delivered_of_it_computes_the_same_in_every_format(
    name: str, graph: Callable[[str], Graph], tmp_path: Path
) -> None:
    dense = graph(name)
    network = trained(dense, 2)
    classes = channel_classes(dense)
    smaller = shrink(network, classes, random_drop(classes, 0.3, 3))
    preprocessing = Preprocessing(1.0, (0.0,) * 3, (1.0,) * 3)
    names = tuple(f"class {number}" for number in range(CLASSES))
    export_network(smaller, tmp_path, stem="pruned", class_names=names, preprocessing=preprocessing)
    images = pictures(smaller.graph, 3)
    expected = logits(smaller, images)

    tensors = load_file(tmp_path / "pruned.safetensors")
    read, _, _ = read_architecture(json.loads((tmp_path / "architecture.json").read_text()))
    assert read == smaller.graph
    again = build_network(read)
    again.load_state_dict(tensors, strict=False)
    assert torch.equal(logits(again, images), expected)

    module = ModuleType("model")
    exec(compile((tmp_path / "model.py").read_text(), "model.py", "exec"), module.__dict__)
    delivered = module.load(tmp_path / "pruned.safetensors")
    with torch.no_grad():
        assert torch.equal(delivered(torch.from_numpy(images)), expected)

    session = onnxruntime.InferenceSession(tmp_path / "pruned.onnx", providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"images": images})[0]
    assert np.abs(found - expected.numpy()).max() <= SINGLE * (1 + float(expected.abs().max()))
