"""How good a network is: accuracy, loss, and both per class.

Choices are made on the validation part (`evaluate`, on the device, while training); what is reported is measured on
the test part, from the logits of the very images (`score`).

Axes: N batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from worker.network import Network
from worker.precision import Precision

NO_LOSS = float(np.finfo(np.float64).max)  # stands for NaN and infinity, which JSON does not have


@dataclass(frozen=True)
class Evaluation:
    """A network on one part of the data: accuracy (0 to 1) and mean cross-entropy in nats."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Scores:
    """A network on the test part: accuracy (0 to 1), mean cross-entropy in nats, right answers of each class."""

    accuracy: float
    loss: float
    correct: tuple[int, ...]
    examples: tuple[int, ...]

    def document(self) -> dict[str, Any]:
        """The scores as JSON values; `from_document` reads them back."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "correct": list(self.correct),
            "examples": list(self.examples),
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        """The scores that `document()` wrote."""
        return cls(document["accuracy"], document["loss"], tuple(document["correct"]), tuple(document["examples"]))


@torch.no_grad()
def evaluate(network: Network, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision) -> Evaluation:
    """Accuracy and loss over all batches, in eval mode; the network's mode is as before afterwards.

    Sums stay on the device until the end, in float64: the result does not depend on how the images were cut into
    batches but for the rounding of the network itself.

    A loss that is no number comes back as NO_LOSS. Raises ValueError where there is no image.
    """
    was_training = network.training
    network.eval()
    correct = torch.zeros((), dtype=torch.int64, device=precision.device)
    loss = torch.zeros((), dtype=torch.float64, device=precision.device)
    images_seen = 0
    for images, labels_N in batches:
        with precision.autocast():
            logits_NK = network(images)
        correct += (logits_NK.argmax(dim=1) == labels_N).sum()
        loss += F.cross_entropy(logits_NK.float(), labels_N, reduction="none").double().sum()
        images_seen += len(labels_N)
    network.train(was_training)
    if images_seen == 0:
        raise ValueError("nothing to evaluate: the part has no image")
    return Evaluation(float(correct) / images_seen, _finite(float(loss) / images_seen))


def score(logits_NK: NDArray[np.float32], labels_N: NDArray[np.int64]) -> Scores:
    """The scores of logits `N x K` against N class numbers; the loss is summed in float64.

    A loss that is no number comes back as NO_LOSS.
    """
    wide_NK = logits_NK.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of infinite logits
        wide_NK -= wide_NK.max(axis=1, keepdims=True)
        losses_N = np.log(np.exp(wide_NK).sum(axis=1)) - wide_NK[np.arange(len(labels_N)), labels_N]
    right_N = logits_NK.argmax(axis=1) == labels_N
    classes = logits_NK.shape[1]
    return Scores(
        accuracy=float(right_N.mean()),
        loss=_finite(float(losses_N.mean())),
        correct=tuple(int(count) for count in np.bincount(labels_N[right_N], minlength=classes)),
        examples=tuple(int(count) for count in np.bincount(labels_N, minlength=classes)),
    )


def _finite(loss: float) -> float:
    return loss if np.isfinite(loss) else NO_LOSS
