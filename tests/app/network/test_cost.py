"""Bytes and memory: what is said before a job runs must be what the files and torch take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from app.network.cost import (
    SAFETENSORS_METADATA,
    activation_elements,
    choice_batch,
    cost,
    forward_elements,
    layer_rows,
    safetensors_bytes,
    training_memory,
)
from app.network.graph import build_graph
from app.network.layers.activations import Activation
from app.network.layers.registry import LAYERS, read_layers
from app.network.presets.registry import preset_layers
from tests.support.networks.layer_samples import LayerList, conv, layer
from worker.network import build_network


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-zA-Z][a-zA-Z0-9_]{0,12}\.(weight|bias)", fullmatch=True),
        st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
        max_size=12,
    )
)
def test_the_size_of_any_file_is_known_before_it_is_written(tmp_path_factory: Any, shapes: dict[str, Any]) -> None:
    path: Path = tmp_path_factory.mktemp("file") / "weights.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path, metadata=SAFETENSORS_METADATA)
    assert safetensors_bytes(shapes) == path.stat().st_size


def test_rows_and_cost_of_the_seed_network() -> None:
    graph = build_graph(read_layers(preset_layers("simple_cnn", (3, 32, 32), 10)), (3, 32, 32), classes=10)
    rows = [(row.name, row.type, list(row.output_shape), row.params, row.macs) for row in layer_rows(graph)]
    assert rows[0] == ("conv1", "conv", [32, 32, 32], 896, 32 * 32 * 32 * 27)
    assert rows[7] == ("linear1", "linear", [128], 4096 * 128 + 128, 4096 * 128)
    total = cost(graph)
    assert total.params == total.nonzero_params == 896 + 18496 + 524416 + 1290
    assert total.macs == 884_736 + 4_718_592 + 524_288 + 1_280


def _kept_by_autograd(layers: LayerList, shape: tuple[int, ...], batch: int) -> float:
    """Float32 numbers per example that a training forward pass keeps, the network's own tensors left out."""
    network = build_network(build_graph(read_layers(layers), shape), seed=0)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = network(torch.randn(batch, *shape, requires_grad=True))
    assert output.requires_grad
    return sum(kept.values()) / batch / 4


CHAIN = [conv(8), layer("batch_norm"), layer("relu"), layer("avg_pool", kernel_size=2), conv(8), layer("relu")]
HEAD = [layer("global_avg_pool"), layer("flatten"), layer("linear", out_features=4)]
KEEPERS: dict[str, LayerList] = {
    "chain": [*CHAIN, *HEAD],
    "max pooling and its indices": [conv(8), layer("silu"), layer("max_pool", kernel_size=2), *HEAD],
    "dropout and its mask": [conv(8), layer("relu"), layer("dropout"), conv(8), layer("spatial_dropout"), *HEAD],
    "residual": [
        conv(8),
        *[layer("residual", layers=[conv(8), layer("batch_norm"), layer("relu"), conv(8)])] * 3,
        *HEAD,
    ],
    "squeeze and excite": [conv(8), layer("squeeze_excite"), layer("hardswish"), *HEAD],
    "norms": [conv(8), layer("group_norm", num_groups=2), layer("gelu"), conv(8), layer("tanh"), *HEAD],
    "other activations": [conv(8), layer("relu6"), conv(8), layer("sigmoid"), conv(8), layer("prelu"), conv(8), *HEAD],
    "branches": [
        conv(4, name="a"),
        conv(4, name="b"),
        layer("concat", inputs=["a", "b"]),
        layer("channel_shuffle", groups=2),
        layer("upsample", scale_factor=2),
        *HEAD,
    ],
}


@pytest.mark.parametrize("name", KEEPERS)
def test_what_training_keeps_is_what_autograd_keeps(name: str) -> None:
    shape = (3, 12, 12)
    counted = activation_elements(build_graph(read_layers(KEEPERS[name]), shape))
    assert counted == pytest.approx(_kept_by_autograd(KEEPERS[name], shape, batch=4), rel=0.05)


@pytest.mark.parametrize("kind", [name for name, kind in LAYERS.items() if issubclass(kind, Activation)])
def test_what_an_activation_keeps_is_what_autograd_keeps(kind: str) -> None:
    layers, shape = [conv(8), layer(kind), conv(8), *HEAD], (3, 12, 12)
    counted = activation_elements(build_graph(read_layers(layers), shape))
    assert counted == pytest.approx(_kept_by_autograd(layers, shape, batch=4), rel=0.05)


