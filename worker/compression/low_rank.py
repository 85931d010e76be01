"""Trained layers as products of smaller ones: SVD, Tucker-2, depthwise and 1 x 1.

    smaller, outcomes = replace_trained_layers(network, step, baseline=baseline)

Axes: O outputs, I inputs, K positions of the kernel, R and S ranks of inputs and outputs. Everything is computed in
float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.compression.factorization import Factorable, ProductLayers, Ranks, low_rank_layers
from app.compression.rank_selection import Spectra
from app.compression.replacement import replace_layers
from app.errors import BudgetMissed
from app.network.blocks import WEIGHTED
from app.network.cost import Cost
from app.network.graph import Graph
from app.network.layers.convolutions import ConvTranspose
from app.pruning.budget import BudgetUnreachable
from app.pruning.channel_rules import FloatArray
from app.spec.low_rank import LowRank, Separable
from worker.network import Network
from worker.pruning.importance import check_finite

NOTEWORTHY_DROP = 0.01  # of the accuracy
MOST_NAMED = 3
SWEEPS = 5  # of HOOI: the error falls in the first, and no more after the fifth

Outcomes = dict[str, dict[str, Any]]
"""Layer -> `parts` (names of the layers that replace it) and `relative_error` (|W - product| / |W|), or `reason`."""


class Factors(NamedTuple):
    """W (O x I x K) as expand (O x S) @ core (S x R x K) @ reduce (R x I); None: the identity."""

    reduce: Tensor | None
    core: Tensor
    expand: Tensor | None

    def layers(self) -> list[Tensor]:
        """The weights in the order of the forward pass, each as outputs x inputs x positions."""
        first = [] if self.reduce is None else [self.reduce[:, :, None]]
        return [*first, self.core, *([] if self.expand is None else [self.expand[:, :, None]])]

    def product(self) -> Tensor:
        """O x I x K."""
        weight = self.core
        if self.reduce is not None:
            weight = torch.einsum("srk,ri->sik", weight, self.reduce)
        return weight if self.expand is None else torch.einsum("sik,os->oik", weight, self.expand)


class Separated(NamedTuple):
    """W (O x I x K) as pointwise (O x I) times depthwise (I x K): one kernel for each input."""

    depthwise: Tensor
    pointwise: Tensor

    def layers(self) -> list[Tensor]:
        """The weights in the order of the forward pass, each as outputs x inputs of an output x positions."""
        return [self.depthwise[:, None], self.pointwise[:, :, None]]

    def product(self) -> Tensor:
        """O x I x K."""
        return self.pointwise[:, :, None] * self.depthwise


def replace_trained_layers(network: Network, step: LowRank | Separable, *, baseline: Cost) -> tuple[Network, Outcomes]:
    """(the network in which `step` has replaced its layers, on the same device; the outcome of every layer).

    The given network stays as it is, and is returned where nothing is replaced.

    Raises:
        BudgetMissed: the budget is below the cost with the smallest ranks.
        Diverged: a weight is not finite.
    """
    weights = {name: weight for name, weight in network.named_parameters() if name.endswith(".weight")}
    check_finite(weights)
    spectra = spectra_of(network, step) if isinstance(step, LowRank) and step.rank is None else None
    try:
        done = replace_layers(network.graph, step, spectra, baseline=baseline)
    except BudgetUnreachable as exc:
        raise BudgetMissed(str(exc)) from exc
    outcomes: Outcomes = {name: {"reason": reason} for name, reason in done.kept.items()}
    if not done.products:
        return network, outcomes
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    with torch.device("meta"):
        smaller = Network(done.graph)
    for name, product in done.products.items():
        weight_OIK = matrix_of(done.layers[name], network.get_parameter(f"{name}.weight"))
        factors = separated(weight_OIK) if isinstance(step, Separable) else factorized(weight_OIK, done.ranks[name])
        state |= _tensors(product, factors, state.pop(f"{name}.weight"), smaller)
        error = _relative_error(weight_OIK, factors)
        outcomes[name] = {"parts": [part_name for part_name, _ in product], "relative_error": error}
    # copies, each on its own memory: the given network stays as it is, and a checkpoint holds no more than it needs
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    smaller.load_state_dict(copies, strict=True, assign=True)
    smaller.train(network.training)
    return smaller, outcomes


@torch.no_grad()
def replaced_rows(network: Network, before: Graph, outcomes: Outcomes) -> list[dict[str, Any]]:
    """The report's `layers` of a step: each convolution and linear layer of the network `before` it.

    `weights`, `nonzero` and `sparsity` are of all layers that replace it; `parts` are these, each with its own width.
    """
    rows = []
    for node in before.nodes:
        if node.type not in WEIGHTED:
            continue
        outcome = outcomes.get(node.name, {})
        names = outcome.get("parts", [node.name])
        weights = [] if node.shares is not None else [network.get_parameter(f"{name}.weight") for name in names]
        count = sum(weight.numel() for weight in weights)
        nonzero = sum(int(torch.count_nonzero(weight)) for weight in weights)
        row: dict[str, Any] = {
            "name": node.name,
            "type": node.type,
            "channels_before": node.shape[0],
            "channels_after": network.graph[node.name].shape[0],
            "weights": count,
            "nonzero": nonzero,
            "sparsity": 1 - nonzero / count if count else 0.0,
        }
        if node.shares is not None:
            row["shares"] = node.shares
        if "parts" in outcome:
            parts = [network.graph[name] for name in names]
            row["parts"] = [{"name": part.name, "type": part.type, "channels": part.shape[0]} for part in parts]
            row["relative_error"] = round(outcome["relative_error"], 6)
        elif "reason" in outcome:
            row["reason"] = outcome["reason"]
        rows.append(row)
    return rows


def loss_note(kind: str, before: Mapping[str, Any], after: Mapping[str, Any], outcomes: Outcomes) -> str | None:
    """A sentence where the accuracy fell by more than a point, with the layers that are farthest from what they were."""
    drop = before["accuracy"] - after["accuracy"]
    errors = {name: outcome["relative_error"] for name, outcome in outcomes.items() if "relative_error" in outcome}
    if drop <= NOTEWORTHY_DROP or not errors:
        return None
    worst = sorted(errors, key=lambda name: -errors[name])[:MOST_NAMED]
    named = ", ".join(f"{name} {errors[name]:.0%}" for name in worst)
    advice = "Larger ranks, more" if kind == "low_rank" else "More"
    return (
        f"{kind} cost {100 * drop:.1f} points of accuracy: before retraining, its products differ from the trained weights by "
        f"{named} of their norm. {advice} epochs of retraining or distillation recover more of it."
    )


# --- decompositions ---------------------------------------------------------------------------------------------------


def factorized(weight_OIK: Tensor, ranks: Ranks, *, sweeps: int = SWEEPS) -> Factors:
    """The best product of these ranks: one (a matrix, K = 1), or those of inputs and outputs.

    One rank: the truncated SVD, its singular values as square roots on both sides. Two: Tucker-2 (Kim et al., arXiv
    1511.06530, section 3.1), found by higher-order orthogonal iteration (De Lathauwer et al. 2000, SIAM J. Matrix Anal.
    Appl. 21, 1324-1342) from the singular vectors of each side; a full rank needs no factor, and the other one is optimal then.
    """
    if len(ranks) == 1:
        left_OR, values_R, right_RI = torch.linalg.svd(weight_OIK[:, :, 0], full_matrices=False)
        roots_R = values_R[: ranks[0]].sqrt()
        expand_OS = left_OR[:, : ranks[0]] * roots_R
        reduce_RI = right_RI[: ranks[0]] * roots_R[:, None]
        return Factors(None, reduce_RI[:, :, None], expand_OS)
    outputs, inputs, _ = weight_OIK.shape
    rank_in, rank_out = ranks
    inner_IR = _leading(weight_OIK.transpose(0, 1), rank_in) if rank_in < inputs else None
    outer_OS = None
    if rank_out < outputs:
        for _ in range(sweeps if inner_IR is not None else 1):
            outer_OS = _leading(_on_inputs(weight_OIK, inner_IR), rank_out)
            if inner_IR is not None:
                inner_IR = _leading(_on_outputs(weight_OIK, outer_OS).transpose(0, 1), rank_in)
    core_SRK = _on_outputs(_on_inputs(weight_OIK, inner_IR), outer_OS)
    return Factors(None if inner_IR is None else inner_IR.T.contiguous(), core_SRK, outer_OS)


def separated(weight_OIK: Tensor) -> Separated:
    """One kernel for each input, and a 1 x 1 convolution.

    Of each input's filters, W[:, i] as O x K, the first singular vectors, with the root of the singular value on both
    sides: the best approximation with one kernel an input (Eckart & Young 1936).
    """
    left_IOM, values_IM, right_IMK = torch.linalg.svd(weight_OIK.transpose(0, 1), full_matrices=False)
    roots_I = values_IM[:, 0].sqrt()
    # an input that is not used keeps a kernel, so that it can be trained: its product is zero all the same
    scales_I = torch.where(roots_I > 0, roots_I, torch.ones_like(roots_I))
    return Separated(right_IMK[:, 0] * scales_I[:, None], (left_IOM[:, :, 0] * roots_I[:, None]).T)


def spectra_of(network: Network, step: LowRank) -> Spectra:
    """The energy that each layer loses with every rank, or every pair of ranks (inputs x outputs)."""
    layers, _ = low_rank_layers(network.graph, only=step.layers, exclude=step.exclude)
    found: dict[str, FloatArray] = {}
    for name, layer in layers.items():
        weight_OIK = matrix_of(layer, network.get_parameter(f"{name}.weight"))
        found[name] = _lost_by_matrix(weight_OIK[:, :, 0]) if layer.is_plain else _lost_by_tucker(weight_OIK)
    return found


def matrix_of(layer: Factorable, weight: Tensor) -> Tensor:
    """The layer's weight as O x I x K, float64, on the CPU."""
    weight = weight.detach().to(device="cpu", dtype=torch.float64)
    turned = weight.transpose(0, 1) if isinstance(layer.node.layer, ConvTranspose) else weight
    return turned.reshape(*turned.shape[:2], -1)


