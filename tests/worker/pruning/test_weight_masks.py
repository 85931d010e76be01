"""Masks: exact counts, and zeros that stay zero through momentum, decay, averages and clipping."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from app.errors import Diverged, LayerEmptied
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.pruning.sparsity_allocation import erk_kept
from app.spec.prune import Prune, PruneOverride
from tests.support.networks.topologies import HEAD, PICTURE, conv, layer, topology, trained
from worker.network import Network
from worker.pruning.importance import prunable_weights, weight_scores
from worker.pruning.weight_masks import weight_masks
from worker.run.state import place_masks
from worker.training.masks import Masks


def prune(**fields: Any) -> Prune:
    return Prune.model_validate({"type": "prune", "structure": "weights"} | fields)


def network_of(seed: int = 0) -> Network:
    layers = [conv(6, name="a"), layer("batch_norm"), layer("relu"), conv(5, name="b"), *HEAD]
    return trained(build_graph(read_layers(layers), PICTURE), seed)


def flat(network: Network) -> Tensor:
    return torch.cat([weight.flatten() for weight in prunable_weights(network).values()])


def masks_of(network: Network, sparsity: float | None, previous: Masks | None = None, **fields: Any) -> Masks:
    if sparsity is not None and "threshold" not in fields:
        fields.setdefault("sparsity", max(0.001, sparsity))
    return weight_masks(network, prune(**fields), sparsity, seed=0, previous=previous)


STRUCTURES: dict[str, dict[str, Any]] = {
    "global": {"sparsity": 0.8},
    "layer": {"sparsity": 0.8, "scope": "layer"},
    "lamp": {"sparsity": 0.8, "criterion": "lamp"},
    "erk": {"sparsity": 0.8, "criterion": "erk"},
    "random": {"sparsity": 0.8, "criterion": "random"},
    "blocks": {"structure": "blocks", "block": (2, 2), "sparsity": 0.8},
    "n:m": {"structure": "n:m", "pattern": "1:3"},
}


@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp", "random"])
@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.9])
def test_the_global_scope_prunes_exactly_the_rounded_count_of_all_weights(criterion: str, sparsity: float) -> None:
    network = network_of()
    masks = masks_of(network, sparsity, criterion=criterion)
    assert masks.zeros() == round(sparsity * len(flat(network)))
    assert masks.sizes() == len(flat(network))
    assert list(masks) == ["a.weight", "b.weight", "linear1.weight"]


def test_the_weakest_weights_go_and_the_layer_scope_counts_each_tensor() -> None:
    network = network_of()
    masks = masks_of(network, 0.3)
    weakest = flat(network).abs().sort().values[masks.zeros() - 1]
    for name, weight in prunable_weights(network).items():
        assert torch.equal(masks[name] == 0, weight.abs() <= weakest)
    for name, weight in prunable_weights(network).items():
        each = masks_of(network, 0.3, scope="layer")[name]
        assert int((each == 0).sum()) == round(0.3 * weight.numel())
        assert weight[each == 0].abs().max() <= weight[each == 1].abs().min()


def test_half_counts_are_rounded_to_even() -> None:
    layers = [conv(5, 1, name="a", bias=False), *HEAD]
    network = trained(build_graph(read_layers(layers), (1, 4, 4)))
    masks = masks_of(network, 0.5, scope="layer")
    assert int((masks["a.weight"] == 0).sum()) == 2  # of 2.5
    assert int((masks["linear1.weight"] == 0).sum()) == 8  # of 7.5


@pytest.mark.parametrize("criterion", ["l2", "lamp", "erk"])
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.77, 0.95])
def test_the_count_is_exact_with_ties_and_with_zeros_from_before(criterion: str, sparsity: float) -> None:
    network = network_of()
    with torch.no_grad():
        for weight in prunable_weights(network).values():
            weight.mul_(8).round_().div_(8)  # few values, many of them zero
    earlier = masks_of(network, 0.4, scope="layer", exclude=("b",))
    earlier.apply(network)
    masks = masks_of(network, sparsity, earlier, criterion=criterion)
    assert masks.zeros() == max(round(sparsity * len(flat(network))), earlier.zeros())
    for name in earlier:
        assert not bool(((earlier[name] == 0) & (masks[name] == 1)).any())
    assert all(int(masks[name].sum()) >= 1 for name in masks)


@pytest.mark.parametrize("name", STRUCTURES)
def test_pruning_twice_is_pruning_once_whatever_the_form_of_the_zeros(name: str) -> None:
    network, step = network_of(), prune(**STRUCTURES[name])
    once = weight_masks(network, step, step.sparsity, seed=0)
    once.apply(network)
    again = weight_masks(network, step, step.sparsity, seed=0, previous=once)
    assert list(once) == list(again)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "n:m"])
def test_masks_that_grow_never_give_a_weight_back_and_end_where_one_cut_of_the_same_weights_ends(name: str) -> None:
    network, step = network_of(), prune(**STRUCTURES[name])
    masks: Masks | None = None
    for sparsity in (0.0, 0.3, 0.55, 0.7, 0.8):
        grown = weight_masks(network, step, sparsity, seed=0, previous=masks)
        for key in masks or ():
            assert masks is not None
            assert not bool(((masks[key] == 0) & (grown[key] == 1)).any())
        masks = grown
        masks.apply(network)
    assert masks is not None
    assert masks.zeros() == weight_masks(network_of(), step, 0.8, seed=0).zeros()


def test_lamp_is_the_square_over_the_sum_of_those_that_are_not_smaller_and_the_largest_has_exactly_one() -> None:
    network = network_of()
    for name, weight in prunable_weights(network).items():
        scores = weight_scores(name, weight, "lamp", seed=0)
        squares = [value**2 for value in weight.abs().flatten().double().tolist()]
        order = sorted(range(len(squares)), key=lambda place: squares[place])
        for rank, place in enumerate(order):
            assert scores[place] == pytest.approx(squares[place] / math.fsum(squares[v] for v in order[rank:]))
        assert scores.max() == 1.0
    large = torch.linspace(1e-3, 1.0, 500_000)
    assert weight_scores("a", large, "lamp", seed=0)[-1] == 1.0
    assert not weight_scores("a", torch.zeros(5), "lamp", seed=0).any()


def test_lamp_spares_a_layer_of_small_weights_and_inside_a_layer_it_is_magnitude() -> None:
    network = network_of()
    with torch.no_grad():
        network.get_parameter("b.weight").mul_(1e-3)
    by_size, by_lamp = masks_of(network, 0.6), masks_of(network, 0.6, criterion="lamp")
    assert int(by_size["b.weight"].sum()) < 5
    assert float(by_lamp["b.weight"].mean()) > 0.2
    for name, weight in prunable_weights(network).items():
        size = weight.abs()
        assert size[by_lamp[name] == 0].max() <= size[by_lamp[name] == 1].min()


def test_erk_gives_each_layer_its_share_and_prunes_it_by_size() -> None:
    network = network_of()
    masks = masks_of(network, 0.7, criterion="erk")
    kept = {name: int(masks[name].sum()) for name in masks}
    shapes = {"a.weight": (6, 3, 3, 3), "b.weight": (5, 6, 3, 3), "linear1.weight": (3, 5)}
    sizes = {name: masks[name].numel() for name in masks}
    assert kept == erk_kept(shapes, sizes, sum(sizes.values()) - round(0.7 * sum(sizes.values())))
    assert kept["linear1.weight"] / 15 > kept["a.weight"] / 162 > kept["b.weight"] / 270
    for name, weight in prunable_weights(network).items():
        if kept[name] < weight.numel():
            assert weight[masks[name] == 0].abs().max() <= weight[masks[name] == 1].abs().min()


def test_ties_go_in_the_order_of_layers_and_elements_and_the_count_stays_exact() -> None:
    network = network_of()
    with torch.no_grad():
        for weight in prunable_weights(network).values():
            weight.fill_(0.25)
    masks = masks_of(network, 0.4)
    pruned = torch.cat([(masks[name] == 0).flatten() for name in masks])
    count = round(0.4 * len(pruned))
    assert int(pruned.sum()) == count
    last_of_a = masks["a.weight"].numel() - 1  # stays: a layer never loses all
    assert pruned.nonzero().flatten().tolist() == [place for place in range(count + 1) if place != last_of_a]


def test_old_zeros_count_and_more_sparsity_keeps_them_pruned() -> None:
    network = network_of()
    masks: Masks | None = None
    before: dict[str, Tensor] = {}
    for sparsity in (0.2, 0.5, 0.5, 0.4, 0.8):
        masks = masks_of(network, sparsity, masks)
        masks.apply(network)
        for name, mask in before.items():
            assert not bool(((mask == 0) & (masks[name] == 1)).any())
        before = {name: masks[name] for name in masks}
        zeros = int((flat(network) == 0).sum())
        assert zeros == masks.zeros()
        assert zeros == round({0.4: 0.5}.get(sparsity, sparsity) * len(flat(network)))


def test_pruning_twice_to_the_same_sparsity_is_pruning_once() -> None:
    network = network_of()
    once = masks_of(network, 0.7)
    once.apply(network)
    for again in (masks_of(network, 0.7, once), masks_of(network, 0.7)):
        assert all(torch.equal(once[name], again[name]) for name in once)


def test_every_layer_keeps_its_strongest_weight() -> None:
    network = network_of()
    with torch.no_grad():
        network.get_parameter("b.weight").mul_(1e-6)
    masks = masks_of(network, 0.99)
    weight = network.get_parameter("b.weight").detach()
    assert int(masks["b.weight"].sum()) == 1
    assert bool(masks["b.weight"].flatten()[weight.abs().argmax()] == 1)
    assert masks.zeros() == round(0.99 * len(flat(network)))


def test_excluded_layers_have_no_mask_and_leave_the_count() -> None:
    network = network_of()
    masks = masks_of(network, 0.5, exclude=("b",))
    assert list(masks) == ["a.weight", "linear1.weight"]
    assert masks.zeros() == round(0.5 * masks.sizes())


def test_overrides_count_on_their_own_and_go_as_far_as_the_others() -> None:
    network = network_of()
    overrides = {"a": PruneOverride(sparsity=0.25), "b": PruneOverride(threshold=0.1)}
    masks = weight_masks(network, prune(sparsity=0.75, overrides=overrides), 0.75, seed=0)
    a, b = (network.get_parameter(f"{name}.weight").detach() for name in "ab")
    assert int((masks["a.weight"] == 0).sum()) == round(0.25 * a.numel())
    assert torch.equal(masks["b.weight"] == 0, b.abs() < 0.1)
    assert int((masks["linear1.weight"] == 0).sum()) == round(0.75 * 15)
    start = weight_masks(network, prune(sparsity=0.75, overrides={"a": PruneOverride(sparsity=0.25)}), 0.0, seed=0)
    assert start.zeros() == 0
    half = weight_masks(network, prune(sparsity=0.75, overrides={"a": PruneOverride(sparsity=0.36)}), 0.5, seed=0)
    assert int((half["a.weight"] == 0).sum()) == round(0.2 * a.numel())  # 0.8 * 0.8 = 0.64, 0.5 * 0.5 = 0.25


def test_a_threshold_is_strict_absolute_and_compared_in_the_type_of_the_weight() -> None:
    network = network_of()
    with torch.no_grad():
        network.get_parameter("linear1.weight").copy_(torch.linspace(-1, 1, 15).view(3, 5))
        network.get_parameter("linear1.weight")[0, 0] = 0.7
    masks = masks_of(network, None, threshold=0.7, exclude=("a", "b"))
    weight = network.get_parameter("linear1.weight").detach()
    assert float(weight[0, 0]) < 0.7  # 0.7 is 0.69999999 in float32, and not below itself there
    assert bool(masks["linear1.weight"][0, 0] == 1)
    assert torch.equal(masks["linear1.weight"] == 0, weight.abs() < torch.tensor(0.7))
    tiny = masks_of(network, None, threshold=1e-30)
    assert tiny.zeros() == int((flat(network).abs() < 1e-30).sum()) == 0


def test_a_threshold_that_empties_a_layer_ends_the_job_with_its_name() -> None:
    network = network_of()
    with torch.no_grad():
        network.get_parameter("b.weight").mul_(0.01)
    with pytest.raises(LayerEmptied, match="no weight of layer b, whose largest is"):
        masks_of(network, None, threshold=0.05)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    network = network_of()
    with torch.no_grad():
        network.get_parameter("a.weight")[0, 0, 0, 0] = float("nan")
    with pytest.raises(Diverged, match=r"a\.weight"):
        masks_of(network, 0.5)


def is_plus_zero(tensor: Tensor) -> bool:
    return bool((tensor == 0).all()) and not bool(torch.signbit(tensor).any())


def pruned_of(masks: Masks, tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name][masks[name] == 0] for name in masks])


def optimizer_of(name: str, network: Network) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(network.parameters(), lr=0.01, weight_decay=0.01)


class Trainer:
    """The order of one step as the module says it, on random data."""

    def __init__(self, name: str, structure: str = "global") -> None:
        self.structure = STRUCTURES[structure]
        self.network = network_of().train()
        self.optimizer = optimizer_of(name, self.network)
        self.average = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        self.masks: Masks | None = None
        self.generator = torch.Generator().manual_seed(1)

    def prune(self, sparsity: float) -> Masks:
        step = prune(**self.structure | ({} if "pattern" in self.structure else {"sparsity": sparsity}))
        self.masks = weight_masks(self.network, step, step.sparsity, seed=0, previous=self.masks)
        self.masks.apply(self.network)
        self.masks.mask_optimizer(self.optimizer, self.network)
        self.masks.mask_tensors(self.average)
        return self.masks

    def step(self, *, hold_weights: bool = True, autocast: bool = False) -> None:
        images = torch.randn(4, *PICTURE, generator=self.generator)
        labels = torch.randint(0, 3, (4,), generator=self.generator)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = self.network(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        if self.masks:
            self.masks.mask_gradients(self.network)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        if self.masks and hold_weights:
            self.masks.apply(self.network)
        for name, parameter in self.network.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.05)
        if self.masks:
            self.masks.mask_tensors(self.average)


@pytest.mark.parametrize(
    ("name", "autocast", "structure"),
    [
        *[(name, autocast, "global") for name in ("sgd", "adam", "adamw") for autocast in (False, True)],
        *[("sgd", False, structure) for structure in ("lamp", "erk", "blocks", "n:m")],
        *[("adamw", True, structure) for structure in ("blocks", "n:m")],
    ],
)
def test_zeros_stay_plus_zero_over_fifty_steps(name: str, autocast: bool, structure: str) -> None:
    trainer = Trainer(name, structure)
    for _ in range(5):
        trainer.step(autocast=autocast)
    masks = trainer.prune(0.8)
    for step in range(50):
        if step == 20:
            masks = trainer.prune(0.9)
        trainer.step(autocast=autocast)
        assert is_plus_zero(pruned_of(masks, dict(trainer.network.named_parameters())))
        assert is_plus_zero(pruned_of(masks, trainer.average))
    assert int((flat(trainer.network) == 0).sum()) == masks.zeros() > 0
    for parameter_name, parameter in trainer.network.named_parameters():
        for value in trainer.optimizer.state[parameter].values():
            if parameter_name in masks and value.shape == parameter.shape:
                assert bool((value[masks[parameter_name] == 0] == 0).all())


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_masked_gradients_and_state_alone_already_hold_the_zeros(name: str) -> None:
    """Each of the two is needed: this one shows that the optimizer's memory is really empty."""
    trainer = Trainer(name)
    for _ in range(5):
        trainer.step()
    masks = trainer.prune(0.8)
    for _ in range(10):
        trainer.step(hold_weights=False)
    assert bool((pruned_of(masks, dict(trainer.network.named_parameters())) == 0).all())


