"""The images of a race (`worker/training/race.py`): some to try rates on, others to judge them by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worker.data.dataset import Split, Splits, derive_seed

FEWEST_TO_JUDGE = 100  # images of a validation part; with fewer, training images are held out
LARGEST_HELD_OUT = 2000
HELD_OUT_SHARE = 5  # of the training images at most one in five is held out


@dataclass(frozen=True)
class RaceImages:
    """Images to try rates on, in a random order, and to judge them by; `borrowed`: these are training images."""

    train: Split
    held_out: Split
    borrowed: bool
    whole: int

    def images(self, share: float) -> Split:
        """The first of them, as many as the part `share` (0 to 1) of the training part has."""
        count = min(len(self.train), max(2, round(share * self.whole)))
        return self.train.take(np.arange(count))


def race_images(splits: Splits, seed: int) -> RaceImages:
    """What a race is run on: the validation part judges where it is large enough, else some training images."""
    whole = len(splits.train)
    order = np.random.default_rng(derive_seed(seed, "race")).permutation(whole)
    if len(splits.validation) >= FEWEST_TO_JUDGE or whole < 2:
        return RaceImages(splits.train.take(order), splits.validation, borrowed=False, whole=whole)
    count = max(1, min(LARGEST_HELD_OUT, whole // HELD_OUT_SHARE))
    return RaceImages(splits.train.take(order[count:]), splits.train.take(order[:count]), borrowed=True, whole=whole)