def _lost_by_matrix(weight_OI: Tensor) -> FloatArray:
    """The part of the squared singular values after the first 0, 1, ..., min(O, I); 0 of a zero matrix."""
    short = weight_OI if weight_OI.shape[0] <= weight_OI.shape[1] else weight_OI.T
    rising = torch.linalg.eigvalsh(short @ short.T).clamp(min=0).numpy()
    return np.concatenate([_part_of(np.cumsum(rising)[::-1]), [0.0]])


def _lost_by_tucker(weight_OIK: Tensor) -> FloatArray:
    """The part of the squares that truncating the higher-order SVD to R inputs and S outputs drops, (I + 1) x (O + 1)."""
    outputs, inputs, _ = weight_OIK.shape
    turned = _on_inputs(weight_OIK, _leading(weight_OIK.transpose(0, 1), inputs))
    squares_OI = _on_outputs(turned, _leading(weight_OIK, outputs)).square().sum(dim=2)
    kept_IO = np.zeros((inputs + 1, outputs + 1))
    kept_IO[1:, 1:] = squares_OI.T.numpy().cumsum(axis=0).cumsum(axis=1)
    return _part_of(kept_IO[-1, -1] - kept_IO)


def _part_of(left: FloatArray) -> FloatArray:
    """Divided by its largest entry, which stands first; of zero everywhere 0."""
    return left / max(float(left.flat[0]), np.finfo(np.float64).tiny)


