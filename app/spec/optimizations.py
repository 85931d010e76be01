"""The optimizations a job may ask for: one typed class each, with the default of each field that a job does not state."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Discriminator, Field, model_validator

from app.spec.low_rank import LowRank, Separable
from app.spec.prune import Prune
from app.spec.quantize import Quantize
from app.spec.retrain import Distillation, NetworkName
from app.spec.step import JobStep
from app.validation.strict import JobId, Names, fault


class _BeforeTraining(JobStep):
    """A step that changes the network before it is trained."""

    why_before_compressions = (
        "changes the network, and the weights that a compression ranks are those of the changed network"
    )


class _OfTraining(JobStep):
    """A step that acts on the training."""

    why_before_compressions = "acts on the training, which comes before compressions"


class Regularization(_OfTraining):
    """Terms of the loss, and decay in the optimizer, against overfitting: L = CE + l1 * sum |w| + l2 * sum w^2.

    Biases and normalisation parameters are left out unless `all`. `bn_l1` * sum |gamma| prepares `bn_scale` (Network
    Slimming, arXiv 1708.06519). `bn_l1` and `group_lasso` end with the last removal of channels: afterwards they would
    go on making small what was chosen to stay.
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
    bn_l1: Annotated[
        float,
        Field(ge=0, le=1, description="Coefficient of the sum of absolute batch-norm scales, until channels are gone."),
    ] = 0.0
    group_lasso: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Coefficient of the norms of channel groups: sum of sqrt(size) * |w of a class|_2. Until channels "
            "are gone.",
        ),
    ] = 0.0
    all: Annotated[bool, Field(description="l1 and l2 also over biases and normalisation parameters.")] = False

    title = "Regularization"
    examples = (
        {"type": "regularization", "l1": 1e-5, "l2": 1e-4},
        {"type": "regularization", "group_lasso": 1e-4},
        {"type": "regularization", "bn_l1": 1e-4},
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not (self.l1 or self.l2 or self.weight_decay or self.bn_l1 or self.group_lasso):
            raise fault("state at least one of: l1, l2, weight_decay, bn_l1, group_lasso, above 0")
        return self

    def without_preparation(self) -> Self:
        """The terms that do not only prepare a removal of channels."""
        return self.model_copy(update={"bn_l1": 0.0, "group_lasso": 0.0})


class InsertBatchNorm(_BeforeTraining):
    """Insert batch normalization after each convolution, before its activation (Ioffe & Szegedy, arXiv 1502.03167)."""

    type: Literal["batch_norm"] = "batch_norm"
    layers: Annotated[Names | None, Field(description="Only after these convolutions.")] = None

    title = "Insert batch normalization"
    examples = ({"type": "batch_norm"},)


class InsertDropout(_BeforeTraining):
    """Insert dropout before linear layers (Srivastava et al., JMLR 15, 2014)."""

    type: Literal["dropout"] = "dropout"
    p: Annotated[float, Field(gt=0, lt=1, description="Probability that an element becomes zero in training.")] = 0.5
    layers: Annotated[Names | None, Field(description="Only before these linear layers.")] = None

    title = "Insert dropout"
    examples = ({"type": "dropout", "p": 0.3},)


class InsertSpatialDropout(_BeforeTraining):
    """Insert dropout of whole channels after the activations of convolutions (Tompson et al., arXiv 1411.4280)."""

    type: Literal["spatial_dropout"] = "spatial_dropout"
    p: Annotated[float, Field(gt=0, lt=1, description="Probability that a channel becomes zero in training.")] = 0.5
    layers: Annotated[Names | None, Field(description="Only after these convolutions.")] = None

    title = "Insert spatial dropout"
    examples = ({"type": "spatial_dropout", "p": 0.1},)


class SmallKernels(_BeforeTraining):
    """Replace each convolution with a kernel of 4 or more by small ones (VGG, arXiv 1409.1556).

    k becomes (k - 1) / 2 kernels of 3, with one of 2 where k is even: same receptive field and output shape, the stride
    on the last, the dilation on all. Between them stand copies of the normalisation and activation that follow, so it
    is another function than before, cheaper where there are many input channels.
    """

    type: Literal["small_kernels"] = "small_kernels"
    layers: Annotated[Names | None, Field(description="Only these convolutions.")] = None

    title = "Smaller kernels"
    examples = ({"type": "small_kernels"},)


class Deeper(_BeforeTraining):
    """Insert `times` further blocks after the last block of each stage.

    A block is a convolution with its normalisation and its own activation; a stage is a run of blocks, in written order,
    whose outputs have one shape. Each further block is a 3 x 3 convolution (3 on every axis), stride 1, padding "same",
    as wide as what it reads and in as many groups as the block it follows, with copies of that block's normalisation
    and activation. The last layer is left alone.
    """

    type: Literal["deeper"] = "deeper"
    times: Annotated[int, Field(ge=1, le=32, description="Convolutions to insert at each place.")] = 1
    layers: Annotated[Names | None, Field(description="Only after these convolutions.")] = None

    title = "More depth"
    examples = ({"type": "deeper", "times": 2},)


class InsertShortcuts(_BeforeTraining):
    """Lay shortcuts around runs of convolutions (He et al., arXiv 1512.03385).

    A run is a chain of convolutions, each with its normalisation and its own activation, that have no shortcut yet; it
    is cut into pieces of two (the last of three where one would be left, and of one where a run has only one). The sum
    stands before the last activation of the piece. The shortcut is the identity where shapes are equal, else a 1 x 1
    convolution, its stride that of the piece, with batch norm. Pieces whose sizes do not follow from their strides
    (convolutions without padding) and the last layer are left alone.
    """

    type: Literal["residual"] = "residual"
    layers: Annotated[Names | None, Field(description="Only around these convolutions.")] = None

    title = "Residual connections"
    examples = ({"type": "residual"},)


class Distill(_OfTraining):
    """Train with a teacher, the network of a finished job: (1 - alpha) * CE + alpha * T^2 * KL (arXiv 1503.02531).

    It holds for the training before the first compression; retraining has a distillation of its own.
    """

    type: Literal["distill"] = "distill"
    teacher: Annotated[JobId, Field(description="A finished job with the same classes.")]
    artifact: Annotated[NetworkName, Field(description="Which network of that job.")] = "baseline"
    alpha: Annotated[float, Field(gt=0, le=1, description="Weight of the teacher's term.")] = 0.7
    temperature: Annotated[float, Field(ge=1, le=100, description="Temperature T of both softmaxes.")] = 4.0

    title = "Learn from another network"
    examples = ({"type": "distill", "teacher": "job_01JABCDEFGHJKMNPQRSTVWXYZ0", "alpha": 0.7, "temperature": 4.0},)

    def distillation(self) -> Distillation:
        """The same terms, as retraining states them."""
        return Distillation(
            alpha=self.alpha, temperature=self.temperature, teacher=self.teacher, artifact=self.artifact
        )


Rewrite = InsertBatchNorm | InsertDropout | InsertSpatialDropout | SmallKernels | Deeper | InsertShortcuts
"""What changes the network before it is trained."""
TrainingTerm = Regularization | Distill
"""What acts on the training."""
Compression = Prune | LowRank | Separable
"""What removes something from the trained network, and trains it again."""
Optimization = Annotated[Rewrite | TrainingTerm | Compression | Quantize, Discriminator("type")]

# the classes of the unions, in the order in which they are applied
REWRITES: tuple[type[JobStep], ...] = get_args(Rewrite)
TRAINING_TERMS: tuple[type[JobStep], ...] = get_args(TrainingTerm)
COMPRESSIONS: tuple[type[JobStep], ...] = get_args(Compression)
OPTIMIZATIONS: tuple[type[JobStep], ...] = get_args(get_args(Optimization)[0])
