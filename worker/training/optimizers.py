"""SGD, Adam and AdamW by the job's names: torch's formulas, to the bit, over all parameters at once.

torch.optim imports torch's compiler with the first optimizer: 3 to 4 seconds and 70 MB in every trainer, which
compiles nothing. These classes have what GradScaler and the masks ask of an optimizer: `param_groups`, `state`,
`step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from app.network.graph import Graph
from app.network.layers.convolutions import Conv
from app.network.layers.names import INPUT
from app.spec.job import Optimizer
from worker.network import Network

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
INNER_SHARE = 0.5  # of the rate, for orthogonal steps: found with the recipes (benchmarks/recipes.py)


class ParameterOptimizer(ABC):
    """Steps against the gradients of all parameters; `state` has what it remembers, parameter -> key -> tensor.

    Parameters with one factor on the learning rate are a group; the rate of a step is `lr` of its group, set before
    each step by the training loop, times `factor`. Without factors there is one group.
    """

    keys: tuple[str, ...] = ()

    def __init__(
        self, parameters: Sequence[Tensor], *, lr: float, weight_decay: float, factors: Sequence[float] = ()
    ) -> None:
        """`factors` has one factor on the learning rate for each parameter; empty: 1 for all."""
        self.parameters = list(parameters)
        self.weight_decay = weight_decay
        groups: dict[float, list[Tensor]] = {}
        for parameter, factor in zip(self.parameters, factors or [1.0] * len(self.parameters), strict=True):
            groups.setdefault(factor, []).append(parameter)
        self.param_groups: list[dict[str, Any]] = [
            {"params": members, "lr": lr, "factor": factor} for factor, members in groups.items()
        ]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.steps = 0

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step; parameters without a gradient stay as they are."""
        self.steps += 1
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moved:
                self._move(moved, [parameter.grad for parameter in moved], group["lr"] * group["factor"])

    @abstractmethod
    def _move(self, parameters: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        """Change the parameters in place."""

    def _memory(self, parameters: Sequence[Tensor], key: str) -> list[Tensor]:
        return [self.state[parameter][key] for parameter in parameters]


class SGD(ParameterOptimizer):
    """v <- momentum * v + g, w <- w - lr * v; with Nesterov w <- w - lr * (g + momentum * v).

    g includes weight_decay * w. Sutskever et al., ICML 2013, in torch's form: the first v is g, the rate is outside of
    v.
    """

    keys = ("momentum_buffer",)

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        factors: Sequence[float] = (),
    ) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, factors=factors)
        self.momentum = momentum
        self.nesterov = nesterov

    def _move(self, parameters: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        if self.weight_decay:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=self.weight_decay))
        if self.momentum:
            gradients = self._with_momentum(parameters, gradients)
        torch._foreach_add_(parameters, gradients, alpha=-rate)

    def _with_momentum(self, parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        known = [index for index, parameter in enumerate(parameters) if parameter in self.state]
        if known:
            buffers = self._memory([parameters[index] for index in known], "momentum_buffer")
            torch._foreach_mul_(buffers, self.momentum)
            torch._foreach_add_(buffers, [gradients[index] for index in known])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter not in self.state:
                self.state[parameter] = {"momentum_buffer": gradient.clone()}
        velocities = self._memory(parameters, "momentum_buffer")
        if not self.nesterov:
            return velocities
        return list(torch._foreach_add(gradients, velocities, alpha=self.momentum))


class Muon(SGD):
    """SGD whose steps on inner weights, a matrix each, are orthogonal: v is replaced by U V^T of its decomposition.

    All directions of a layer then move equally far, which takes fewer steps (Jordan et al., kellerjordan.github.io/
    posts/muon, in the form of torch.optim.Muon: five Newton-Schulz iterations, rate * sqrt(max(1, rows / columns))).
    Inner weights move at half the rate, and their weight decay is decoupled, as in AdamW: a gradient's length means
    nothing here, and the weights' would drown in it.
    """

    def __init__(self, parameters: Sequence[Tensor], *, inner: Sequence[bool], **options: Any) -> None:
        """`inner` says of each parameter whether its steps are orthogonal."""
        super().__init__(parameters, **options)
        self._inner = {parameter for parameter, is_inner in zip(parameters, inner, strict=True) if is_inner}

    def _move(self, parameters: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        outer = [index for index, parameter in enumerate(parameters) if parameter not in self._inner]
        if outer:
            super()._move([parameters[index] for index in outer], [gradients[index] for index in outer], rate)
        inner = [index for index, parameter in enumerate(parameters) if parameter in self._inner]
        if inner:
            moved = [parameters[index] for index in inner]
            for parameter, step in zip(moved, self._with_momentum(moved, [gradients[i] for i in inner]), strict=True):
                matrix = step.flatten(1)
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                own = rate * INNER_SHARE
                parameter.mul_(1 - own * self.weight_decay)
                parameter.add_(orthogonal(matrix).view_as(parameter), alpha=-own * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T: its singular values become 0.7 to 1.2, its directions stay.

    Five Newton-Schulz steps X <- a X + (b A + c A^2) X with A = X X^T, and the coefficients of Jordan et al., which rise
    fastest from 0.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Adam(ParameterOptimizer):
    """m <- b1 * m + (1 - b1) * g, v <- b2 * v + (1 - b2) * g^2, w <- w - lr * m' / (sqrt(v') + eps).

    m' and v' are m and v without their bias: Kingma & Ba, arXiv 1412.6980. `decoupled` is AdamW (Loshchilov & Hutter,
    arXiv 1711.05101): w shrinks by lr * weight_decay * w before the step; without it weight_decay * w is part of g.
    """

    keys = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
        factors: Sequence[float] = (),
    ) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, factors=factors)
        self.betas = betas
        self.eps = eps
        self.decoupled = decoupled

    def _move(self, parameters: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        first, second = self.betas
        for parameter in parameters:
            if parameter not in self.state:
                self.state[parameter] = {key: torch.zeros_like(parameter) for key in self.keys}
        if self.weight_decay and self.decoupled:
            torch._foreach_mul_(parameters, 1 - rate * self.weight_decay)
        elif self.weight_decay:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=self.weight_decay))
        means, squares = self._memory(parameters, "exp_avg"), self._memory(parameters, "exp_avg_sq")
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, (1 - second**self.steps) ** 0.5)
        torch._foreach_add_(scales, self.eps)
        torch._foreach_addcdiv_(parameters, means, scales, -(rate / (1 - first**self.steps)))


