"""The race of a retraining: rates are tried for a short time each, and the best goes on.

Each try starts from the same network, runs its whole schedule in a part of an epoch, and is judged by the cross-entropy of
images that it was not trained on: of the validation part, or where there is none of training images that are held out
for the race only. Losses are compared image by image. The rate that stands first wins unless another one is better by
more than the standard error of the difference: a race on few images should not turn on chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from worker.network import Network
from worker.precision import Precision


@torch.no_grad()
def losses_of(network: Network, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision) -> Tensor:
    """The cross-entropy of every image (N, float64, on the CPU), in eval mode; infinite where it is no number."""
    was_training = network.training
    network.eval()
    losses = [torch.zeros(0, dtype=torch.float64)]  # of no image: the first try wins
    for images, labels_N in batches:
        with precision.autocast():
            logits_NK = network(images)
        losses.append(F.cross_entropy(logits_NK.float(), labels_N, reduction="none").double().cpu())
    network.train(was_training)
    return torch.cat(losses).nan_to_num(nan=torch.inf, posinf=torch.inf)


def winner(losses: Sequence[Tensor]) -> int:
    """The number of the try that goes on, from the losses (N each) of the same images after each of them."""
    best = 0
    for number in range(1, len(losses)):
        if _is_better(losses[number], losses[best]):
            best = number
    return best


def _is_better(challenger: Tensor, holder: Tensor) -> bool:
    if not torch.isfinite(challenger).all():
        return False
    if not torch.isfinite(holder).all():
        return True
    gain = holder - challenger
    error = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return float(gain.mean()) > error
