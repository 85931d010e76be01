"""Layers that died, weights that are all alike, numbers that are none: a safe floor or a clear failure.

Warnings are errors here: a division by zero that numpy only warns about would fail.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from app.errors import Diverged, VerificationFailed
from app.network.cost import cost
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.pruning.budget import choose_removals
from app.pruning.channel_classes import channel_classes
from app.spec.low_rank import LowRank, Separable
from app.spec.prune import CHANNEL_CRITERIA, WEIGHT_CRITERIA, Criterion, Prune
from tests.support.jobs.tiny import task_of, tiny_data, tiny_layers, tiny_spec
from tests.support.networks.topologies import CLASSES, HEAD, PICTURE, conv, layer, pictures, topology, trained
from worker.compression.low_rank import replace_trained_layers
from worker.export.files import portable_tensors
from worker.export.folding import fold_batch_norms
from worker.journal import MemoryJournal
from worker.network import Network, build_network
from worker.pipeline import Delivered, run
from worker.pruning.importance import channel_scores
from worker.pruning.recalibration import recalibrate_batch_norm
from worker.pruning.surgery import masked_reference, shrink
from worker.pruning.weight_masks import weight_masks

WIDE = ["chain", "residual", "dense", "depthwise", "shuffle", "transposed", "shared"]


@torch.no_grad()
def no_weights(network: Network) -> None:
    """All parameters are zero, norms included."""
    for parameter in network.parameters():
        parameter.zero_()


@torch.no_grad()
def one_dead_layer(network: Network) -> None:
    """The first convolution gives zeros, whatever it sees."""
    name = next(node.name for node in network.graph.nodes if node.type == "conv")
    for key, parameter in network.named_parameters():
        if key.startswith(f"{name}."):
            parameter.zero_()


@torch.no_grad()
def all_alike(network: Network) -> None:
    """All weights are one number."""
    for parameter in network.parameters():
        parameter.fill_(0.25)


@torch.no_grad()
def deaf_head(network: Network) -> None:
    """The last layer with weights ignores its input: no gradient reaches the others."""
    last = [node.name for node in network.graph.nodes if node.type == "linear"][-1]
    network.get_parameter(f"{last}.weight").zero_()


DEATHS: dict[str, Callable[[Network], None]] = {
    made.__name__: made for made in (no_weights, one_dead_layer, all_alike, deaf_head)
}


def died(name: str, death: str) -> Network:
    network = trained(topology(name)).double()
    DEATHS[death](network)
    return network


def batches(network: Network) -> list[tuple[Tensor, Tensor]]:
    images = torch.from_numpy(pictures(network.graph, 6)).to(next(network.parameters()).dtype)
    return [(images, torch.arange(6) % CLASSES)]


def scores_of(network: Network, criterion: Criterion) -> dict[int, float]:
    classes = channel_classes(network.graph)
    return channel_scores(network, classes, criterion, seed=0, batches=batches(network))


def logits(network: Network) -> Tensor:
    with torch.no_grad():
        answer: Tensor = network.eval()(batches(network)[0][0])
    return answer


# --- channels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("death", DEATHS)
def test_channels_of_dead_networks_are_cut_to_the_budget_and_no_group_is_left_empty(name: str, death: str) -> None:
    network = died(name, death)
    graph, classes = network.graph, channel_classes(network.graph)
    for scope, criterion in zip(itertools.cycle(["layer", "global", "global"]), CHANNEL_CRITERIA, strict=False):
        scores = scores_of(network, criterion)
        assert sorted(scores) == classes.all().tolist()
        assert all(np.isfinite(score) and score >= 0 for score in scores.values()), criterion
        step = Prune.model_validate(
            {"type": "prune", "budget": {"macs": 0.6}, "round_to": 1, "scope": scope, "criterion": criterion}
        )
        removals = choose_removals(graph, classes, scores, step)
        smaller = shrink(network, classes, removals.dropped)
        assert cost(smaller.graph).macs <= 0.6 * cost(graph).macs
        for group in classes.groups:
            assert len(removals.dropped.intersection(group.classes.tolist())) < len(group.classes)
        difference = (logits(smaller) - logits(masked_reference(network, classes, removals.dropped))).abs().max()
        assert float(difference) <= 1e-10


@pytest.mark.parametrize("criterion", [criterion for criterion in CHANNEL_CRITERIA if criterion != "random"])
def test_where_all_scores_are_equal_the_first_channels_of_the_first_groups_leave(criterion: Criterion) -> None:
    layers = [conv(40, name="a"), layer("batch_norm"), layer("relu"), conv(40, name="b"), layer("relu"), *HEAD]
    network = build_network(build_graph(read_layers(layers), PICTURE), seed=0)
    no_weights(network)
    classes = channel_classes(network.graph)
    scores = scores_of(network, criterion)
    a, b = (classes.slots[name].ids.tolist() for name in "ab")
    assert {scores[c] for c in [*a, *b]} == {0.0}
    step = Prune(structure="channels", sparsity=0.25, round_to=1, criterion=criterion, scope="layer")
    assert choose_removals(network.graph, classes, scores, step).dropped == frozenset([*a[:10], *b[:10]])
    together = step.model_copy(update={"scope": "global"})
    assert choose_removals(network.graph, classes, scores, together).dropped == frozenset(a[:20])
    more = together.model_copy(update={"sparsity": 0.6})
    assert choose_removals(network.graph, classes, scores, more).dropped == frozenset(
        [*a[:36], *b[:12]]
    )  # a tenth stays


def test_where_no_gradient_arrives_taylor_is_zero_and_the_order_is_that_of_groups_and_slots() -> None:
    network = died("chain", "deaf_head")
    classes = channel_classes(network.graph)
    scores = scores_of(network, "taylor")
    assert set(scores.values()) == {0.0}
    step = Prune(structure="channels", sparsity=0.3, round_to=1, criterion="taylor", scope="global", max_sparsity=0.5)
    dropped = choose_removals(network.graph, classes, scores, step).dropped
    groups = [group.classes.tolist() for group in classes.groups if int(group.classes[0]) not in classes.pins]
    assert dropped == frozenset([*groups[0][:2], *groups[1][:2]])  # of 4, 5 and 6 channels 4 leave: two of each at most


def test_a_dead_group_leaves_before_the_others_but_not_whole() -> None:
    layers = [conv(20, name="a"), layer("relu"), conv(20, name="b"), layer("relu"), conv(20, name="c"), *HEAD]
    network = trained(build_graph(read_layers(layers), PICTURE))
    with torch.no_grad():
        for key in ("b.weight", "b.bias", "c.weight"):
            network.get_parameter(key).zero_()
    classes = channel_classes(network.graph)
    step = Prune(structure="channels", sparsity=0.25, round_to=1, criterion="l2", scope="global")
    removals = choose_removals(network.graph, classes, scores_of(network, "l2"), step)
    smaller = shrink(network, classes, removals.dropped)
    assert [smaller.graph[name].shape[0] for name in "abc"] == [20, 5, 20]
    step = step.model_copy(update={"sparsity": 0.5})
    removals = choose_removals(network.graph, classes, scores_of(network, "l2"), step)
    assert shrink(network, classes, removals.dropped).graph["b"].shape[0] == 2


@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused_by_name_whatever_the_criterion(
    criterion: Criterion, value: float
) -> None:
    for key in ("conv2.weight", "batch_norm1.bias", "linear1.bias"):
        network = trained(topology("chain"))
        with torch.no_grad():
            network.get_parameter(key).view(-1)[-1] = value
        with pytest.raises(Diverged, match=key.replace(".", r"\.")):
            scores_of(network, criterion)


def test_gradients_and_outputs_that_are_no_numbers_are_refused() -> None:
    network = trained(topology("chain"))
    classes, (images, labels) = channel_classes(network.graph), batches(network)[0]
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(Diverged, match="a gradient is not finite"):
        channel_scores(network, classes, "taylor", seed=0, batches=[(images, labels)])
    with pytest.raises(Diverged, match="an output of conv1 is not finite"):
        channel_scores(network, classes, "activation", seed=0, batches=[(images, labels)])
    network.get_buffer("batch_norm1.running_mean").fill_(float("nan"))
    for criterion in ("taylor", "activation"):
        with pytest.raises(Diverged):
            scores_of(network, criterion)


def test_scores_that_are_no_numbers_never_decide() -> None:
    graph = topology("chain")
    classes = channel_classes(graph)
    scores = dict.fromkeys(classes.all().tolist(), 1.0) | {int(classes.groups[1].classes[0]): float("nan")}
    step = Prune(structure="channels", sparsity=0.25, round_to=1)
    with pytest.raises(AssertionError, match="scores are finite"):
        choose_removals(graph, classes, scores, step)


# --- single weights --------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    **{criterion: {"criterion": criterion, "sparsity": 0.8} for criterion in WEIGHT_CRITERIA},
    "layer": {"scope": "layer", "sparsity": 0.8},
    "n:m": {"structure": "n:m", "pattern": "1:4"},
    "blocks": {"structure": "blocks", "block": (2, 2), "sparsity": 0.8},
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("form", FORMS)
def test_masks_of_dead_networks_have_the_count_that_was_asked_for_and_empty_no_layer(
    name: str, death: str, form: str
) -> None:
    network = died(name, death)
    step = Prune.model_validate({"type": "prune", "structure": "weights"} | FORMS[form])
    masks = weight_masks(network, step, step.sparsity, seed=0)
    sizes = {key: masks[key].numel() for key in masks}
    assert all(int(masks[key].sum()) >= 1 for key in masks)
    if "structure" not in FORMS[form]:
        each = [round(0.8 * size) for size in sizes.values()]
        assert masks.zeros() == (sum(each) if form == "layer" else round(0.8 * sum(sizes.values())))
    masks.apply(network)
    again = weight_masks(network, step, step.sparsity, seed=0, previous=masks)
    assert all(torch.equal(again[key], masks[key]) for key in masks)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_masks_of_weights_that_are_no_numbers_are_refused_by_name(form: str, value: float) -> None:
    network = trained(topology("chain"))
    with torch.no_grad():
        network.get_parameter("linear1.weight")[1, 1] = value
    step = Prune.model_validate({"type": "prune", "structure": "weights"} | FORMS[form])
    with pytest.raises(Diverged, match=r"linear1\.weight"):
        weight_masks(network, step, step.sparsity, seed=0)


# --- what else reads weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize(
    "step",
    [LowRank(rank=8), LowRank(energy=0.5), LowRank(budget={"params": 0.9}), Separable()],
    ids=["rank", "energy", "budget", "separable"],
)
def test_products_of_dead_layers_are_numbers_and_dead_themselves(death: str, step: LowRank | Separable) -> None:
    layers = [conv(32, name="a"), layer("batch_norm"), layer("relu"), conv(32, name="b"), layer("relu"), *HEAD]
    network = trained(build_graph(read_layers(layers), PICTURE)).double()
    DEATHS[death](network)
    smaller, outcomes = replace_trained_layers(network, step, baseline=cost(network.graph))
    assert any("parts" in outcome for outcome in outcomes.values())
    assert all(np.isfinite(outcome.get("relative_error", 0.0)) for outcome in outcomes.values())
    assert bool(torch.isfinite(logits(smaller)).all())
    if death in ("no_weights", "all_alike"):  # of rank one, or none: nothing is lost
        assert float((logits(smaller) - logits(network)).abs().max()) <= 1e-9 * (1 + float(logits(network).abs().max()))


def test_a_dead_layer_leaves_batch_norm_with_numbers_recalibrated_and_folded() -> None:
    network = died("chain", "one_dead_layer").float()
    recalibrate_batch_norm(network, [images for images, _ in batches(network)])
    assert bool((network.get_buffer("batch_norm1.running_var") == 0).all())
    assert bool(torch.isfinite(logits(network)).all())
    tensors = {name: tensor.numpy() for name, tensor in portable_tensors(network).items()}
    graph, folded = fold_batch_norms(network.graph, tensors)
    twin = build_network(graph)
    twin.load_state_dict({name: torch.from_numpy(value) for name, value in folded.items()}, strict=False)
    # where the variance is zero, norms enlarge rounding by 1 / sqrt(eps) = 316
    assert float((logits(twin) - logits(network)).abs().max()) <= 1e-3


# --- whole jobs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set of tiny jobs."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


def uploaded(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Weights for the network of tiny jobs, changed, where a worker finds uploaded ones."""
    network = build_network(build_graph(read_layers(tiny_layers()), (1, 8, 8)), seed=1)
    tensors = portable_tensors(network)
    change(tensors)
    (folder / "weights-w1").mkdir(parents=True)
    save_file(tensors, folder / "weights-w1" / "weights.safetensors")
    return folder


