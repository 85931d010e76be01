"""The ends of a network, and what belongs to a convolution."""

from __future__ import annotations

from typing import Any

from app.network.blocks import block_of, head_layers, last_layers
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers

CONV = {"type": "conv", "out_channels": 4, "kernel_size": 3, "padding": 1}


def graph_of(*layers: dict[str, Any]) -> Graph:
    return build_graph(read_layers(list(layers)), (3, 8, 8))


def test_the_last_layers_multiply_and_the_head_has_the_norms_after_them_too() -> None:
    pooled = [{"type": "relu"}, {"type": "global_avg_pool"}, {"type": "flatten"}]
    graph = graph_of(CONV, {"type": "batch_norm"}, CONV, {"type": "batch_norm"}, *pooled)
    assert last_layers(graph) == {"conv2"}
    assert head_layers(graph) == {"conv2", "batch_norm2"}


def test_every_branch_of_the_output_has_its_last_layer_and_a_head_that_shares_is_named_where_its_tensors_are() -> None:
    again = {"type": "conv", "name": "again", "shares": "conv1", "inputs": ["input"]}
    graph = graph_of(CONV, again, {"type": "add", "inputs": ["conv1", "again"]})
    assert last_layers(graph) == {"conv1", "again"}
    assert head_layers(graph) == {"conv1"}


def test_a_block_ends_where_another_layer_reads_it_too() -> None:
    graph = graph_of(CONV, {"type": "batch_norm"}, {"type": "relu"}, {"type": "add", "inputs": ["relu1", "conv1"]})
    assert block_of(graph, graph["conv1"]).end.name == "conv1"
    alone = graph_of(CONV, {"type": "batch_norm"}, {"type": "relu"}, {"type": "add", "inputs": ["relu1", "relu1"]})
    block = block_of(alone, alone["conv1"])
    assert (block.conv.name, block.end.name) == ("conv1", "relu1")
    assert block.norm is not None
    assert block.norm.name == "batch_norm1"
