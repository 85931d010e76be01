"""The ONNX file: the same function in another runtime, for any batch, and nothing in it but the network."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.support.networks.topologies import TOPOLOGIES, pictures, topology, trained
from worker.export.files import portable_tensors
from worker.export.onnx_model import onnx_bytes
from worker.network import Network

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def exported(network: Network) -> bytes:
    return onnx_bytes(network.graph, {name: tensor.numpy() for name, tensor in portable_tensors(network).items()})


def run(data: bytes, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_onnxruntime_gives_the_logits_of_the_network_for_any_batch(name: str) -> None:
    network = trained(topology(name))
    data = exported(network)
    for batch in (1, 2, 7):
        images = pictures(network.graph, batch, seed=batch)
        with torch.no_grad():
            expected = network(torch.from_numpy(images)).numpy()
        assert np.abs(run(data, images) - expected).max() <= 1e-5


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "transposed", "video"])
def test_no_batch_norm_is_left_after_a_convolution_or_a_linear_layer(name: str) -> None:
    graph = topology(name)
    assert "batch_norm" in {node.type for node in graph.nodes}
    assert "BatchNormalization" not in kinds(exported(trained(graph)))


def test_a_batch_norm_before_a_convolution_stays() -> None:
    assert kinds(exported(trained(topology("pre-activation")))).count("BatchNormalization") == 2
    assert kinds(exported(trained(topology("dense")))).count("BatchNormalization") == 1


def test_the_file_names_nothing_of_this_machine_and_is_the_same_each_time() -> None:
    network = trained(topology("residual"))
    data = exported(network)
    assert re.search(rb"(/[\w.-]+){2,}|site-packages|\.py", data) is None
    model = onnx.load_from_string(data)
    parts = [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer]
    assert not any(part.doc_string or part.metadata_props for part in parts)
    assert data == exported(network)


def test_the_batch_axis_is_free_and_the_others_are_stated() -> None:
    graph = onnx.load_from_string(exported(trained(topology("video")))).graph
    (images,), (logits,) = graph.input, graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert [axis.dim_param or axis.dim_value for axis in images.type.tensor_type.shape.dim] == ["batch", 1, 4, 6, 6]
    assert [axis.dim_param or axis.dim_value for axis in logits.type.tensor_type.shape.dim] == ["batch", 3]


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
def test_torchs_own_exporter_agrees() -> None:
    network = trained(topology("residual"))
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        network,
        (torch.from_numpy(pictures(network.graph, 2)),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
        verbose=False,
    )
    images = pictures(network.graph, 5)
    theirs = run(program.model_proto.SerializeToString(), images)
    assert np.abs(theirs - run(exported(network), images)).max() <= 1e-5


def kinds(data: bytes) -> list[str]:
    return [operator.op_type for operator in onnx.load_from_string(data).graph.node]
