"""Least-squares repair behind a cut: every layer that multiplies gives again what it gave before the removal.

    found = reconstruct(network, target, batches, kept=kept, masks=masks, frozen=frozen, seed=seed)

Layer by layer in the order of the graph, the weights become those that give the `target`'s outputs (of the channels that
are left) on the inputs that the repaired network has there: the reconstruction of He et al., arXiv 1707.06168, section
3.1 (ii), for whole networks, and under masks. Each fit is pulled towards the weights that the removal left, by the ridge
that is best on images that the fit has not seen, and is taken only if it is better there than none. Images need no labels.

Least squares shrink what they cannot reach, so a batch norm counts its statistics again as soon as what is before it has
been repaired: the layers behind it are fitted on what they will get. Where it keeps those of the network before until all
layers are fitted, 95 % zeros stay at 25 % accuracy in place of 51 %, and channels are the same (mnist1d, audio_cnn, before any
retraining); where it counts them before its own layer is fitted, the fit is worse than none.

The target is the network right before this removal, not the one after the first training: its channels and statistics of
batch norm are those that the cut network was sliced from, and between two removals the network has been trained.

What it costs is bounded by counts, not by a clock, so that the same call gives the same bits: a layer is left with the
reason where its inputs are too many, where its own equations cost too much, or where those before it have used up what
the whole network may cost (`products_within`).

Axes: N batch, C channels, x spatial, K classes; those of `normal_equations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from app.network.blocks import WEIGHTED
from app.network.cost import cost
from app.network.graph import Graph
from app.network.node import Node
from app.pruning.weight_matrix import weight_matrix
from worker.network import Network, Walk, assign_tensors, live_elements, snapshot, steps_of
from worker.precision import full_float32
from worker.pruning.eval_mode import eval_mode
from worker.pruning.normal_equations import (
    MOST_FEATURES,
    NormalEquations,
    NoSolution,
    assign_weights,
    choose_positions,
    feature_count,
    fit_cost,
    mask_of,
    rows_within,
    support_cost,
    weights_of,
)
from worker.pruning.product_fit import FactorPair, best_product, expanded_by
from worker.pruning.recalibration import recalibrate_batch_norm, recount
from worker.training.masks import Masks
from worker.training.micro_batches import joined_batches

RIDGES = (1e-2, 1e-1, 1.0)
MOST_IMAGES = 2560
JUDGING_PART = 5
"""One image of so many is not fitted on: it judges the fits."""
LIVE_BYTES = 512 << 20
"""What the outputs that both networks still need may take: a deep network on large pictures is fitted on fewer images."""
MOST_ROWS = 60_000
MOST_PRODUCTS = 30e9
"""Multiplications of one layer for its Gram matrix (but two rows for each feature), and again for its solutions under a mask."""
MOST_LAYER_PRODUCTS = 100e9
"""Multiplications of one layer in all: 5 s of a core."""
MOST_JOB_PRODUCTS = 200e9
"""Multiplications of all layers where an epoch of training takes fewer: 10 s of a core."""
EIGENVECTORS = 9
"""Multiplications for the eigenvectors of a symmetric matrix: about so many times the cube of its size."""
UNCHANGED = 1e-9
"""A relative squared error of a layer's outputs below this is rounding: the layer stays as it is."""

Outcome = dict[str, Any]
"""Of one layer: `reconstructed`; where it is true `output_error`, the relative squared errors of its outputs before and after
the fit, on images that it has not seen; where it is false `not_reconstructed`, the reason."""


@dataclass(frozen=True)
class Reconstruction:
    """What a reconstruction did: the outcome of each layer, and what the whole network gained.

    `divergence_before` and `divergence_after` are the mean Kullback-Leibler divergences (nats) of the class probabilities
    from those of the target, with batch norm recalibrated, on images that the fit has not seen; the weights with the smaller
    one are kept (`kept`). Where no layer was fitted there are none.
    """

    layers: Mapping[str, Outcome]
    images: int
    divergence_before: float | None = None
    divergence_after: float | None = None
    kept: bool = False

    def document(self) -> dict[str, Any]:
        """As JSON values, without the layers."""
        return {
            "images": self.images,
            "layers": sum(outcome["reconstructed"] for outcome in self.layers.values()),
            "divergence_before": _finite(self.divergence_before),
            "divergence_after": _finite(self.divergence_after),
            "kept": self.kept,
        }


