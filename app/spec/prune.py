"""Pruning as a job asks for it: what is removed, how much, ranked by what, when, and how the network trains again."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from app.spec.budget import Budget
from app.spec.retrain import RECONSTRUCT, Epochs, Retrain
from app.spec.step import JobStep
from app.validation.strict import Count, Strict, Text, fault, without_default

Structure = Literal["weights", "channels", "n:m", "blocks"]
Criterion = Literal["l1", "l2", "taylor", "bn_scale", "fpgm", "lamp", "activation", "erk", "random"]
NEED_GRADIENTS: frozenset[Criterion] = frozenset({"taylor"})
"""Criteria that are computed from gradients of the loss."""
ChannelCriterion = Literal["l1", "l2", "taylor", "bn_scale", "fpgm", "lamp", "activation", "random"]
RankingScope = Literal["global", "layer", "sensitivity", "learned"]
Open01 = Annotated[float, Field(gt=0, lt=1)]

WEIGHT_CRITERIA: tuple[Criterion, ...] = ("l1", "l2", "lamp", "erk", "random")
PATTERN_CRITERIA: tuple[Criterion, ...] = ("l1", "l2", "random")
CHANNEL_CRITERIA: tuple[ChannelCriterion, ...] = get_args(ChannelCriterion)
CRITERIA: dict[Structure, tuple[Criterion, ...]] = {
    "weights": WEIGHT_CRITERIA,
    "channels": CHANNEL_CRITERIA,
    "n:m": PATTERN_CRITERIA,
    "blocks": PATTERN_CRITERIA,
}
MOST_OF_A_PATTERN = 64
_PATTERN = r"^([0-9]{1,3}):([0-9]{1,3})$"


def _known_pattern(pattern: str) -> str:
    found = re.fullmatch(_PATTERN, pattern)
    if found is None:
        raise fault('must be two numbers with a colon: "2:4" keeps at most 2 of 4 weights in a row')
    kept, of = int(found[1]), int(found[2])
    if not 1 <= kept < of <= MOST_OF_A_PATTERN:
        raise fault(f"keeps N of M weights with 1 <= N < M <= {MOST_OF_A_PATTERN}", limit=MOST_OF_A_PATTERN)
    return f"{kept}:{of}"


def kept_of(pattern: str) -> tuple[int, int]:
    """(N, M) of a pattern "N:M": at most N of M weights in a row stay."""
    kept, of = pattern.split(":")
    return int(kept), int(of)


SparsityPattern = Annotated[
    str, AfterValidator(_known_pattern), WithJsonSchema({"type": "string", "pattern": _PATTERN})
]
Side = Annotated[int, Field(ge=1, le=1024)]


class PruneSchedule(Strict):
    """When how much is removed: at once, in rounds with retraining, or along a cubic (Zhu & Gupta, arXiv 1710.01878)."""

    name: Literal["one_shot", "iterative", "cubic"] = "one_shot"
    steps: int | None = Field(
        ge=1,
        le=1000,
        description="iterative: number of rounds; default 3.",
        default_factory=lambda data: 3 if data.get("name") == "iterative" else None,
    )
    epochs: Annotated[
        Epochs | None,
        Field(description="cubic: retraining epochs over which the sparsity rises; default: 70 % of them."),
    ] = None

    @model_validator(mode="after")
    def _fields_fit_name(self) -> Self:
        if self.name != "iterative" and self.steps is not None:
            raise fault(f"a {self.name} schedule has no steps: they belong to iterative", field="steps")
        if self.name == "iterative" and self.steps is None:
            raise fault("an iterative schedule needs its number of steps", field="steps")
        if self.name != "cubic" and self.epochs is not None:
            raise fault(f"a {self.name} schedule has no epochs: they belong to cubic", field="epochs")
        return self


class PruneOverride(Strict):
    """What is different for one layer."""

    sparsity: Annotated[float | None, Field(ge=0, lt=1, description="Part of this layer that is removed.")] = None
    threshold: Annotated[
        float | None,
        Field(ge=0, le=1e6, description="Weights of this layer whose absolute value is below this are removed."),
    ] = None
    max_sparsity: Annotated[
        float | None, Field(ge=0, lt=1, description="Largest part of this layer's group that may be removed.")
    ] = None
    min_channels: Annotated[Count | None, Field(description="Fewest channels this layer keeps.")] = None
    round_to: Annotated[
        int | None, Field(ge=1, le=1024, description="Widths of this layer's group are multiples of this.")
    ] = None
    pattern: Annotated[SparsityPattern | None, Field(description="n:m: this layer's pattern.")] = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(value is None for _, value in self):
            raise fault("an override states at least one of: " + ", ".join(type(self).model_fields))
        if self.sparsity is not None and self.threshold is not None:
            raise fault("state sparsity or threshold, not both", field="threshold")
        return self


def _structure(data: dict[str, object]) -> Structure:
    if data.get("pattern") is not None:
        return "n:m"
    if data.get("block") is not None:
        return "blocks"
    return "weights" if data.get("budget") is None else "channels"


def _scope(data: dict[str, object]) -> RankingScope:
    if data.get("structure") == "channels" and data.get("budget") is not None:
        return "sensitivity"
    by_rank = data.get("structure") in ("weights", "blocks") and data.get("criterion") != "erk"
    return "global" if by_rank else "layer"


class Prune(JobStep):
    """Remove weights (set to zero, and kept there) or whole channels (the network gets smaller), then train again.

    `sparsity` is the part that is removed, a budget the part that is kept. `n:m` keeps at most n of m weights in a row along
    the input channels, `blocks` removes whole blocks of the matrix of output and input channels. `lamp`: Lee et al.,
    arXiv 2010.07611; `erk` (layers' shares): Evci et al., arXiv 1911.11134; `l1`, `l2`: Li et al., arXiv 1608.08710; `fpgm`:
    He et al., arXiv 1811.00250; `bn_scale`: Liu et al., arXiv 1708.06519; `taylor`: Molchanov et al., arXiv
    1906.10771.
    """

    type: Literal["prune"] = "prune"
    sparsity: Annotated[
        Open01 | None, Field(description="Part that is removed: of the weights, or of each group's channels.")
    ] = None
    threshold: Annotated[
        float | None, Field(gt=0, le=1e6, description="Weights whose absolute value is below this are removed.")
    ] = None
    budget: Budget | None = None
    pattern: Annotated[SparsityPattern | None, Field(description='n:m: "2:4" keeps 2 of 4; default for n:m.')] = None
    block: Annotated[
        tuple[Side, Side] | None,
        Field(
            description="blocks: output x input channels of a block; default [4, 4]. All kernel positions are removed together."
        ),
    ] = None
    structure: Structure = Field(
        description="weights: zeros, same shape; channels: a smaller network, the default with a budget.",
        default_factory=_structure,
    )
    criterion: Annotated[
        Criterion,
        Field(
            description="How the worth of a weight or channel is measured. Default: l2; lamp for a sparsity of single "
            "weights of all layers together.",
            json_schema_extra=without_default,
        ),
    ] = "l2"
    scope: RankingScope = Field(
        description="Rank over all layers (default for weights), the same part of each (default for a sparsity of "
        "channels), first where the loss on training images rises least for what is saved (sensitivity; default for a "
        "budget), or by gates on all channels, learned within the budget while the weights stand still (learned, arXiv "
        "2111.09635).",
        default_factory=_scope,
    )
    schedule: PruneSchedule = PruneSchedule()
    retrain: Annotated[Retrain | None, Field(description="Default: a third of the training epochs, policy auto.")] = (
        None
    )
    reconstruct: Annotated[bool | None, RECONSTRUCT] = None
    exclude: Annotated[tuple[Text, ...], Field(max_length=10_000, description="Layers that are left alone.")] = ()
    overrides: dict[Text, PruneOverride] = Field(
        default_factory=dict, max_length=10_000, description="Layer name -> what is different for it."
    )
    round_to: Annotated[
        int | None,
        Field(
            ge=1,
            le=1024,
            description="channels: widths become multiples of this, which fast kernels need. Default: 16 for wide layers, "
            "less for narrow ones and where the target would be missed by more than a tenth; with latency_ms the block "
            "of the worker's kernels.",
        ),
    ] = None
    min_channels: Annotated[Count, Field(description="channels: fewest channels a group keeps.")] = 1
    max_sparsity: Annotated[
        float, Field(gt=0, lt=1, description="channels: largest part of a group that may be removed.")
    ] = 0.9

    title = "Prune weights or channels"
    examples = (
        {
            "type": "prune",
            "structure": "channels",
            "criterion": "l2",
            "budget": {"macs": 0.5},
            "schedule": {"name": "one_shot"},
            "retrain": {"epochs": 3, "policy": "lr_rewind"},
        },
        {"type": "prune", "budget": {"latency_ms": 0.6}, "criterion": "taylor"},
        {
            "type": "prune",
            "budget": {"params": 0.4},
            "schedule": {"name": "iterative", "steps": 3},
            "overrides": {"conv1": {"max_sparsity": 0.5}},
            "retrain": {"epochs": 2, "distillation": {"alpha": 0.7, "temperature": 4.0}},
        },
        {"type": "prune", "sparsity": 0.9, "criterion": "lamp", "schedule": {"name": "cubic"}},
        {"type": "prune", "sparsity": 0.9, "criterion": "erk", "overrides": {"conv1": {"sparsity": 0.5}}},
        {"type": "prune", "structure": "n:m", "pattern": "2:4"},
        {"type": "prune", "structure": "blocks", "block": [4, 4], "sparsity": 0.5},
    )
    may_repeat = True
    change: ClassVar[str] = "channels are removed"
    """What it does to shapes, where it does not set weights to zero, as a phrase."""

    @property
    def rounds(self) -> int:
        """How often something is removed, each time with retraining after it."""
        return self.schedule.steps or 1

    @property
    def zeros(self) -> bool:
        """Whether it sets weights to zero; else the network gets smaller."""
        return self.structure != "channels"

    @property
    def usual_criterion(self) -> Criterion:
        """The criterion where none is stated.

        Magnitudes of different layers do not compare: at 95 % zeros a whole layer may go, and a network with it. `lamp`
        weighs each against its own layer.
        """
        everywhere = self.structure == "weights" and self.scope == "global" and self.sparsity is not None
        return "lamp" if everywhere else "l2"

    @property
    def may_learn_gates(self) -> bool:
        """Whether scope `learned` can share the budget: channels within a cost that can be counted."""
        return self.structure == "channels" and self.budget is not None and self.budget.cost_measure is not None

    @property
    def kept_of(self) -> tuple[int, int]:
        """(N, M) of structure n:m: at most N of M weights in a row stay."""
        return kept_of(self.pattern or "2:4")

    @property
    def block_shape(self) -> tuple[int, int]:
        """Output and input channels of one block of structure blocks."""
        return self.block or (4, 4)

    @model_validator(mode="after")
    def _can_be_reconstructed(self) -> Self:
        if self.reconstruct and not self.may_reconstruct:
            gradual = "a cubic schedule removes while it trains"
            why = gradual if self.schedule.name == "cubic" else "weight_rewind goes back to weights of an earlier epoch"
            raise fault(f"{why}, so there is nothing to fit: leave it out", field="reconstruct", value=True)
        return self

    @property
    def may_reconstruct(self) -> bool:
        """Whether the layers behind a removal can be fitted to what they gave before it."""
        rewinds = self.retrain is not None and self.retrain.policy == "weight_rewind"
        return self.schedule.name != "cubic" and not rewinds

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.structure == "n:m":
            return self
        given = [name for name in ("sparsity", "threshold", "budget") if getattr(self, name) is not None]
        if len(given) != 1:
            problem = "has none of them" if not given else "has " + " and ".join(given)
            raise fault(
                f"state exactly one of: sparsity, threshold, budget; this {problem}", field=given[1] if given else None
            )
        return self

    @model_validator(mode="after")
    def _fields_fit_structure(self) -> Self:
        for field, structure in (("pattern", "n:m"), ("block", "blocks")):
            if self.structure != structure and getattr(self, field) is not None:
                raise fault(f"belongs to structure {structure}, not to {self.structure}", field=field)
        if self.criterion not in CRITERIA[self.structure]:
            raise fault(
                f"structure {self.structure} has the criteria {', '.join(CRITERIA[self.structure])}",
                field="criterion",
                value=self.criterion,
            )
        checks = {"n:m": self._check_pattern, "channels": self._check_channels}
        checks.get(self.structure, self._check_zeros)()
        return self

    def _check_pattern(self) -> None:
        for field in ("sparsity", "threshold", "budget"):
            if getattr(self, field) is not None:
                raise fault("structure n:m states by its pattern how much is removed", field=field)
        if self.schedule.name != "one_shot":
            raise fault("a pattern is applied at once: one_shot", field="schedule/name", value=self.schedule.name)
        if self.scope != "layer":
            raise fault("a pattern holds in every layer: scope layer", field="scope", value=self.scope)

    def _check_zeros(self) -> None:
        if self.scope in ("sensitivity", "learned"):
            raise fault(f"{self.scope} ranks groups of channels: structure channels", field="scope", value=self.scope)
        if self.budget is not None:
            raise fault(
                "a budget needs structure channels: zeros change neither MACs nor parameters nor bytes; state sparsity",
                field="budget",
            )
        if self.criterion == "erk" and self.scope == "global":
            raise fault("erk gives each layer a share of its own: scope layer", field="scope", value="global")
        if self.criterion == "lamp" and self.scope == "layer" and "scope" in self.model_fields_set:
            raise fault("lamp ranks over all layers: inside one it is l2; scope global", field="scope", value="layer")
        if self.threshold is None:
            return
        if self.structure == "blocks":
            raise fault("blocks are removed by sparsity", field="threshold", value=self.threshold)
        if self.schedule.name != "one_shot":
            raise fault(
                "a threshold is applied at once: state sparsity for a schedule",
                field="schedule/name",
                value=self.schedule.name,
            )
        if self.criterion not in ("l1", "l2"):
            raise fault(
                "a threshold needs a criterion that measures size: l1 or l2", field="criterion", value=self.criterion
            )

    def _check_channels(self) -> None:
        if self.scope in ("sensitivity", "learned") and self.budget is None:
            raise fault(f"{self.scope} shares out a budget: state one", field="scope", value=self.scope)
        if self.scope == "learned" and not self.may_learn_gates:
            raise fault(
                "gates are learned within a cost that can be counted: a budget of macs, params or bytes; a latency is "
                "shared out by scope sensitivity",
                field="scope",
                value=self.scope,
            )
        if self.threshold is not None:
            raise fault(
                "a threshold is for structure weights; for channels state a budget or sparsity",
                field="threshold",
                value=self.threshold,
            )
        if self.schedule.name == "cubic":
            raise fault(
                "cubic is for structure weights; channels are removed by one_shot or iterative",
                field="schedule/name",
                value="cubic",
            )
        if self.retrain is not None and self.retrain.policy == "weight_rewind":
            raise fault(
                "weight_rewind needs weights that keep their shape: structure weights",
                field="retrain/policy",
                value="weight_rewind",
            )