def test_without_the_masked_state_momentum_brings_pruned_weights_back() -> None:
    trainer = Trainer("sgd")
    for _ in range(5):
        trainer.step()
    trainer.masks = masks = masks_of(trainer.network, 0.8)
    masks.apply(trainer.network)
    trainer.step(hold_weights=False)
    assert bool((pruned_of(masks, dict(trainer.network.named_parameters())) != 0).any())


@pytest.mark.parametrize("structure", ["global", "blocks", "n:m"])
def test_a_weight_does_not_jump_when_its_mask_opens(structure: str) -> None:
    trainer = Trainer("sgd", structure)
    for _ in range(5):
        trainer.step()
    masks = trainer.prune(0.8)
    for _ in range(5):
        trainer.step()
    trainer.masks = None
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.0
    for parameter in trainer.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    assert bool((pruned_of(masks, dict(trainer.network.named_parameters())) == 0).all())


def test_dead_weights_do_not_count_in_the_norm_that_is_clipped() -> None:
    network = network_of()
    masks = masks_of(network, 0.5)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    masks.mask_gradients(network)
    assert int((torch.cat([p.grad.flatten() for p in network.parameters()]) == 0).sum()) == masks.zeros()  # type: ignore[union-attr]


def test_masks_survive_a_checkpoint_bit_for_bit() -> None:
    network = network_of()
    masks = masks_of(network, 0.6)
    state = masks.state()
    assert all(tensor.dtype == torch.bool for tensor in state.values())
    again = place_masks(state, network)
    assert list(again) == list(masks)
    assert all(torch.equal(again[name], masks[name]) for name in masks)
    other = copy.deepcopy(network)
    masks.apply(network)
    again.apply(other)
    assert torch.equal(flat(network), flat(other))


def test_masks_follow_another_network_of_the_same_shape() -> None:
    one, other = network_of(0), network_of(1)
    masks = masks_of(one, 0.5)
    masks.apply(one)
    masks.apply(other)
    for name in masks:
        assert is_plus_zero(other.get_parameter(name).detach()[masks[name] == 0])


def test_a_mask_has_the_memory_layout_of_its_weight_and_names_the_same_elements() -> None:
    plain, last = network_of(), network_of().to(memory_format=torch.channels_last)
    one, other = masks_of(plain, 0.5), masks_of(last, 0.5)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert other["b.weight"].is_contiguous(memory_format=torch.channels_last)


def test_biases_norms_and_prelu_are_never_pruned() -> None:
    network = trained(topology("chain"))
    assert set(masks_of(network, 0.5)) == {"conv1.weight", "conv2.weight", "linear1.weight", "linear2.weight"}