@torch.no_grad()
def reconstruct(
    network: Network,
    target: Network,
    batches: Iterable[Tensor],
    *,
    kept: Mapping[str, Tensor] | None = None,
    masks: Masks | None = None,
    frozen: Collection[str] = (),
    ridges: Sequence[float] = RIDGES,
    seed: int = 0,
    products: float = MOST_JOB_PRODUCTS,
    look: Callable[[], None] = lambda: None,
) -> Reconstruction:
    """Fit the layers of `network` to the outputs of `target`, in place; keep the fit where it brings the network nearer.

    Where it is kept, batch norms behind the first fit have counted their statistics again. Weights keep shape, type and
    layout, zeros of the masks stay zeros, modes are as before. Layers whose outputs have not changed are left alone.
    The same call gives the same bits. Two images to fit on are needed, or every layer is left.

    Besides what both networks still need (`LIVE_BYTES`), a layer of `MOST_FEATURES` takes two Gram matrices of 42 MB, and two
    more while it is solved; those of a layer that is used at several places are kept to the end.

    Args:
        network: After the removal. A layer of it is fitted if `target` has one of its name.
        target: The network before the removal, on the same device.
        batches: Of training images N x C x ..., without augmentation; only as many are read as are needed.
        kept: By node, which channels of the target's output the network still has; all where a node is not named.
        masks: Where they have a layer's weight, only weights that live are fitted.
        frozen: Layers that stay as they are, batch norms with their statistics.
        ridges: How strongly a fit may be pulled to the present weights, relative to the mean square of the layer's inputs.
        seed: Of the positions that are looked at where a layer has very many.
        products: How many multiplications all fits may take together, in float64; forward passes are not counted.
        look: Called before every batch of every line of a forward pass and of sums, and before every solution; may raise to end
            it, and then the network is half repaired.
    """
    fitted, held_out = _divided(batches, images_within(target.graph, network.graph))
    images = sum(len(images_NCx) for images_NCx in fitted)
    if images < 2:
        reason = "two images to fit on are needed"
        return Reconstruction(
            {node.home: _left(reason) for node in network.graph.nodes if node.type in WEIGHTED}, images
        )
    before = snapshot(network)
    with eval_mode(network), eval_mode(target), full_float32():
        sweep = _Sweep(
            network, target, (fitted, held_out), kept or {}, masks, frozenset(frozen), ridges, seed, products, look
        )
        outcomes = sweep.run()
        if not any(outcome["reconstructed"] for outcome in outcomes.values()):
            return Reconstruction(outcomes, images)
        wanted = [target(images_NCx) for images_NCx in held_out]
        repaired = snapshot(network)
        after_fit = _recalibrated_divergence(network, fitted, held_out, wanted, frozen, look)
        assign_tensors(network, before)
        before_fit = _recalibrated_divergence(network, fitted, held_out, wanted, frozen, look)
        better = after_fit < before_fit or (math.isfinite(after_fit) and not math.isfinite(before_fit))
        assign_tensors(network, repaired if better else before)
    if not better:
        reason = "the network was no nearer to the one before, on images that the fit had not seen"
        outcomes = {name: _left(reason) if done["reconstructed"] else done for name, done in outcomes.items()}
    return Reconstruction(outcomes, images, before_fit, after_fit, better)


def products_within(graph: Graph, images: int) -> float:
    """How many multiplications may repair this network: those of an epoch of training on so many images, at least 2e11."""
    return max(MOST_JOB_PRODUCTS, 3.0 * cost(graph).macs * images)


