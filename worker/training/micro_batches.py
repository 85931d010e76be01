"""A batch in pieces, where memory does not hold the whole: the gradient of a step is the sum of theirs.

Batch norm is the exception. It normalises each piece by the piece's own mean and variance, so the gradient is another
one (ghost batch norm, Hoffer et al., arXiv 1705.08741), by 6 % in norm where two halves were compared. Its running statistics are
kept at the pace of whole batches.

Axes: N batch, C channels, x spatial.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from app.network.cost import SMALLEST_BATCH


def split_batch(images_NCx: Tensor, labels_N: Tensor, pieces: int) -> list[tuple[Tensor, Tensor]]:
    """The batch in `pieces` nearly equal pieces, or in fewer: none has one image, of which batch norm has no variance."""
    most = max(1, min(pieces, len(labels_N) // SMALLEST_BATCH))
    return list(zip(images_NCx.tensor_split(most), labels_N.tensor_split(most), strict=True))


def joined_batches(batches: Iterable[Tensor]) -> list[Tensor]:
    """The same images in the same order; a batch of one is joined to the next, the last to the one before.

    So that every batch has a variance, where there are two images.
    """
    joined: list[Tensor] = []
    for images_NCx in batches:
        if joined and len(joined[-1]) == 1:
            joined[-1] = torch.cat([joined[-1], images_NCx])
        else:
            joined.append(images_NCx)
    if len(joined) > 1 and len(joined[-1]) == 1:
        joined[-2:] = [torch.cat(joined[-2:])]
    return joined


@contextmanager
def norms_paced(network: nn.Module, pieces: int) -> Iterator[None]:
    """Inside the block, `pieces` forward passes move running statistics as far as one does outside.

    With momentum 1 - (1 - m)^(1 / pieces) the old value keeps the weight 1 - m after all of them. They count as one
    batch. Batch norms in eval mode stay as they are.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    if pieces == 1 or not norms:
        yield
        return
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    before = [count.clone() for count in counts]
    try:
        for norm, momentum in zip(norms, momenta, strict=True):
            assert momentum is not None, "a layer states its momentum"
            norm.momentum = 1 - (1 - momentum) ** (1 / pieces)
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, was in zip(counts, before, strict=True):
            count.copy_(was + 1)
