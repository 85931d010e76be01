"""Torch-Pruning 1.6.1 as an oracle: where it is right the same channels go; where it is wrong the test says so.

Each network is pruned in a process of its own: the library keeps state in its modules.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from app.network.architecture import Preprocessing
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.pruning.budget import choose_removals
from app.pruning.channel_classes import channel_classes
from app.spec.prune import Prune
from tests.support.checkout import TESTS
from tests.support.networks.topologies import HEAD, PICTURE, Layers, conv, layer, pictures, trained
from worker.export.files import portable_tensors
from worker.export.pytorch_source import model_source
from worker.network import Network
from worker.pruning.importance import channel_scores
from worker.pruning.surgery import masked_reference, shrink

SCRIPT = TESTS / "support" / "networks" / "torch_pruning_script.py"

RIGHT: dict[str, Layers] = {
    "chain": [
        *[conv(8), layer("batch_norm"), layer("relu"), conv(12), layer("batch_norm"), layer("relu"), conv(6), *HEAD]
    ],
    "flatten": [
        *[conv(8), layer("relu"), layer("max_pool", kernel_size=2), layer("flatten")],
        *[layer("linear", out_features=10), layer("relu"), layer("linear", out_features=3)],
    ],
    "residual": [
        *[conv(8), layer("batch_norm"), layer("relu")],
        layer("residual", layers=[conv(8), layer("batch_norm"), layer("relu"), conv(8), layer("batch_norm")]),
        layer("relu"),
        layer("residual", layers=[conv(12, 3, stride=2, padding=1), layer("batch_norm")], shortcut="projection"),
        *[layer("relu"), *HEAD],
    ],
    "concat": [
        conv(8, name="stem"),
        conv(6, name="one"),
        layer("concat", inputs=["stem", "one"], name="both"),
        *[layer("batch_norm"), layer("relu"), conv(8), *HEAD],
    ],
    "shared": [
        *[conv(8), layer("batch_norm"), layer("relu"), conv(8, name="twice"), layer("relu")],
        *[layer("conv", shares="twice"), layer("relu"), conv(6), *HEAD],
    ],
}
# what Torch-Pruning does wrong on it, with our own network as the measure
WRONG: dict[str, tuple[Layers, str]] = {
    "shuffle": (
        [
            *[conv(8, name="stem"), layer("batch_norm"), layer("relu"), layer("channel_shuffle", groups=2)],
            *[conv(8, 3, groups=2, name="branch"), layer("relu"), *HEAD],
        ],
        "it does not follow channels through the shuffle",
    ),
    "option A": (
        [
            *[conv(8), layer("batch_norm"), layer("relu")],
            layer("residual", shortcut="pad", layers=[conv(16, 3, stride=2, padding=1), layer("batch_norm")]),
            *[layer("relu"), *HEAD],
        ],
        "it takes the padded zeros for channels that it may tie to others",
    ),
    "depthwise multiplier": (
        [*[conv(8, 1), layer("relu"), conv(16, 3, groups="depthwise"), layer("relu"), conv(8, 1), *HEAD]],
        "it counts one output for each input of a depthwise convolution",
    ),
    "map of one channel": (
        [
            *[conv(8, name="wide"), conv(1, name="map")],
            layer("multiply", inputs=["wide", "map"]),
            *[conv(8), *HEAD],
        ],
        "it leaves the weighted layer as it is, without a word",
    ),
}


@dataclass(frozen=True)
class Pruned:
    """A network after half of the channels of each group went: widths and float64 logits; or why there is none."""

    widths: dict[str, int] | None
    logits: np.ndarray | None
    error: str | None = None


def network_of(layers: Layers) -> Network:
    return trained(build_graph(read_layers(layers), PICTURE))


def by_us(network: Network) -> tuple[Pruned, float]:
    """Our result, and how far the masked network's answers are from it."""
    step = Prune(sparsity=0.5, structure="channels", scope="layer", round_to=1)
    double = network.double()
    classes = channel_classes(double.graph)
    removals = choose_removals(double.graph, classes, channel_scores(double, classes, "l2", seed=0), step)
    smaller = shrink(double, classes, removals.dropped)
    images = torch.from_numpy(pictures(double.graph, 4)).double()
    with torch.no_grad():
        logits = smaller(images).numpy()
        masked = masked_reference(double, classes, removals.dropped)(images).numpy()
    weighted = [node for node in smaller.graph.nodes if node.type in ("conv", "linear") and node.shares is None]
    return Pruned({node.name: node.shape[0] for node in weighted}, logits), float(np.abs(masked - logits).max())


def by_torch_pruning(network: Network, folder: Path) -> Pruned:
    preprocessing = Preprocessing(scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    (folder / "model.py").write_text(model_source(network.graph, ("a", "b", "c"), preprocessing))
    save_file(portable_tensors(network), folder / "weights.safetensors")
    np.save(folder / "images.npy", pictures(network.graph, 4))
    (folder / "ratio.txt").write_text("0.5")
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    if "error" in result:
        return Pruned(None, None, result["error"])
    return Pruned(result["widths"], np.load(folder / "logits.npy"))


@pytest.mark.parametrize("name", RIGHT)
def test_the_same_channels_go_where_the_oracle_is_right(name: str, tmp_path: Path) -> None:
    network = network_of(RIGHT[name])
    theirs = by_torch_pruning(network, tmp_path)
    ours, difference = by_us(network)
    assert difference < 1e-10
    assert theirs.error is None
    assert theirs.widths == ours.widths
    assert theirs.logits is not None
    np.testing.assert_allclose(theirs.logits, ours.logits, atol=1e-6)


@pytest.mark.parametrize("name", WRONG)
def test_ours_is_right_where_the_oracle_is_wrong(name: str, tmp_path: Path) -> None:
    layers, why = WRONG[name]
    network = network_of(layers)
    theirs = by_torch_pruning(network, tmp_path)
    ours, difference = by_us(network)
    assert difference < 1e-10
    same = theirs.widths == ours.widths and np.allclose(theirs.logits, ours.logits, atol=1e-6)
    assert theirs.error is not None or not same, f"no longer true: {why}"
