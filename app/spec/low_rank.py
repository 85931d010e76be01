"""Low rank and separable: convolutions and linear layers become products of smaller ones."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.spec.budget import Budget
from app.spec.retrain import RECONSTRUCT, Retrain
from app.spec.step import JobStep
from app.validation.strict import Count, Names, Text, fault


class _Replacing(JobStep):
    """A step that replaces layers by products of smaller ones, once; see `Prune` for the three properties."""

    rounds: ClassVar[int] = 1
    zeros: ClassVar[bool] = False
    change: ClassVar[str] = "layers are replaced"


class LowRank(_Replacing):
    """Replace trained convolutions and linear layers by products of smaller ones, then train again.

    Linear layers and 1 x 1 convolutions become two layers (SVD), larger kernels three: 1 x 1, kernel, 1 x 1 (Tucker-2
    with HOOI, Kim et al., arXiv 1511.06530), without one of the outer ones where it would save nothing. The last one
    keeps the layer's name. Grouped layers, those with fewer than 16 inputs or outputs, and those whose cost would not
    fall stay as they are, with the reason.
    """

    type: Literal["low_rank"] = "low_rank"
    rank: Annotated[Count | None, Field(description="Rank of every layer that it makes cheaper.")] = None
    energy: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Part of each layer's squared singular values that is kept, at least."),
    ] = None
    budget: Annotated[
        Budget | None, Field(description="Ranks are cut where that loses least, until the network meets it.")
    ] = None
    layers: Annotated[Names | None, Field(description="Only these layers.")] = None
    exclude: Annotated[tuple[Text, ...], Field(max_length=10_000, description="Layers that are left alone.")] = ()
    round_to: Annotated[int, Field(ge=1, le=1024, description="Ranks by energy and budget are multiples of this.")] = 8
    reconstruct: Annotated[bool | None, RECONSTRUCT] = None
    retrain: Annotated[Retrain | None, Field(description="Default: a third of the training epochs, policy auto.")] = (
        None
    )

    title = "Low-rank layers"
    examples = (
        {"type": "low_rank", "budget": {"macs": 0.5}},
        {"type": "low_rank", "rank": 16},
        {"type": "low_rank", "energy": 0.7, "exclude": ["conv1"]},
    )

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) != 1:
            problem = "has none of them" if not given else "has " + " and ".join(given)
            raise fault(
                f"state exactly one of: rank, energy, budget; this {problem}", field=given[1] if given else None
            )
        if self.budget is not None and self.budget.latency_ms is not None:
            raise fault("low_rank has budgets of macs, params and bytes", field="budget/latency_ms")
        _check_policy(self.retrain)
        return self


class Separable(_Replacing):
    """Replace trained convolutions by a depthwise and a 1 x 1 convolution, then train again (Chollet, arXiv 1610.02357).

    Both start from the best approximation of the trained weights: of each input channel the first singular vectors. The
    1 x 1 convolution keeps the layer's name. Grouped, transposed and 1 x 1 convolutions stay as they are, and those
    with fewer than 16 input channels.
    """

    type: Literal["separable"] = "separable"
    layers: Annotated[Names | None, Field(description="Only these convolutions.")] = None
    exclude: Annotated[tuple[Text, ...], Field(max_length=10_000, description="Layers that are left alone.")] = ()
    reconstruct: Annotated[bool | None, RECONSTRUCT] = None
    retrain: Annotated[Retrain | None, Field(description="Default: a third of the training epochs, policy auto.")] = (
        None
    )

    title = "Separable convolutions"
    examples = ({"type": "separable"},)

    @model_validator(mode="after")
    def _policy_fits(self) -> Self:
        _check_policy(self.retrain)
        return self


def _check_policy(retrain: Retrain | None) -> None:
    if retrain is not None and retrain.policy == "weight_rewind":
        raise fault("weight_rewind needs weights that keep their shape", field="retrain/policy", value="weight_rewind")
