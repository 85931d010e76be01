"""A large kernel as a stack of small ones: same output shape, same receptive field, less to multiply."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.network.layers.convolutions import Conv
from app.rewrites.small_kernels import factors, stack

Seen = list[set[int]]
"""For each output position, the input positions that it sees, along one axis."""


def _seen(conv: Conv, size: int) -> Seen:
    """What each output position of a 1-D convolution sees, by the definition of convolution."""
    (kernel,), (stride,), (dilation,) = conv.kernel(1), conv.strides(1), conv.dilations(1)
    ((before, behind),) = conv.paddings(1)
    count = (size + before + behind - dilation * (kernel - 1) - 1) // stride + 1
    taps = [[o * stride - before + t * dilation for t in range(kernel)] for o in range(count)]
    return [{position for position in places if 0 <= position < size} for places in taps]


def _seen_through(convs: list[Conv], size: int) -> Seen:
    seen: Seen = [{position} for position in range(size)]
    for conv in convs:
        seen = [set().union(*(seen[p] for p in places)) for places in _seen(conv, len(seen))]
    return seen


def _fits(kernel: int, padding: int | str, dilation: int, size: int) -> bool:
    return padding == "same" or size + 2 * (0 if padding == "valid" else int(padding)) >= dilation * (kernel - 1) + 1


def test_factors_reach_as_far_as_the_kernel() -> None:
    for kernel in range(1, 40):
        parts = factors(kernel)
        assert sum(part - 1 for part in parts) == kernel - 1
        assert set(parts) <= {2, 3}
        assert parts.count(2) == (kernel - 1) % 2
    assert factors(5) == [3, 3]
    assert factors(4) == [3, 2]


def test_every_geometry_keeps_output_size_and_receptive_field() -> None:
    kernels, strides, dilations, sizes = range(4, 12), (1, 2, 3), (1, 2, 3), (1, 2, 5, 9, 23)
    tried = 0
    for kernel, stride, dilation, size in itertools.product(kernels, strides, dilations, sizes):
        paddings: list[Any] = ["same", *range(kernel + 2)] if stride == 1 else [*range(kernel + 2)]
        for padding in ["valid", *paddings]:
            if not _fits(kernel, padding, dilation, size):
                continue
            conv = Conv(out_channels=4, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation)
            small = stack(conv, (2, size))
            assert max(part.kernel(1)[0] for part in small) <= 3
            assert _seen_through(small, size) == _seen(conv, size), (kernel, stride, dilation, size, padding)
            tried += 1
    assert tried > 2000


@settings(max_examples=150, deadline=None)
@given(data=st.data(), axes=st.integers(1, 3))
def test_every_axis_may_have_its_own_geometry(data: st.DataObject, axes: int) -> None:
    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(axes))

    kernel, stride, padding, dilation = per_axis(1, 9), per_axis(1, 3), per_axis(0, 4), per_axis(1, 2)
    need = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    spatial = tuple(size + data.draw(st.integers(0, 4)) for size in need)
    conv = Conv(out_channels=6, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, bias=False)
    shape: tuple[int, ...] = (3, *spatial)
    for part in stack(conv, shape):
        assert max(part.kernel(axes)) <= 3
        assert part.bias is False
        shape = part.output_shape([shape])
    assert shape == conv.output_shape([(3, *spatial)])


@pytest.mark.parametrize(("groups", "out", "inner"), [(1, 8, 8), (2, 8, 8), ("depthwise", 8, 4), (4, 8, 4)])
def test_inner_widths_keep_groups_and_depthwise(groups: Any, out: int, inner: int) -> None:
    conv = Conv(out_channels=out, kernel_size=7, padding=3, groups=groups)
    parts = stack(conv, (4, 9, 9))
    assert [part.out_channels for part in parts] == [inner, inner, out]
    shape: tuple[int, ...] = (4, 9, 9)
    for part in parts:
        shape = part.output_shape([shape])
    assert shape == (out, 9, 9)


def test_a_small_kernel_is_left_as_it_is() -> None:
    conv = Conv(out_channels=2, kernel_size=3, stride=2, padding=1)
    assert stack(conv, (1, 8, 8)) == [conv]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(5, 2, 2, 1), (7, 3, 0, 2), (9, 1, "same", 1), (4, 2, 5, 1)]
)
def test_gradients_reach_the_same_inputs_in_torch(kernel: int, stride: int, padding: Any, dilation: int) -> None:
    conv = Conv(out_channels=1, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, bias=False)

    def reached(convs: list[Conv]) -> list[list[bool]]:
        images_NCL = torch.ones(1, 1, 20, dtype=torch.float64, requires_grad=True)
        output_NCL = images_NCL
        for part in convs:
            weight_OIK = torch.ones(1, 1, part.kernel(1)[0], dtype=torch.float64)
            amount: Any = part.padding
            output_NCL = torch.nn.functional.conv1d(
                output_NCL, weight_OIK, stride=part.strides(1)[0], padding=amount, dilation=part.dilations(1)[0]
            )
        rows = []
        for position in range(output_NCL.shape[-1]):
            (gradient_NCL,) = torch.autograd.grad(output_NCL[0, 0, position], images_NCL, retain_graph=True)
            rows.append((gradient_NCL[0, 0] != 0).tolist())
        return rows

    assert reached(stack(conv, (1, 20))) == reached([conv])


def test_weights_per_channel_fall_as_published() -> None:
    for kernel, kept in ((5, 0.72), (7, 0.55)):
        conv = Conv(out_channels=16, kernel_size=kernel, padding="same", bias=False)
        shape = (16, 8, 8)
        before = conv.tensors([shape])["weight"].elements
        after = sum(part.tensors([shape])["weight"].elements for part in stack(conv, shape))
        assert after / before == pytest.approx(kept, abs=0.005)
