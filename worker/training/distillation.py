"""A teacher from another job: it sees the same augmented images as the student, through its own preprocessing.

Both normalise per channel, in the same units: student s = (x - m) / d, teacher t = (x - m') / d'. So the teacher's
input is t = s * (d / d') + (m - m') / d', exact but for float32's rounding, whatever was shifted, flipped or cut out of
the batch: what is the student's mean there is the same grey for the teacher.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from app.network.architecture import Preprocessing
from worker.network import Network


class Teacher(nn.Module):
    """A network that takes batches normalised for another one: `N x C x ...` -> logits `N x K`."""

    factor: Tensor | None
    offset: Tensor | None

    def __init__(self, network: Network, *, own: Preprocessing, given: Preprocessing) -> None:
        """`own` is what the network was trained under, `given` what the images went through that it will get.

        The scales are not compared: mean and standard deviation are in units after them.
        """
        super().__init__()
        self.network = network
        axes = len(network.graph.input_shape) - 1
        same = own.mean == given.mean and own.std == given.std
        self.register_buffer("factor", None if same else _column(np.divide(given.std, own.std), axes))
        shift = np.divide(np.subtract(given.mean, own.mean), own.std)
        self.register_buffer("offset", None if same else _column(shift, axes))

    def forward(self, images_NCx: Tensor) -> Tensor:
        """Its logits for images as the student takes them."""
        if self.factor is not None and self.offset is not None:
            images_NCx = images_NCx * self.factor + self.offset
        logits_NK: Tensor = self.network(images_NCx)
        return logits_NK


def _column(values_C: np.ndarray, axes: int) -> Tensor:
    """C numbers as a float32 tensor `C x 1 x ...` that spreads over a batch."""
    return torch.from_numpy(np.asarray(values_C, np.float32)).view(-1, *[1] * axes)
