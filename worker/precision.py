"""On what a job computes: device, number format, memory layout. Chosen once, from what the device can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.spec.job import Training

BFLOAT16_SINCE = (8, 0)  # compute capability: older devices emulate it, slower than float32


@dataclass(frozen=True)
class Precision:
    """Where and how numbers are computed. `dtype` is autocast's (None: float32); weights are float32 always."""

    device: torch.device
    dtype: torch.dtype | None
    channels_last: bool
    notes: tuple[str, ...] = ()

    @property
    def scales_gradients(self) -> bool:
        """Whether the loss has to be scaled: gradients below 6e-8 are zero in float16."""
        return self.dtype is torch.float16

    @property
    def name(self) -> str:
        """How the report calls it: float32, bf16 or fp16."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype or torch.float32, "float32")

    def autocast(self) -> torch.autocast:
        """A context in which the network computes in `dtype`."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def memory_format(self, dimensions: int) -> torch.memory_format:
        """The layout of a tensor with this many axes, batch and channels included."""
        if not self.channels_last:
            return torch.contiguous_format
        return {4: torch.channels_last, 5: torch.channels_last_3d}.get(dimensions, torch.contiguous_format)

    def to_device(self, network: nn.Module) -> None:
        """Put the network's tensors on the device, in its layout, in place."""
        for module in network.modules():
            for tensor in _own_tensors(module):
                placed = tensor.data.to(self.device)
                tensor.data = placed.contiguous(memory_format=self.memory_format(placed.dim()))


def choose_precision(training: Training, device: str, *, spatial_axes: int) -> Precision:
    """What a job with this training computes in on `device` ("auto": the GPU if there is one).

    `auto` is bf16 on a GPU that computes in it, else float32; fp16 is for GPUs only and becomes float32 elsewhere,
    with a note. Without a word on `channels_last`, images with two or three spatial axes get it: a step of
    resnet20 and of video_cnn is 1.3 times faster on two CPU cores, more on a GPU with bf16.
    """
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    dtype, notes = _dtype(training.precision, place)
    wanted = training.channels_last
    return Precision(place, dtype, spatial_axes >= 2 if wanted is None else wanted, notes)


def _dtype(wanted: str, device: torch.device) -> tuple[torch.dtype | None, tuple[str, ...]]:
    if wanted == "bf16":
        return torch.bfloat16, ()
    if wanted == "fp16" and device.type == "cuda":
        return torch.float16, ()
    if wanted == "fp16":
        return None, (f"precision fp16 needs a GPU; on this {device.type} the job was trained in float32",)
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= BFLOAT16_SINCE
    return (torch.bfloat16 if wanted == "auto" and able else None), ()


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside the block a GPU multiplies float32 with all of its bits (24), not with the 11 of TF32; elsewhere nothing changes."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    try:
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


def _own_tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
