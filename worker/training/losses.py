"""What a training makes small: cross-entropy, the terms of the mission's regularization, and the distance to a teacher's logits.

Axes: N batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from app.spec.optimizations import Regularization
from worker.network import Network
from worker.training.group_lasso import GroupLasso
from worker.training.optimizers import layer_of

MODULES_WITH_WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear)


def cross_entropy(logits_NK: Tensor, labels_N: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy in nats, a scalar; in float32 whatever precision the logits have."""
    return F.cross_entropy(logits_NK.float(), labels_N, label_smoothing=label_smoothing)


def distillation(student_NK: Tensor, teacher_NK: Tensor, *, temperature: float) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))`, the mean over the batch, a scalar.

    Hinton et al., arXiv 1503.02531.
    `batchmean` and not `mean`, which would divide by the number of classes too. T^2 keeps the size of the gradient the
    same for every temperature. The gradient is zero where student and teacher agree.
    """
    return temperature**2 * F.kl_div(
        F.log_softmax(student_NK.float() / temperature, dim=1),
        F.log_softmax(teacher_NK.float() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


class Penalty:
    """`l1 * sum |w| + l2 * sum w^2 + bn_l1 * sum |gamma|` and group lasso, for all regularizations of a job.

    `l1` and `l2` are over the weights of convolutions and linear layers, with `all` over every parameter. The square
    is not the norm: `l2` in the loss equals SGD's `weight_decay = 2 * l2`. Only what trains (`requires_grad`) counts in
    them; group lasso is over whole classes of channels, of which only what trains gets a gradient.
    """

    def __init__(self, network: Network, regularizations: Sequence[Regularization]) -> None:
        weights = _trained(module.weight for module in network.modules() if isinstance(module, MODULES_WITH_WEIGHTS))
        scales = _trained(module.weight for module in network.modules() if isinstance(module, _BatchNorm))
        everything = _trained(network.parameters())
        self._l1: list[tuple[float, list[Tensor]]] = []
        self._l2: list[tuple[float, list[Tensor]]] = []
        for part in regularizations:
            among = everything if part.all else weights
            self._l1 += [(part.l1, among)] if part.l1 and among else []
            self._l2 += [(part.l2, among)] if part.l2 and among else []
            self._l1 += [(part.bn_l1, scales)] if part.bn_l1 and scales else []
        self._group_factor = sum(part.group_lasso for part in regularizations)
        self._groups = GroupLasso(network) if self._group_factor else None

    def __bool__(self) -> bool:
        return bool(self._l1 or self._l2 or self._groups)

    def terms(self) -> dict[str, Tensor]:
        """The terms that the job has, "l1", "l2" and "group_lasso": scalars in the graph of the parameters."""
        absolute = [factor * _norms(tensors, 1).sum() for factor, tensors in self._l1]
        squared = [factor * (_norms(tensors, 2) ** 2).sum() for factor, tensors in self._l2]
        terms = {name: torch.stack(found).sum() for name, found in (("l1", absolute), ("l2", squared)) if found}
        return terms | ({"group_lasso": self._group_factor * self._groups.value()} if self._groups else {})


def decoupled_decay(
    network: Network, regularizations: Sequence[Regularization], factors: Mapping[str, float] = MappingProxyType({})
) -> list[tuple[float, list[Tensor]]]:
    """(weight decay, the parameters it shrinks) of each regularization that has one: `w -= lr * decay * w`.

    The weights of convolutions and linear layers, with `all` every parameter; of those only what trains. Layers with a
    factor on the learning rate have it in their decay.
    """
    weights = [module.weight for module in network.modules() if isinstance(module, MODULES_WITH_WEIGHTS)]
    own: dict[Tensor, float] = {
        parameter: factors.get(layer_of(name), 1.0) for name, parameter in network.named_parameters()
    }
    found: dict[tuple[int, float], list[Tensor]] = {}
    for position, part in enumerate(regularizations):
        for parameter in _trained(network.parameters() if part.all else weights) if part.weight_decay else ():
            found.setdefault((position, own[parameter]), []).append(parameter)
    return [
        ((regularizations[position].weight_decay or 0.0) * factor, parameters)
        for (position, factor), parameters in found.items()
    ]


def _trained(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.requires_grad]


def _norms(tensors: Sequence[Tensor], order: int) -> Tensor:
    # vector_norm has the gradient 0 at 0; sqrt(sum(w^2)) would have NaN at a pruned channel
    return torch.stack([torch.linalg.vector_norm(tensor, order) for tensor in tensors])