def all_zero(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.zero_()


def enormous(tensors: dict[str, Tensor]) -> None:
    """Each weight of the last layer is a number, their sum is none."""
    tensors["linear1.weight"].fill_(3e38)


def started(change: Callable[[dict[str, Tensor]], None], data: Path, folder: Path, **step: Any) -> Any:
    """The outcome of a job that prunes changed weights at once and does not train."""
    spec = tiny_spec({"type": "prune", "retrain": {"policy": "none"}} | step, training={"epochs": 0})
    spec["model"]["weights"] = "w1"
    return run(task_of(spec, data, folder / "run", sources=uploaded(folder / "sources", change)), MemoryJournal())


@pytest.mark.parametrize(
    "step",
    [
        {"budget": {"macs": 0.5}, "scope": "sensitivity", "criterion": "taylor"},
        {"structure": "weights", "sparsity": 0.5, "criterion": "lamp"},
    ],
    ids=["channels", "weights"],
)
def test_a_job_that_prunes_a_dead_network_delivers_what_was_asked_for(
    step: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    outcome = started(all_zero, data, tmp_path, **step)
    assert isinstance(outcome, Delivered)
    final, baseline = outcome.summary["final"], outcome.summary["baseline"]
    assert final["accuracy"] == baseline["accuracy"]  # every image is of the first class: all logits are zero
    if "budget" in step:
        assert final["macs"] <= 0.5 * baseline["macs"]


def test_a_job_whose_network_overflows_fails_and_delivers_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises((Diverged, VerificationFailed), match="finite"):
        started(enormous, data, tmp_path, structure="weights", sparsity=0.5)
