"""On what a job computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from app.spec.job import Training
from tests.support.jobs.blobs import graph_of, small_cnn
from worker.network import build_network
from worker.precision import Precision, choose_precision, full_float32


def chosen(*, spatial_axes: int = 2, **fields: Any) -> Precision:
    """The precision of a job on the CPU."""
    return choose_precision(Training.model_validate(fields), "cpu", spatial_axes=spatial_axes)


def test_a_cpu_computes_in_float32_unless_bf16_is_asked_for() -> None:
    assert (chosen().name, chosen().dtype) == ("float32", None)
    assert (chosen(precision="bf16").name, chosen(precision="bf16").dtype) == ("bf16", torch.bfloat16)


def test_fp16_without_a_gpu_becomes_float32_with_a_note() -> None:
    found = chosen(precision="fp16")
    assert found.dtype is None
    assert "fp16 needs a GPU" in found.notes[0]
    assert not chosen().notes


def test_images_with_two_or_three_spatial_axes_get_channels_last_unless_told_otherwise() -> None:
    assert [chosen(spatial_axes=axes).channels_last for axes in (1, 2, 3)] == [False, True, True]
    assert not chosen(channels_last=False).channels_last


@pytest.mark.parametrize(
    ("shape", "layout"), [((2, 6, 6), torch.channels_last), ((2, 4, 6, 6), torch.channels_last_3d)]
)
def test_a_network_is_placed_in_the_layout_without_changing_a_value(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    layers = [{"type": "conv", "out_channels": 3, "kernel_size": 3}, {"type": "batch_norm"}, {"type": "flatten"}]
    network = build_network(graph_of([*layers, {"type": "linear", "out_features": 2}], shape), seed=0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    parameters = list(network.parameters())
    chosen(channels_last=True, spatial_axes=len(shape) - 1).to_device(network)
    assert network.get_parameter("conv1.weight").is_contiguous(memory_format=layout)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(new is old for new, old in zip(network.parameters(), parameters, strict=True))


def test_autocast_is_off_in_float32() -> None:
    network = build_network(small_cnn(), seed=0)
    with chosen().autocast():
        assert network(torch.zeros(2, 1, 8, 8)).dtype == torch.float32
    with chosen(precision="bf16").autocast():
        assert network(torch.zeros(2, 1, 8, 8)).dtype == torch.bfloat16


def _tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_full_float32_is_for_a_block_and_leaves_no_trace() -> None:
    before = _tf32()
    assert True in before
    with full_float32():
        assert _tf32() == (False, False)
    assert _tf32() == before