def _leading(unfolded: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors of the tensor along its first axis, as columns, the strongest first."""
    matrix = unfolded.flatten(1)
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors  # their eigenvalues rise
    return vectors[:, -rank:].flip(1).contiguous()


def _on_inputs(weight_OIK: Tensor, inner_IR: Tensor | None) -> Tensor:
    return weight_OIK if inner_IR is None else torch.einsum("oik,ir->ork", weight_OIK, inner_IR)


def _on_outputs(weight_OIK: Tensor, outer_OS: Tensor | None) -> Tensor:
    return weight_OIK if outer_OS is None else torch.einsum("oik,os->sik", weight_OIK, outer_OS)


# --- from factors to tensors ------------------------------------------------------------------------------------------


def _tensors(
    product: ProductLayers, factors: Factors | Separated, old: Tensor, smaller: Network
) -> Mapping[str, Tensor]:
    """The weights of the layers that replace one, by key, of the type and on the device of the `old` weight."""
    found = {}
    for (name, part), weight in zip(product, factors.layers(), strict=True):
        turned = weight.transpose(0, 1) if isinstance(part.layer, ConvTranspose) else weight
        shape = smaller.get_parameter(f"{name}.weight").shape
        found[f"{name}.weight"] = turned.reshape(shape).to(device=old.device, dtype=old.dtype)
    return found


def _relative_error(weight_OIK: Tensor, factors: Factors | Separated) -> float:
    """|W - product| / |W|, Frobenius; 0 of a zero weight."""
    size = float(torch.linalg.vector_norm(weight_OIK))
    return float(torch.linalg.vector_norm(weight_OIK - factors.product())) / size if size else 0.0
