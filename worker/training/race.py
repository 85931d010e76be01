"""The race of a retraining: rates are tried for a short time each, and the best goes on.

Each try starts from the same network, runs its whole schedule in a part of an epoch, and is judged by the cross-entropy of
images that it was not trained on: of the validation part, or where there is none of training images that are held out
for the race only. Losses are compared image by image. The rate that stands first wins unless another one is better by
more than the standard error of the difference: a race on few images should not turn on chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from worker.data.dataset import Split, Splits, derive_seed
from worker.network import Network
from worker.precision import Precision

FEWEST_TO_JUDGE = 100  # images of a validation part; with fewer, training images are held out
LARGEST_HELD_OUT = 2000
HELD_OUT_SHARE = 5  # of the training images at most one in five is held out


@dataclass(frozen=True)
class RaceParts:
    """Images to try rates on, in a random order, and to judge them by; `borrowed`: these are training images."""

    train: Split
    held_out: Split
    borrowed: bool
    whole: int

    def images(self, share: float) -> Split:
        """The first of them, as many as the part `share` (0 to 1) of the training part has."""
        count = max(2, min(len(self.train), round(share * self.whole)))
        return self.train.take(np.arange(count))


def race_parts(splits: Splits, seed: int) -> RaceParts:
    """What a race is run on: the validation part judges where it is large enough, else some training images."""
    whole = len(splits.train)
    order = np.random.default_rng(derive_seed(seed, "race")).permutation(whole)
    if len(splits.validation) >= FEWEST_TO_JUDGE:
        return RaceParts(splits.train.take(order), splits.validation, borrowed=False, whole=whole)
    count = max(1, min(LARGEST_HELD_OUT, whole // HELD_OUT_SHARE))
    return RaceParts(splits.train.take(order[count:]), splits.train.take(order[:count]), borrowed=True, whole=whole)


@torch.no_grad()
def losses_of(network: Network, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision) -> Tensor:
    """The cross-entropy of every image (N, float64, on the CPU), in eval mode; infinite where it is no number."""
    was_training = network.training
    network.eval()
    losses = []
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
