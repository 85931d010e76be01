"""The peers: `torch.nn.utils.prune` and Torch-Pruning, as one uses them on a plain PyTorch network.

    network = plain_network(job, dense)                       # the job's network from its own model.py, same weights
    network = remove_channels(network, job, allowed_macs, everywhere=True)
    found = retrain(network, job, epochs=5, rate=lambda progress: 0.01)

The loop is the one written by hand for this: SGD with Nesterov momentum and weight decay, or the job's own optimizer, on
the job's batches (the same images in the same order, augmented alike) and, as in a job, the epoch that is best on the
validation images is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune

from app.spec.job import Optimizer
from worker.evaluation import evaluate
from worker.export.pytorch_source import model_source
from worker.run.job import Job
from worker.training.optimizers import SGD, Muon, ParameterOptimizer

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BISECTIONS = 12
TEST_BATCH = 500


class PeerFailed(Exception):
    """The library raised, or left a network that does not run; the text is its own."""


def plain_network(job: Job, dense: Mapping[str, Tensor]) -> nn.Module:
    """The job's baseline as its delivered source builds it: plain torch, no import of ours."""
    scope: dict[str, Any] = {"__name__": "plain"}
    exec(model_source(job.plan.baseline, job.dataset.class_names, job.preprocessing), scope)
    network: nn.Module = scope["build"]()
    found = network.load_state_dict(dict(dense), strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in found.missing_keys), found.missing_keys
    return network.to(job.precision.device)


def zero_weights(network: nn.Module, sparsity: float, *, everywhere: bool) -> nn.Module:
    """Masks of the smallest weights: of all layers together, or of each layer."""
    layers = [(module, "weight") for module in network.modules() if isinstance(module, LAYERS)]
    if everywhere:
        prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=sparsity)
    else:
        for module, name in layers:
            prune.l1_unstructured(module, name, amount=sparsity)
    return network


def remove_channels(network: nn.Module, job: Job, allowed_macs: int, *, everywhere: bool) -> nn.Module:
    """The network after Torch-Pruning with the smallest ratio whose MACs are within `allowed_macs`.

    Its defaults: group magnitude with p = 2, normalised by the mean, all at once; the last layer is left whole.

    Raises PeerFailed where it raises, or where the smaller network does not run.
    """
    shape = job.plan.baseline.input_shape
    below, found = 1.0, None
    above = 0.0
    for _ in range(BISECTIONS):
        ratio = (below + above) / 2
        smaller = _pruned(network, shape, ratio, everywhere=everywhere)
        if count_macs(smaller, shape) <= allowed_macs:
            below, found = ratio, smaller
        else:
            above = ratio
    if found is None:
        raise PeerFailed(f"no ratio up to {above:.4f} reaches {allowed_macs} MACs")
    return found


def _pruned(network: nn.Module, shape: tuple[int, ...], ratio: float, *, everywhere: bool) -> nn.Module:
    import torch_pruning

    smaller = copy.deepcopy(network).eval()
    last = [module for module in smaller.modules() if isinstance(module, LAYERS)][-1]
    example = torch.zeros(1, *shape, device=next(smaller.parameters()).device)
    try:
        pruner = torch_pruning.pruner.BasePruner(
            smaller,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=everywhere,
            pruning_ratio=ratio,
            ignored_layers=[last],
        )
        pruner.step()
        with torch.no_grad():
            smaller(example)
    except Exception as error:
        raise PeerFailed(f"{type(error).__name__}: {error}") from error
    return smaller


@torch.no_grad()
def count_macs(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and linear layers for one example, by running it."""
    counted = 0

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal counted
        counted += module.weight[0].numel() * output[0].numel()

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, LAYERS)]
    mode = network.training
    network.eval()(torch.zeros(1, *shape, device=next(network.parameters()).device))
    network.train(mode)
    for hook in hooks:
        hook.remove()
    return counted


def widths(network: nn.Module) -> list[int]:
    """Output channels of each convolution and linear layer."""
    return [int(module.weight.shape[0]) for module in network.modules() if isinstance(module, LAYERS)]


def sparsity(network: nn.Module) -> float:
    """Part of the weights of convolutions and linear layers that is zero."""
    weights = [module.weight for module in network.modules() if isinstance(module, LAYERS)]
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def retrain(
    network: nn.Module, job: Job, *, epochs: int, rate: Callable[[float], float], as_the_job: bool = False
) -> None:
    """Train the network in place; `rate` maps progress (0 to 1) to the learning rate.

    By torch's SGD with the momentum and weight decay of a job's; `as_the_job`: by the optimizer of the job.
    """
    (number,) = (n for n, stage in enumerate(job.stages) if stage.phase == "retraining" and stage.attempt is None)
    batches = job.training_batches(number)
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous(memory_format=job.precision.memory_format(parameter.dim()))
    optimizer = _jobs_optimizer(network, job) if as_the_job else _plain_optimizer(network)
    steps, step = epochs * len(batches), 0
    best: tuple[tuple[float, float], dict[str, Tensor]] | None = None
    for epoch in range(epochs):
        network.train()
        for images, labels_N in batches.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate(step / steps)
            optimizer.zero_grad()
            with job.precision.autocast():
                logits_NK = network(images)
            torch.autograd.backward(F.cross_entropy(logits_NK.float(), labels_N))
            optimizer.step()
            step += 1
        if job.validation is not None:
            seen = evaluate(network, job.validation.epoch(0), job.precision)  # type: ignore[arg-type]
            rank = (seen.accuracy, -seen.loss)
            if best is None or rank > best[0]:
                best = (rank, copy.deepcopy(network.state_dict()))
    if best is not None:
        network.load_state_dict(best[1])


def _plain_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    usual = Optimizer(name="sgd")
    return torch.optim.SGD(
        network.parameters(),
        lr=usual.lr,
        momentum=usual.momentum,
        nesterov=usual.nesterov,
        weight_decay=usual.weight_decay,
    )


def _jobs_optimizer(network: nn.Module, job: Job) -> ParameterOptimizer:
    """The job's optimizer over a network whose layers may have other names."""
    how, parameters = job.training.optimizer, list(network.parameters())
    options: dict[str, Any] = {"lr": how.lr, "weight_decay": how.weight_decay}
    options |= {"momentum": how.momentum, "nesterov": how.nesterov}
    if how.name == "sgd":
        return SGD(parameters, **options)
    assert how.name == "muon"
    convolutions = [module for module in network.modules() if isinstance(module, LAYERS[:3])]
    inner = {parameter for module in convolutions[1:] if module.groups == 1 for parameter in module.parameters()}
    return Muon(parameters, inner=[p in inner and p.dim() > 1 for p in parameters], **options)


@torch.no_grad()
def accuracy(network: nn.Module, job: Job) -> float:
    """Part of the job's test images that the network classifies rightly, 0 to 1."""
    images, labels_N = job.splits.test.images, job.splits.test.labels
    right = 0
    network.eval()
    for start in range(0, len(labels_N), TEST_BATCH):
        ready = torch.from_numpy(job.preprocessing.apply(images[start : start + TEST_BATCH])).to(job.precision.device)
        answers = network(ready).argmax(1).cpu().numpy()
        right += int((answers == labels_N[start : start + TEST_BATCH]).sum())
    return right / len(labels_N)
