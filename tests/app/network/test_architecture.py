"""`architecture.json` and what pictures go through before they enter the network."""

from __future__ import annotations

import json

import numpy as np
import pytest

from app.network.architecture import Preprocessing, architecture_document, read_architecture
from app.network.graph import build_graph
from app.network.layers.registry import read_layers

LAYERS = [
    {"type": "conv", "out_channels": 4, "kernel_size": 3},
    {"type": "residual", "layers": [{"type": "conv", "out_channels": 6, "kernel_size": 1}]},
    {"type": "squeeze_excite"},
    {"type": "global_avg_pool"},
    {"type": "flatten"},
    {"type": "linear", "out_features": 2},
]


def test_the_document_survives_json_and_holds_no_containers() -> None:
    graph = build_graph(read_layers(LAYERS), (3, 8, 8))
    preprocessing = Preprocessing(1 / 255, (0.1, 0.2, 0.3), (1.0, 0.5, 0.25))
    document = json.loads(json.dumps(architecture_document(graph, ["cat", "é"], preprocessing)))
    assert not {"residual", "squeeze_excite", "repeat"} & {layer["type"] for layer in document["layers"]}
    assert all(layer["name"] and layer["inputs"] for layer in document["layers"])
    assert read_architecture(document) == (graph, ("cat", "é"), preprocessing)
    assert build_graph(read_layers(document["layers"]), (3, 8, 8)) == graph


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 5)])
def test_preprocessing_works_per_channel_for_any_number_of_axes(shape: tuple[int, ...]) -> None:
    raw = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    preprocessing = Preprocessing(0.5, (1.0, 2.0, 3.0), (2.0, 4.0, 8.0))
    found = preprocessing.apply(raw)
    assert found.dtype == np.float32
    for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std, strict=True)):
        assert np.array_equal(found[:, channel], (raw[:, channel] * np.float32(0.5) - mean) / std)


def test_the_input_is_laid_out_channels_first_whatever_the_stored_order_and_the_raw_images_stay() -> None:
    stored = np.random.default_rng(0).standard_normal((2, 4, 4, 3), np.float32)
    before = stored.copy()
    found = Preprocessing(1.0, (0.5,) * 3, (2.0,) * 3).apply(stored.transpose(0, 3, 1, 2))
    assert found.flags.c_contiguous
    assert found.shape == (2, 3, 4, 4)
    assert np.array_equal(stored, before)