def test_memory_counts_batches_and_the_optimizers_copies() -> None:
    graph = build_graph(read_layers(KEEPERS["chain"]), (3, 12, 12))
    one, two = (training_memory(graph, batch_size=size, optimizer="adamw") for size in (1, 2))
    params = cost(graph).params * 4
    assert (one.gradients, one.optimizer, one.parameters) == (params, 2 * params, params + 2 * 8 * 4)
    assert two.activations == 2 * one.activations > 0
    assert training_memory(graph, batch_size=1, optimizer="sgd").optimizer == params
    assert one.total == one.parameters + one.gradients + one.optimizer + max(one.activations, one.choices)
    with pytest.raises(KeyError):
        training_memory(graph, batch_size=1, optimizer="lion")


@pytest.mark.parametrize("name", KEEPERS)
def test_a_forward_pass_alone_holds_its_largest_neighbours_at_once(name: str) -> None:
    graph = build_graph(read_layers(KEEPERS[name]), (3, 12, 12))
    widest = max(node.elements for node in graph.nodes)
    assert widest < forward_elements(graph) <= 3 * 12 * 12 + sum(node.elements for node in graph.nodes)


def test_a_view_and_an_output_that_is_read_again_later_are_counted_once_and_as_long_as_they_are_needed() -> None:
    chain = [conv(8, padding=1), layer("relu"), layer("flatten"), layer("linear", out_features=4)]
    assert forward_elements(build_graph(read_layers(chain), (3, 12, 12))) == 2 * 8 * 144
    kept = [conv(3, padding=1, name="a"), conv(8, padding=1), conv(3, padding=1), layer("add", inputs=["a", "conv2"])]
    assert forward_elements(build_graph(read_layers(kept), (3, 12, 12))) == (3 + 8 + 3) * 144


def test_choices_take_256_images_where_memory_allows_and_no_more_than_a_training_where_not() -> None:
    small, large = (build_graph(read_layers(KEEPERS["chain"]), (3, side, side)) for side in (12, 160))
    assert choice_batch(small, 8) == choice_batch(small, 8, backward=True) == 256
    tight = [choice_batch(large, size, backward=backward) for size in (8, 64) for backward in (False, True)]
    assert tight[1] < tight[0] < 256
    assert tight[3] == 64
    huge = build_graph(read_layers(KEEPERS["chain"]), (3, 4000, 4000))
    assert choice_batch(huge, 1) == 2  # batch norm has no variance of one image


def test_memory_counts_what_choices_take_beside_a_small_training_batch() -> None:
    graph = build_graph(read_layers(KEEPERS["chain"]), (3, 160, 160))
    plain, taylor = (
        training_memory(graph, batch_size=1, optimizer="sgd", gradients_of_choices=asked) for asked in (False, True)
    )
    assert plain.activations == taylor.activations < plain.choices
    assert plain.choices == choice_batch(graph, 1) * forward_elements(graph) * 4
    assert taylor.choices >= plain.choices
    assert plain.total == plain.parameters + plain.gradients + plain.optimizer + plain.choices


def test_ten_thousand_layers_are_read_built_and_costed_within_two_seconds() -> None:
    documents = [conv(64), layer("relu")] * 5000
    started = time.process_time()
    graph = build_graph(read_layers(documents), (3, 16, 16))
    cost(graph)
    layer_rows(graph)
    training_memory(graph, batch_size=128, optimizer="sgd")
    assert len(graph.nodes) == 10_000
    assert time.process_time() - started < 2


def test_a_network_of_170_layers_is_checked_within_milliseconds() -> None:
    shape, blocks = (3, 32, 32), []
    for width, stride in ((64, 1), (128, 2), (256, 2)):
        for index in range(6):
            convs = [
                conv(width, 1, 0),
                layer("batch_norm"),
                layer("relu"),
                conv(width, stride=stride if index == 0 else 1),
            ]
            blocks.append(layer("residual", layers=[*convs, layer("batch_norm"), layer("relu"), conv(4 * width, 1, 0)]))
    documents = [*blocks, layer("global_avg_pool"), layer("flatten"), layer("linear", out_features=10)]
    best = 1.0
    for _ in range(5):
        started = time.process_time()
        graph = build_graph(read_layers(documents), shape, classes=10)
        cost(graph)
        best = min(best, time.process_time() - started)
    assert len(graph.nodes) > 140
    assert best < 0.03
