"""The optimizations a job may ask for: one typed class each, with the defaults that are used when nothing is said."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, model_validator

from app.spec.strict import Count, Strict, Text, fault

Structure = Literal["weights", "channels"]
Criterion = Literal["l1", "l2", "taylor", "bn_scale", "fpgm", "random"]
Scope = Literal["global", "layer"]
Policy = Literal["lr_rewind", "fine_tune", "weight_rewind", "none"]
Names = Annotated[tuple[Text, ...], Field(min_length=1, max_length=10_000)]
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]
Open01 = Annotated[float, Field(gt=0, lt=1)]
Amount = Annotated[int, Field(gt=0, le=2**53)] | Annotated[float, Field(gt=0, le=2**53)]
LearningRate = Annotated[float, Field(ge=1e-9, le=100)]

WEIGHT_CRITERIA: tuple[Criterion, ...] = ("l1", "l2", "random")


class Distillation(Strict):
    """The job's dense network teaches: (1 - alpha) * CE + alpha * T^2 * KL (Hinton et al., arXiv 1503.02531)."""

    alpha: Annotated[float, Field(gt=0, le=1, description="Weight of the teacher's term.")] = 0.7
    temperature: Annotated[float, Field(ge=1, le=100, description="Temperature T of both softmaxes.")] = 4.0


class Retrain(Strict):
    """Training after the removal; `lr_rewind` runs the last epochs of the schedule again (Renda, arXiv 2003.02389)."""

    policy: Annotated[
        Policy,
        Field(
            description="lr_rewind, fine_tune, weight_rewind (masks only), or none: batch norm is recalibrated only."
        ),
    ] = "lr_rewind"
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
    distillation: Distillation | None = None

    @model_validator(mode="after")
    def _epochs_fit_policy(self) -> Self:
        if self.policy == "none":
            if self.epochs:
                raise fault(
                    "policy none does not retrain: leave epochs out, or choose lr_rewind",
                    field="epochs",
                    limit=0,
                    value=self.epochs,
                )
            if self.distillation is not None:
                raise fault("policy none does not retrain, so there is nothing to distil", field="distillation")
        elif self.epochs == 0:
            raise fault(
                f"policy {self.policy} needs at least one epoch; recalibration only is policy none",
                field="epochs",
                limit=1,
                value=0,
            )
        return self


class PruneSchedule(Strict):
    """When how much goes: at once, in rounds with retraining, or along a cubic (Zhu & Gupta, arXiv 1710.01878)."""

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


class Budget(Strict):
    """How much of one cost may be left: a fraction kept (0 < f <= 1, of the baseline) or an integer above 1."""

    macs: Annotated[Amount | None, Field(description="Multiply-accumulates of one input.")] = None
    params: Annotated[Amount | None, Field(description="Trainable elements.")] = None
    bytes: Annotated[Amount | None, Field(description="Size of pruned.safetensors.")] = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        given = [(name, value) for name, value in self if value is not None]
        if len(given) != 1:
            raise fault("state exactly one of: macs, params, bytes")
        name, value = given[0]
        if value > 1 and not isinstance(value, int):
            raise fault(
                "a budget is a fraction kept (0 < f <= 1) or an integer above 1", field=name, limit=1, value=value
            )
        return self

    @property
    def measure(self) -> Literal["macs", "params", "bytes"]:
        """Which cost is bounded."""
        return "macs" if self.macs is not None else "params" if self.params is not None else "bytes"

    def allowed(self, dense: int) -> int:
        """The largest cost allowed, where the baseline's is `dense`: a fraction is rounded down."""
        value = getattr(self, self.measure)
        return int(value * dense) if value <= 1 else int(value)


class PruneOverride(Strict):
    """What is different for one layer."""

    sparsity: Annotated[float | None, Field(ge=0, lt=1, description="Part of this layer that goes.")] = None
    threshold: Annotated[
        float | None, Field(ge=0, le=1e6, description="Weights of this layer whose absolute value is below this go.")
    ] = None
    max_sparsity: Annotated[
        float | None, Field(ge=0, lt=1, description="Largest part of this layer's group that may go.")
    ] = None
    min_channels: Annotated[Count | None, Field(description="Fewest channels this layer keeps.")] = None
    round_to: Annotated[
        int | None, Field(ge=1, le=1024, description="Widths of this layer's group are multiples of this.")
    ] = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(value is None for _, value in self):
            raise fault("an override states at least one of: " + ", ".join(type(self).model_fields))
        if self.sparsity is not None and self.threshold is not None:
            raise fault("state sparsity or threshold, not both", field="threshold")
        return self


