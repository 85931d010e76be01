"""Pooling and upsampling, in torch, ONNX and source. Axes: N batch, C channels, x spatial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from app.network.layers.pooling import AvgPool, GlobalAvgPool, MaxPool, Upsample
from app.network.node import Node
from worker.layers.onnx_operators import OnnxWriter, one_operator
from worker.layers.rule import LayerRule
from worker.layers.source_text import Expression, call, geometry_arguments, sizes_text

_MAX_POOL: tuple[Any, ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVG_POOL: tuple[Any, ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_GLOBAL_AVG_POOL: tuple[Any, ...] = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


class Subsample(nn.Module):
    """Every stride-th position: pooling with a window of one, as a view."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.index = (slice(None), slice(None), *(slice(None, None, stride) for stride in strides))

    def forward(self, value_NCx: Tensor) -> Tensor:
        """N x C x ... -> N x C x ceil(size / stride)."""
        return value_NCx[self.index]


def _only_subsamples(layer: MaxPool | AvgPool, node: Node) -> bool:
    """Whether its window is one position: it then chooses every stride-th."""
    return set(layer.kernel(node.axes)) == {1} and not any(layer.paddings(node.axes))


# --- torch ---


def _pool_module(layer: MaxPool | AvgPool, node: Node) -> nn.Module:
    axes = node.axes
    if _only_subsamples(layer, node):
        return Subsample(layer.strides(axes))
    kind, more = _MAX_POOL[axes - 1], {}
    if isinstance(layer, AvgPool):
        kind, more = _AVG_POOL[axes - 1], {"count_include_pad": layer.count_include_pad}
    where = {"stride": layer.strides(axes), "padding": layer.paddings(axes), "ceil_mode": layer.ceil_mode}
    module: nn.Module = kind(layer.kernel(axes), **where, **more)
    return module


def _global_avg_pool_module(layer: GlobalAvgPool, node: Node) -> nn.Module:
    module: nn.Module = _GLOBAL_AVG_POOL[node.axes - 1](1)
    return module


def _upsample_module(layer: Upsample, node: Node) -> nn.Module:
    return nn.Upsample(scale_factor=tuple(map(float, layer.factors(node.axes))), mode=layer.mode)


# --- ONNX ---


def _onnx_window(layer: MaxPool | AvgPool, node: Node) -> tuple[dict[str, Any], list[int]]:
    """A pool's attributes with all padding said in numbers, and how far its last windows reach beyond it on each axis.

    `ceil_mode` is not used: runtimes disagree about it, and the graph knows the output's size.
    """
    kernel, strides, paddings = layer.kernel(node.axes), layer.strides(node.axes), layer.paddings(node.axes)
    beyond = [
        max(0, (out - 1) * stride + size - (room + 2 * padding))
        for out, stride, size, room, padding in zip(
            node.shape[1:], strides, kernel, node.input_shapes[0][1:], paddings, strict=True
        )
    ]
    pads = [*paddings, *(padding + more for padding, more in zip(paddings, beyond, strict=True))]
    return {"kernel_shape": kernel, "strides": strides, "pads": pads}, beyond


def _max_pool_onnx(layer: MaxPool, node: Node, writer: OnnxWriter) -> None:
    writer.output(node, "MaxPool", writer.inputs(node), **_onnx_window(layer, node)[0])


def _avg_pool_onnx(layer: AvgPool, node: Node, writer: OnnxWriter) -> None:
    """A mean; with `ceil_mode` what lies beyond the padding does not count: a factor per position corrects that."""
    window, beyond = _onnx_window(layer, node)
    if not (layer.count_include_pad and any(beyond)):
        counted = int(layer.count_include_pad)
        writer.output(node, "AveragePool", writer.inputs(node), count_include_pad=counted, **window)
        return
    mean = writer.between(node, "AveragePool", writer.inputs(node), count_include_pad=1, **window)
    writer.output(node, "Mul", [mean, writer.constant(node, "factor", _counted_factor_x(layer, node))])


def _counted_factor_x(layer: AvgPool, node: Node) -> NDArray[np.float32]:
    """The window's size by the positions that count, for each position of the output."""
    axes = node.axes
    factor: NDArray[np.float64] = np.ones((), np.float64)
    for axis, (size, stride, padding) in enumerate(
        zip(layer.kernel(axes), layer.strides(axes), layer.paddings(axes), strict=True)
    ):
        starts = np.arange(node.shape[1 + axis]) * stride
        counted = np.minimum(starts + size, node.input_shapes[0][1 + axis] + 2 * padding) - starts
        factor = np.multiply.outer(factor, size / counted)
    return factor.astype(np.float32)


def _upsample_onnx(layer: Upsample, node: Node, writer: OnnxWriter) -> None:
    scales = writer.constant(node, "scales", np.asarray([1, 1, *layer.factors(node.axes)], np.float32))
    how = (
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        if layer.mode == "nearest"
        else {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    )
    writer.output(node, "Resize", [*writer.inputs(node), "", scales], **how)


# --- source ---


def _pool_source(layer: MaxPool | AvgPool, node: Node, inputs: Sequence[str]) -> Expression:
    axes = node.axes
    if _only_subsamples(layer, node):
        return Expression(f"{inputs[0]}[:, :, {', '.join(f'::{stride}' for stride in layer.strides(axes))}]")
    sizes: dict[str, Sequence[int]] = {"kernel_size": layer.kernel(axes)}
    if layer.strides(axes) != layer.kernel(axes):
        sizes["stride"] = layer.strides(axes)
    sizes["padding"] = layer.paddings(axes)
    arguments = [inputs[0], *geometry_arguments(sizes, {"padding": 0})]
    arguments += ["ceil_mode=True"] if layer.ceil_mode else []
    if isinstance(layer, MaxPool):
        return call(f"F.max_pool{axes}d", *arguments)
    arguments += [] if layer.count_include_pad else ["count_include_pad=False"]
    return call(f"F.avg_pool{axes}d", *arguments)


def _global_avg_pool_source(layer: GlobalAvgPool, node: Node, inputs: Sequence[str]) -> Expression:
    return call(f"F.adaptive_avg_pool{node.axes}d", inputs[0], "1")


def _upsample_source(layer: Upsample, node: Node, inputs: Sequence[str]) -> Expression:
    factors = f"scale_factor={sizes_text(layer.factors(node.axes))}"
    return call("F.interpolate", inputs[0], factors, f'mode="{layer.mode}"')


POOL_RULES = (
    LayerRule(MaxPool, module=_pool_module, onnx=_max_pool_onnx, source=_pool_source),
    LayerRule(AvgPool, module=_pool_module, onnx=_avg_pool_onnx, source=_pool_source),
    LayerRule(
        GlobalAvgPool,
        module=_global_avg_pool_module,
        onnx=one_operator("GlobalAveragePool"),
        source=_global_avg_pool_source,
    ),
    LayerRule(Upsample, module=_upsample_module, onnx=_upsample_onnx, source=_upsample_source),
)
