"""What a job of kind `sensitivity` measures: for each group of channels the accuracy against the part kept.

On the validation part: who picks widths by the table wants test images that had no say in it.

The scope `sensitivity` of a prune step, which ranks channels by the loss, is another thing: `app/pruning/budget.py`.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from app.spec.prune import ChannelCriterion, Prune
from app.validation.strict import Strict, Text, fault

PARTS_KEPT = (0.9, 0.75, 0.5, 0.25, 0.1)
FEWEST_KEPT = 1e-6
ALMOST_ALL = 1 - FEWEST_KEPT
TRAINING_IMAGES = 4096  # that are evaluated where none is held out


class Sensitivity(Strict):
    """Each group of tied channels is cut alone, to several widths, without retraining (Li et al., arXiv 1608.08710).

    Each cut is the one that a prune step with this criterion and `sparsity` makes of that group.
    """

    kept: Annotated[
        tuple[Annotated[float, Field(ge=FEWEST_KEPT, lt=1)], ...],
        Field(min_length=1, max_length=32, description="Parts of a group's channels that are kept, falling."),
    ] = PARTS_KEPT
    criterion: Annotated[ChannelCriterion, Field(description="Which channels are removed first.")] = "l2"
    round_to: Annotated[int, Field(ge=1, le=1024, description="Widths are multiples of this.")] = 1
    exclude: Annotated[tuple[Text, ...], Field(max_length=10_000, description="Layers that are left alone.")] = ()
    images: Annotated[
        int | None,
        Field(
            ge=1,
            le=2**31 - 1,
            description="Images of the validation part that are evaluated; default: all. Where that part is empty, training "
            f"images; default: {TRAINING_IMAGES:,}. Never test images.",
        ),
    ] = None

    @model_validator(mode="after")
    def _parts_fall(self) -> Self:
        for position, (before, after) in enumerate(zip(self.kept, self.kept[1:], strict=False)):
            if after >= before:
                raise fault(
                    f"parts fall, but {after:g} follows {before:g}",
                    field=f"kept/{position + 1}",
                    limit=before,
                    value=after,
                )
        return self

    def step(self, kept: float) -> Prune:
        """The prune step that keeps this part of each group it touches."""
        return Prune(
            sparsity=1 - kept,
            structure="channels",
            scope="layer",
            criterion=self.criterion,
            round_to=self.round_to,
            exclude=self.exclude,
            max_sparsity=ALMOST_ALL,
        )