class Prune(Strict):
    """Remove weights (set to zero, and kept there) or whole channels (the network gets smaller), then train again.

    `sparsity` is the part that goes, a budget the part that is kept. `l1`, `l2`: Li et al., arXiv 1608.08710; `fpgm`:
    He et al., arXiv 1811.00250; `bn_scale`: Liu et al., arXiv 1708.06519; `taylor`: Molchanov et al., arXiv
    1906.10771.
    """

    type: Literal["prune"] = "prune"
    sparsity: Annotated[
        Open01 | None, Field(description="Part that goes: of the weights, or of each group's channels.")
    ] = None
    threshold: Annotated[
        float | None, Field(gt=0, le=1e6, description="Weights whose absolute value is below this go.")
    ] = None
    budget: Budget | None = None
    structure: Structure = Field(
        description="weights: zeros, same shape; channels: a smaller network, the default with a budget.",
        default_factory=lambda data: "weights" if data.get("budget") is None else "channels",
    )
    criterion: Annotated[Criterion, Field(description="How the worth of a weight or channel is measured.")] = "l2"
    scope: Scope = Field(
        description="Rank over all layers (default for weights), or the same part of each (default for channels).",
        default_factory=lambda data: "global" if data.get("structure") == "weights" else "layer",
    )
    schedule: PruneSchedule = PruneSchedule()
    retrain: Annotated[Retrain | None, Field(description="Default: a third of the training epochs, lr_rewind.")] = None
    exclude: Annotated[tuple[Text, ...], Field(max_length=10_000, description="Layers that are left alone.")] = ()
    overrides: dict[Text, PruneOverride] = Field(
        default_factory=dict, max_length=10_000, description="Layer name -> what is different for it."
    )
    round_to: Annotated[
        int, Field(ge=1, le=1024, description="channels: widths become multiples of this, which fast kernels need.")
    ] = 8
    min_channels: Annotated[Count, Field(description="channels: fewest channels a group keeps.")] = 1
    max_sparsity: Annotated[float, Field(gt=0, lt=1, description="channels: largest part of a group that may go.")] = (
        0.9
    )

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        given = [name for name in ("sparsity", "threshold", "budget") if getattr(self, name) is not None]
        if len(given) != 1:
            problem = "has none of them" if not given else "has " + " and ".join(given)
            raise fault(
                f"state exactly one of: sparsity, threshold, budget; this {problem}", field=given[1] if given else None
            )
        return self

    @model_validator(mode="after")
    def _fields_fit_structure(self) -> Self:
        if self.structure == "weights":
            self._check_weights()
        else:
            self._check_channels()
        return self

    def _check_weights(self) -> None:
        if self.budget is not None:
            raise fault(
                "a budget needs structure channels: zeros change neither MACs nor parameters nor bytes; state sparsity",
                field="budget",
            )
        if self.criterion not in WEIGHT_CRITERIA:
            raise fault(
                f"structure weights has the criteria {', '.join(WEIGHT_CRITERIA)}",
                field="criterion",
                value=self.criterion,
            )
        if self.threshold is not None and self.schedule.name != "one_shot":
            raise fault(
                "a threshold is applied at once: state sparsity for a schedule",
                field="schedule/name",
                value=self.schedule.name,
            )
        if self.threshold is not None and self.criterion == "random":
            raise fault("a threshold needs a criterion that measures size: l1 or l2", field="criterion", value="random")

    def _check_channels(self) -> None:
        if self.threshold is not None:
            raise fault(
                "a threshold is for structure weights; for channels state a budget or sparsity",
                field="threshold",
                value=self.threshold,
            )
        if self.schedule.name == "cubic":
            raise fault(
                "cubic is for structure weights; channels go one_shot or iterative",
                field="schedule/name",
                value="cubic",
            )
        if self.retrain is not None and self.retrain.policy == "weight_rewind":
            raise fault(
                "weight_rewind needs weights that keep their shape: structure weights",
                field="retrain/policy",
                value="weight_rewind",
            )


