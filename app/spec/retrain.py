"""What follows a removal: layers that are fitted again, and training with its teacher."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from app.validation.strict import JobId, Strict, fault

Policy = Literal["auto", "lr_rewind", "fine_tune", "weight_rewind", "none"]
NetworkName = Literal["pruned", "baseline"]
"""Which of the two networks of a finished job."""
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]
LearningRate = Annotated[float, Field(ge=1e-9, le=100)]


class Distillation(Strict):
    """Learn from a trained network, the teacher: (1 - alpha) * CE + alpha * T^2 * KL (Hinton et al., arXiv 1503.02531)."""

    alpha: Annotated[float, Field(gt=0, le=1, description="Weight of the teacher's term.")] = 0.7
    temperature: Annotated[float, Field(ge=1, le=100, description="Temperature T of both softmaxes.")] = 4.0
    teacher: Annotated[
        JobId | None,
        Field(description="A finished job whose network is the teacher; default: this job's own dense network."),
    ] = None
    artifact: Annotated[NetworkName, Field(description="Which network of that job.")] = "baseline"

    @model_validator(mode="after")
    def _artifact_has_a_job(self) -> Self:
        if self.teacher is None and "artifact" in self.model_fields_set and self.artifact != "baseline":
            raise fault("belongs to a teacher from another job: state teacher", field="artifact", value=self.artifact)
        return self


RECONSTRUCT = Field(
    description="Fit the layers behind the removal to what they gave before it, by least squares on training images without "
    "labels, before any retraining. Default: where it was measured to win: true for channels, and for all others with policy "
    "none."
)


class Retrain(Strict):
    """Training after the removal, with the training's batches and optimizer.

    `auto`: the rate falls in a line from the training's highest to 0. In a retraining of 8 epochs or more a race finds
    where it starts: one epoch of eight goes to short tries of several rates, and the best goes on; `lr` states it instead.
    `lr_rewind` runs the last epochs of the training's schedule again (Renda et al., arXiv 2003.02389).
    """

    policy: Annotated[
        Policy,
        Field(
            description="auto, lr_rewind, fine_tune, weight_rewind (masks only), or none: no training; layers are fitted "
            "again (reconstruct) and batch norm is recalibrated."
        ),
    ] = "auto"
    epochs: Annotated[
        int | None,
        Field(
            ge=0,
            le=1_000_000,
            description="Epochs; default: a third of the training epochs, at least 1; 0 with policy none.",
        ),
    ] = None
    lr: Annotated[
        LearningRate | None, Field(description="Highest rate of retraining; default: what the policy says.")
    ] = None
    distillation: Annotated[
        Distillation | None,
        Field(description="Default: with policy auto from the dense network (alpha 0.5, temperature 2); null: none."),
    ] = None

    @model_validator(mode="after")
    def _epochs_fit_policy(self) -> Self:
        if self.policy == "none":
            if self.epochs:
                raise fault(
                    "policy none does not retrain: leave epochs out, or choose auto",
                    field="epochs",
                    limit=0,
                    value=self.epochs,
                )
            if self.distillation is not None:
                raise fault("policy none does not retrain, so there is nothing to distil", field="distillation")
        elif self.epochs == 0:
            raise fault(
                f"policy {self.policy} needs at least one epoch; no training is policy none",
                field="epochs",
                limit=1,
                value=0,
            )
        return self