def build_optimizer(
    network: Network, spec: Optimizer, factors: Mapping[str, float] = MappingProxyType({})
) -> ParameterOptimizer:
    """A new optimizer, without memory, over the parameters of the network that train (`requires_grad`).

    `factors` has a factor on the learning rate for some layers, by name; the others have 1.
    """
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in trained]
    own = [factors.get(layer_of(name), 1.0) for name, _ in trained]
    if spec.name in ("sgd", "muon"):
        options: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay, "factors": own}
        options |= {"momentum": spec.momentum, "nesterov": spec.nesterov}
        if spec.name == "sgd":
            return SGD(parameters, **options)
        inner = inner_weights(network.graph)
        return Muon(parameters, inner=[name in inner for name, _ in trained], **options)
    return Adam(
        parameters,
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        betas=spec.betas,
        eps=spec.eps,
        decoupled=spec.name == "adamw",
        factors=own,
    )


def inner_weights(graph: Graph) -> set[str]:
    """The parameters that Muon takes as matrices: weights of ungrouped convolutions that do not read the images.

    Linear layers are left to SGD: the columns of the first follow places as well as channels, the last gives the class
    scores, and a matrix of 1024 x 1024 costs more than the rest of a step.
    """
    return {
        f"{node.name}.weight"
        for node in graph.nodes
        if isinstance(node.layer, Conv) and node.shares is None and node.inputs[0] != INPUT and node.layer.groups == 1
    }


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: `conv1` for `conv1.weight`."""
    return parameter.rpartition(".")[0]


def optimizer_tensors(optimizer: ParameterOptimizer, network: Network) -> dict[str, Tensor]:
    """What the optimizer remembers: `<parameter>/<key>` -> tensor, not copies; empty before the first step."""
    return {
        f"{name}/{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: ParameterOptimizer, network: Network, tensors: Mapping[str, Tensor], *, steps: int
) -> None:
    """Give a new optimizer the memory that `optimizer_tensors` named, after `steps` steps.

    Tensors get the layout of their parameters: the same values in another layout go through other kernels, which round
    otherwise.

    Raises KeyError for a parameter that the network does not have, RuntimeError for another shape.
    """
    parameters = dict(network.named_parameters())
    optimizer.steps = steps
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        if value.shape != parameter.shape:
            raise RuntimeError(f"{path} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")
        held = torch.empty_like(parameter, requires_grad=False).copy_(value)
        optimizer.state.setdefault(parameter, {})[key] = held