class Regularization(Strict):
    """Terms of the loss, and decay in the optimizer, against overfitting: L = CE + l1 * sum |w| + l2 * sum w^2.

    Biases and normalisation parameters are left out unless `all`. `bn_l1` * sum |gamma| prepares `bn_scale` (Network
    Slimming, arXiv 1708.06519).
    """

    type: Literal["regularization"] = "regularization"
    l1: Annotated[float, Field(ge=0, le=1, description="Coefficient of the sum of absolute weights.")] = 0.0
    l2: Annotated[
        float,
        Field(ge=0, le=1, description="Coefficient of the sum of squared weights; equals SGD's weight_decay = 2 * l2."),
    ] = 0.0
    weight_decay: Annotated[
        float | None, Field(ge=0, le=1, description="Decoupled decay, as in AdamW: w -= lr * weight_decay * w.")
    ] = None
    bn_l1: Annotated[float, Field(ge=0, le=1, description="Coefficient of the sum of absolute batch-norm scales.")] = (
        0.0
    )
    all: Annotated[bool, Field(description="l1 and l2 also over biases and normalisation parameters.")] = False

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not (self.l1 or self.l2 or self.weight_decay or self.bn_l1):
            raise fault("state at least one of: l1, l2, weight_decay, bn_l1, above 0")
        return self


class InsertBatchNorm(Strict):
    """Insert batch normalization after each convolution, before its activation (Ioffe & Szegedy, arXiv 1502.03167)."""

    type: Literal["batch_norm"] = "batch_norm"
    layers: Annotated[Names | None, Field(description="Only behind these convolutions.")] = None


class InsertDropout(Strict):
    """Insert dropout before linear layers (Srivastava et al., JMLR 15, 2014)."""

    type: Literal["dropout"] = "dropout"
    p: Annotated[float, Field(gt=0, lt=1, description="Probability that an element becomes zero in training.")] = 0.5
    layers: Annotated[Names | None, Field(description="Only before these linear layers.")] = None


class InsertSpatialDropout(Strict):
    """Insert dropout of whole channels after the activations of convolutions (Tompson et al., arXiv 1411.4280)."""

    type: Literal["spatial_dropout"] = "spatial_dropout"
    p: Annotated[float, Field(gt=0, lt=1, description="Probability that a channel becomes zero in training.")] = 0.5
    layers: Annotated[Names | None, Field(description="Only behind these convolutions.")] = None


class SmallKernels(Strict):
    """Replace each convolution with a kernel of 4 or more by small ones (VGG, arXiv 1409.1556).

    k becomes (k - 1) / 2 kernels of 3, with one of 2 where k is even: same receptive field and output shape, the stride
    on the last, the dilation on all. Between them stand copies of the normalisation and activation that follow, so it
    is another function than before, cheaper where there are many input channels.
    """

    type: Literal["small_kernels"] = "small_kernels"
    layers: Annotated[Names | None, Field(description="Only these convolutions.")] = None


class Deeper(Strict):
    """Insert `times` further blocks behind the last block of each stage.

    A block is a convolution with its normalisation and its own activation; a stage is a run of blocks, in written order,
    whose outputs have one shape. Each further block is a 3 x 3 convolution (3 on every axis), stride 1, padding "same",
    as wide as what it reads and in as many groups as the block it follows, with copies of that block's normalisation
    and activation. The last layer is left alone.
    """

    type: Literal["deeper"] = "deeper"
    times: Annotated[int, Field(ge=1, le=32, description="Convolutions to insert at each place.")] = 1
    layers: Annotated[Names | None, Field(description="Only behind these convolutions.")] = None


class InsertShortcuts(Strict):
    """Lay shortcuts around runs of convolutions (He et al., arXiv 1512.03385).

    A run is a chain of convolutions, each with its normalisation and its own activation, that have no shortcut yet; it
    is cut into pieces of two (the last of three where one would be left, and of one where a run has only one). The sum
    stands before the last activation of the piece. The shortcut is the identity where shapes are equal, else a 1 x 1
    convolution, its stride that of the piece, with batch norm. Pieces whose sizes do not follow from their strides
    (convolutions without padding) and the last layer are left alone.
    """

    type: Literal["residual"] = "residual"
    layers: Annotated[Names | None, Field(description="Only around these convolutions.")] = None


Rewrite = InsertBatchNorm | InsertDropout | InsertSpatialDropout | SmallKernels | Deeper | InsertShortcuts
Compression = Prune
Optimization = Annotated[
    InsertBatchNorm
    | InsertDropout
    | InsertSpatialDropout
    | SmallKernels
    | Deeper
    | InsertShortcuts
    | Regularization
    | Prune,
    Discriminator("type"),
]
REWRITES: tuple[type[Any], ...] = (
    InsertBatchNorm,
    InsertDropout,
    InsertSpatialDropout,
    SmallKernels,
    Deeper,
    InsertShortcuts,
)
COMPRESSIONS: tuple[type[Any], ...] = (Prune,)
OPTIMIZATIONS: tuple[type[Any], ...] = (*REWRITES, Regularization, *COMPRESSIONS)