def images_within(*graphs: Graph, limit_bytes: int = LIVE_BYTES) -> int:
    """How many images these networks can be walked through side by side, in float32: 1 to `MOST_IMAGES`."""
    elements = sum(live_elements(graph) for graph in graphs)
    return max(1, min(MOST_IMAGES, limit_bytes // (4 * elements)))


def _divided(batches: Iterable[Tensor], most: int) -> tuple[list[Tensor], list[Tensor]]:
    """(images to fit on, images to judge on), `most` together; a single one serves for both.

    No batch to fit on has one image alone where there are more: it has no variance.
    """
    taken: list[Tensor] = []
    count = 0
    for images_NCx in batches:
        taken.append(images_NCx)
        count += len(images_NCx)
        if count >= most:
            break
    if count == 0:
        raise ValueError("a reconstruction needs at least one image")
    if count == 1:
        return taken, taken
    count = max(2, min(count, most))
    judging = -(-count // JUDGING_PART)
    return joined_batches(_slice(taken, 0, count - judging)), list(_slice(taken, count - judging, count))


def _slice(batches: Sequence[Tensor], start: int, stop: int) -> Iterable[Tensor]:
    """The images from number `start` to `stop`, in the batches that they come in."""
    first = 0
    for images_NCx in batches:
        part = images_NCx[max(0, start - first) : max(0, stop - first)]
        if len(part):
            yield part
        first += len(images_NCx)


def _recalibrated_divergence(
    network: Network,
    fitted: Sequence[Tensor],
    held_out: Sequence[Tensor],
    wanted: Sequence[Tensor],
    frozen: Collection[str],
    look: Callable[[], None],
) -> float:
    recalibrate_batch_norm(network, _looking(fitted, look), frozen=frozen)
    total, images = 0.0, 0
    for images_NCx, wanted_NK in zip(_looking(held_out, look), wanted, strict=True):
        found_NK = F.log_softmax(network(images_NCx).double(), dim=1)
        wanted_log_NK = F.log_softmax(wanted_NK.double(), dim=1)
        total += float(F.kl_div(found_NK, wanted_log_NK, reduction="sum", log_target=True))
        images += len(images_NCx)
    return total / images


def _looking(batches: Iterable[Tensor], look: Callable[[], None]) -> Iterator[Tensor]:
    for images_NCx in batches:
        look()
        yield images_NCx


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _left(reason: str) -> Outcome:
    return {"reconstructed": False, "not_reconstructed": reason}


_UNCHANGED = _left("its outputs are what they were")


def _fitted(before: float, after: float) -> Outcome:
    return {"reconstructed": True, "output_error": [round(before, 6), round(after, 6)]}


# --- the walk ---------------------------------------------------------------------------------------------------------


class _Equations(NamedTuple):
    """Of one layer, on the images to fit on and on those to judge on."""

    fit: NormalEquations
    judge: NormalEquations


@dataclass
class _Sweep:
    """All fits of one reconstruction."""

    network: Network
    target: Network
    batches: tuple[Sequence[Tensor], Sequence[Tensor]]
    """To fit on, and to judge on."""
    kept: Mapping[str, Tensor]
    masks: Masks | None
    frozen: frozenset[str]
    ridges: Sequence[float]
    seed: int
    products: float
    look: Callable[[], None]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    sums: dict[str, _Equations] = field(default_factory=dict)
    """Of layers that are used at several places."""
    starts: dict[str, Tensor] = field(default_factory=dict)
    """Their weights before any fit."""
    moved: bool = False
    """Whether the walk has come to a layer whose outputs are others than before the removal."""
    paired: set[str] = field(default_factory=set)
    """The second layers of products whose two layers were found at once."""
    held: frozenset[str] = frozenset()
    """Layers that an earlier sweep has fitted for good."""
    left: float = 0.0
    """How many multiplications this walk may still take."""

    def run(self) -> dict[str, Outcome]:
        """The outcome of every layer with weights.

        A layer that is used at several places is fitted to all of them together as they are reached, so that what is between them
        was fitted behind weights that have changed since: a second sweep fits the others once more. Each may then take half
        of the multiplications.
        """
        original = snapshot(self.network)
        self._walk()
        if self.sums:
            self.held = frozenset(self.sums)
            shared = {name for name in original if name.rpartition(".")[0] in self.held}
            now = snapshot(self.network)
            assign_tensors(self.network, original | {name: now[name] for name in shared})
            self._walk()
        return self.outcomes

    def _walk(self) -> None:
        batches = [*self.batches[0], *self.batches[1]]
        walk, target = Walk(self.network, batches, self.look), Walk(self.target, batches, self.look)
        generator = torch.Generator().manual_seed(self.seed)
        graph, self.moved = self.network.graph, False
        self.paired.clear()
        shared = any(node.type in WEIGHTED and node.shares is not None for node in graph.nodes)
        self.left = self.products / (2 if shared else 1)
        for step in steps_of(self.network):
            node = graph[step.output]
            if node.type in WEIGHTED and node.home not in self.held | self.paired:
                self.outcomes[node.home] = self._outcome(node, walk, target, generator)
            elif node.type == "batch_norm" and self.moved and node.home not in self.frozen:
                self._recount(node, walk)
            walk.run(step)
            if node.type in WEIGHTED and not self.moved:
                self.moved = self._has_moved(node, walk, target)

    def _recount(self, node: Node, walk: Walk) -> None:
        """Count a batch norm's statistics on what it gets by now; one that is used at several places keeps them."""
        norm = self.network.get_submodule(node.home)
        assert isinstance(norm, _BatchNorm)
        if len(self.network.graph.places(node.home)) == 1:
            fitted = walk.values[: len(self.batches[0])]
            recount(norm, _looking((values[node.inputs[0]] for values in fitted), self.look))

    def _has_moved(self, node: Node, walk: Walk, target: Walk) -> bool:
        """Whether a layer that has just been run gives something else than before the removal; the first batch tells."""
        outcome = self.outcomes[node.home]
        if outcome["reconstructed"] or outcome == _UNCHANGED:
            return bool(outcome["reconstructed"])
        if node.name not in self.target.graph:
            return True
        target.run_until(node.name)
        found_NCx, wanted_NCx = walk.values[0][node.name], target.values[0][node.name]
        channels = self.kept.get(node.name)
        if channels is not None:
            wanted_NCx = wanted_NCx.index_select(1, channels.to(wanted_NCx.device))
        missed = float((found_NCx - wanted_NCx).double().square().sum())
        return not missed <= UNCHANGED * float(wanted_NCx.double().square().sum())

    def _outcome(self, node: Node, walk: Walk, target: Walk, generator: torch.Generator) -> Outcome:
        """Fit one layer to what the target has computed there."""
        if node.home in self.frozen:
            return _left("frozen")
        expand = expanded_by(self.network.graph, node, self.target.graph)
        named = node if expand is None else expand
        if named.name not in self.target.graph:
            return _left("the layer before the removal had no such output")
        features = feature_count(node)
        if features > MOST_FEATURES:
            return _left(f"{features} inputs of one output, more than {MOST_FEATURES}")
        mask = self._mask(node)
        if mask is not None and (solutions := len(self.ridges) * support_cost(mask)) > MOST_PRODUCTS:
            return _left(f"its equations take {solutions:.0e} multiplications, more than {MOST_PRODUCTS:.0e}")
        price = 0.0 if node.home in self.sums else self._price(node, expand, mask)
        if price > MOST_LAYER_PRODUCTS:
            return _left(f"its fit takes {price:.0e} multiplications, more than {MOST_LAYER_PRODUCTS:.0e}")
        if price > self.left:
            return _left(f"its fit takes {price:.0e} multiplications, more than the layers before it have left")
        target.run_until(named.name)
        equations = self._equations(node, named, walk, target, generator)
        first, images = len(self.batches[0][0]), sum(len(images_NCx) for part in self.batches for images_NCx in part)
        self.left -= price * first / images if equations is None else price
        return self._solve(node, expand, mask, equations)

    def _rows_of_an_image(self, node: Node) -> int:
        images = sum(len(images_NCx) for images_NCx in self.batches[0])
        groups = weight_matrix(node).groups
        rows = rows_within(feature_count(node), groups, most=MOST_ROWS, products=MOST_PRODUCTS)
        return max(1, rows // images)

    def _price(self, node: Node, expand: Node | None, mask: Tensor | None) -> float:
        """Multiplications of the fit of a layer at all of its places, and of the product of two."""
        named, ridges = node if expand is None else expand, len(self.ridges)
        images = sum(len(images_NCx) for part in self.batches for images_NCx in part)
        rows = images * min(self._rows_of_an_image(node), math.prod(node.shape[1:]))
        outputs = named.shape[0] // weight_matrix(node).groups
        price = fit_cost(node, rows, outputs, ridges, mask)
        if expand is not None:
            price += ridges * EIGENVECTORS * outputs**3
        return price * len(self.network.graph.places(node.home))

    def _mask(self, node: Node) -> Tensor | None:
        key = f"{node.home}.weight"
        if self.masks is None or key not in self.masks:
            return None
        return mask_of(node, self.network.get_submodule(node.home), self.masks[key])

    def _start(self, node: Node, expand: Node | None) -> Tensor:
        """The weights that a fit is pulled to: the layer's own, or those of a product of two."""
        module = self.network.get_submodule(node.home)
        if len(self.network.graph.places(node.home)) > 1:
            return self.starts.setdefault(node.home, weights_of(node, module))
        own = weights_of(node, module)
        if expand is None:
            return own
        return FactorPair(own[0], weights_of(expand, self.network.get_submodule(expand.home))[0]).weights()[None]

    def _equations(
        self, node: Node, named: Node, walk: Walk, target: Walk, generator: torch.Generator
    ) -> _Equations | None:
        """The sums over all batches; None where the first already shows that nothing has changed."""
        module, groups = self.network.get_submodule(named.home), weight_matrix(node).groups
        shared = len(self.network.graph.places(node.home)) > 1
        start = self._start(node, None if named is node else named)
        bias, width = module.bias is not None, named.shape[0] // groups
        fit, judge = (NormalEquations.of(node, bias=bias, outputs=width, device=start.device) for _ in range(2))
        equations = _Equations(fit, judge)
        if shared:
            equations = self.sums.setdefault(node.home, equations)
        fitted, most = len(self.batches[0]), self._rows_of_an_image(node)
        channels = self.kept.get(named.name)
        for number, (values, wanted) in enumerate(zip(walk.values, target.values, strict=True)):
            self.look()
            inputs_NCx = values[node.inputs[0]]
            positions_NM = choose_positions(node, len(inputs_NCx), most, generator)
            part = equations[0 if number < fitted else 1]
            part.add_layer(node, inputs_NCx, positions_NM, wanted[named.name], channels)
            if number == 0 and not shared and equations.fit.error(start) < UNCHANGED:
                return None
        return equations

    def _solve(self, node: Node, expand: Node | None, mask: Tensor | None, equations: _Equations | None) -> Outcome:
        """Give the layer (and the second one of a product) the best of the fits, if it is better than none."""
        start, module = self._start(node, expand), self.network.get_submodule(node.home)
        if node.home in self.sums:  # what an earlier place has found is to be found again, for all of them
            assign_weights(node, module, start)
        before = 0.0 if equations is None else equations.judge.error(start)
        if equations is None or max(before, equations.fit.error(start)) < UNCHANGED:
            return _UNCHANGED
        after, best = before, None
        for ridge in self.ridges:
            self.look()
            try:
                found = equations.fit.solve(start, ridge=ridge, mask_GOF=mask)
            except NoSolution:
                continue
            product = None if expand is None else best_product(equations.fit, found[0], node.shape[0])
            error = equations.judge.error(found if product is None else product.weights()[None])
            if error < after:
                after, best = error, found if product is None else product
        if best is None:
            return _left("no fit came nearer, on images that it had not seen")
        outcome = _fitted(before, after)
        if isinstance(best, Tensor):
            assign_weights(node, module, best)
            return outcome
        assert expand is not None
        assign_weights(node, module, best.inner[None])
        assign_weights(expand, self.network.get_submodule(expand.home), best.outer[None])
        self.outcomes[expand.home] = outcome
        self.paired.add(expand.home)
        return outcome
