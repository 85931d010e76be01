"""The training loop: what a step does, what is kept, and that it can be left and entered between any two steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from app.network.graph import Graph
from app.spec.job import Training
from app.spec.optimizations import Regularization
from app.spec.prune import Prune
from app.spec.retrain import Distillation
from tests.support.jobs.blobs import BlobBatches, graph_of, small_cnn
from worker.evaluation import evaluate
from worker.network import Network, build_network, snapshot
from worker.precision import Precision, choose_precision
from worker.pruning.weight_masks import weight_masks
from worker.run.state import place_masks
from worker.training.learning_rate import learning_rate
from worker.training.loop import EpochResult, Fit, NonFiniteLoss, Recipe, Window
from worker.training.losses import cross_entropy
from worker.training.masks import Masks
from worker.training.resume import fit_state, fit_tensors, restore_fit

SGD = {"name": "sgd", "lr": 0.05}
ADAMW = {"name": "adamw", "lr": 0.01}


class Leave(Exception):
    """A watch wants to leave."""


class Watching:
    """A watch that writes down what it is told, and leaves before the step it is asked to."""

    def __init__(self, leave_before: int | None = None) -> None:
        self.leave_before = leave_before
        self.windows: list[Window] = []
        self.epochs: list[EpochResult] = []
        self.steps = 0

    def before_step(self, fit: Fit) -> None:
        """Leave if it is time."""
        if fit.position.step == self.leave_before:
            fit.read_losses(self)
            raise Leave
        self.steps += 1

    def window(self, fit: Fit, window: Window) -> None:
        """Write it down."""
        self.windows.append(window)

    def epoch_finished(self, fit: Fit, result: EpochResult) -> None:
        """Write it down."""
        self.epochs.append(result)


def training(**fields: Any) -> Training:
    """A training of 3 epochs, SGD unless told otherwise."""
    return Training.model_validate({"epochs": 3, "batch_size": 8, "optimizer": SGD, "channels_last": True} | fields)


def recipe(settings: Training, **fields: Any) -> Recipe:
    """The recipe of a first training with these settings."""
    return Recipe("training", settings.epochs, learning_rate(settings), settings, settings.seed, **fields)


def start(
    settings: Training,
    *,
    graph: Graph | None = None,
    network: Network | None = None,
    batches: BlobBatches | None = None,
    validation: bool = True,
    masks: Masks | None = None,
    teacher: Network | None = None,
    micro_batches: int = 1,
    **fields: Any,
) -> Fit:
    """A fit at its first step."""
    precision = choose_precision(settings, "cpu", spatial_axes=2)
    network = network or build_network(graph or small_cnn(), seed=settings.seed)
    precision.to_device(network)
    return Fit(
        network,
        batches or BlobBatches(),
        recipe(settings, **fields),
        precision,
        validation=BlobBatches(24, seed=5, shuffle=False) if validation else None,
        masks=masks,
        teacher=teacher,
        micro_batches=micro_batches,
    )


def trained(settings: Training, **fields: Any) -> Fit:
    """A fit that ran to its end, without its conclusion."""
    fit = start(settings, **fields)
    fit.run(Watching())
    return fit


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether all tensors have the same names and bits."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def resumed(make: Callable[[], Fit], step: int) -> Fit:
    """The fit that `make` starts, left before `step`, then put into another fit as in a new process, run to its end."""
    first = make()
    with pytest.raises(Leave):
        first.run(Watching(leave_before=step))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in fit_tensors(first).items()}
    state = fit_state(first)
    weights = {name: tensor.clone() for name, tensor in first.network.state_dict().items()}
    torch.manual_seed(12345)  # another process stands elsewhere
    second = make()
    second.network.load_state_dict(weights)
    if first.masks is not None:
        second.masks = place_masks(first.masks.state(), second.network)
    restore_fit(second, tensors, state)
    second.run(Watching())
    return second


def test_a_network_learns_the_blobs_and_says_so_on_the_validation_part() -> None:
    monitor = Watching()
    fit = start(training(epochs=5))
    fit.run(monitor)
    assert monitor.epochs[-1].accuracy is not None
    assert monitor.epochs[-1].accuracy > 0.9
    assert monitor.epochs[0].loss > monitor.epochs[-1].loss


@pytest.mark.parametrize("cut", [1, 4, 6, 13])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW, {"name": "adam"}], ids=["sgd-nesterov", "adamw", "adam"])
def test_a_training_that_was_left_and_entered_again_ends_with_the_same_bits(
    optimizer: dict[str, Any], cut: int
) -> None:
    settings = training(optimizer=optimizer, ema_decay=0.9, gradient_clipping=1.0, label_smoothing=0.1)
    graph = small_cnn(dropout=0.3)

    def make() -> Fit:
        return start(settings, graph=graph)

    whole = make()
    whole.run(Watching())
    again = resumed(make, cut)
    assert equal(snapshot(whole.network), snapshot(again.network))
    assert equal(fit_tensors(whole), fit_tensors(again))
    assert fit_state(whole) == fit_state(again)
    whole.conclude()
    again.conclude()
    assert equal(snapshot(whole.network), snapshot(again.network))


@pytest.mark.parametrize("forgotten", ["optimizer/", "average/", "rng/cpu", "position"])
def test_a_training_that_forgets_a_part_of_its_state_ends_elsewhere(forgotten: str) -> None:
    settings = training(ema_decay=0.9)
    whole = start(settings, graph=small_cnn(dropout=0.3))
    whole.run(Watching())
    first = start(settings, graph=small_cnn(dropout=0.3))
    with pytest.raises(Leave):
        first.run(Watching(leave_before=4))
    second = start(settings, graph=small_cnn(dropout=0.3))
    tensors = {name: tensor.clone() for name, tensor in fit_tensors(first).items() if not name.startswith(forgotten)}
    if forgotten == "rng/cpu":
        tensors["rng/cpu"] = torch.Generator().manual_seed(9).get_state()
    state = fit_state(first)
    if forgotten == "position":
        state["position"]["batch"] -= 1
    second.network.load_state_dict(first.network.state_dict())
    restore_fit(second, tensors, state)
    second.run(Watching())
    assert not equal(fit_tensors(whole), fit_tensors(second))


def test_a_training_with_growing_masks_resumes_to_the_same_bits() -> None:
    settings = training(optimizer=ADAMW, ema_decay=0.9)
    step = Prune.model_validate({"sparsity": 0.6})

    def regrow(network: Network, sparsity: float, previous: Masks | None) -> Masks:
        return weight_masks(network, step, sparsity, seed=0, previous=previous)

    def make() -> Fit:
        return start(settings, mask_updates={0: 0.1, 4: 0.4, 8: 0.6}, regrow=regrow)

    whole = make()
    whole.run(Watching())
    for cut in (4, 7):
        again = resumed(make, cut)
        assert equal(snapshot(whole.network), snapshot(again.network))
        assert equal(fit_tensors(whole), fit_tensors(again))
    assert whole.masks is not None
    assert whole.masks.zeros() == round(0.6 * whole.masks.sizes())


def test_an_epoch_in_which_masks_still_grow_is_not_the_best_one() -> None:
    step = Prune.model_validate({"sparsity": 0.5})

    def regrow(network: Network, sparsity: float, previous: Masks | None) -> Masks:
        return weight_masks(network, step, sparsity, seed=0, previous=previous)

    fit = trained(training(epochs=3), mask_updates={0: 0.2, 7: 0.5}, regrow=regrow)
    assert fit.best is not None
    assert fit.best.epoch >= 2
    fit.conclude()
    assert fit.masks is not None
    zeros = sum(int((p == 0).sum()) for name, p in fit.network.named_parameters() if name in fit.masks)
    assert zeros == round(0.5 * fit.masks.sizes())


@pytest.mark.parametrize("optimizer", [SGD, {"name": "adam"}, ADAMW], ids=["sgd-nesterov", "adam", "adamw"])
def test_zeros_stay_exactly_zero_in_weights_average_and_optimizer(optimizer: dict[str, Any]) -> None:
    network = build_network(small_cnn(), seed=3)
    masks = weight_masks(network, Prune.model_validate({"sparsity": 0.7}), 0.7, seed=0)
    masks.apply(network)
    settings = training(optimizer=optimizer, ema_decay=0.9, gradient_clipping=0.5)
    decay = (Regularization(l1=1e-3, l2=1e-3, weight_decay=0.01),)
    fit = trained(settings, network=network, masks=masks, regularizations=decay)
    assert fit.average is not None
    for name, parameter in fit.network.named_parameters():
        if name in masks:
            dead = masks[name] == 0
            assert not parameter[dead].any()
            assert not fit.average.tensors[name][dead].any()
            for value in fit.optimizer.state[parameter].values():
                assert value.shape != dead.shape or not value[dead].any()
            assert parameter[~dead].all()


def test_the_best_epoch_is_restored_and_without_validation_the_last_weights_stay() -> None:
    settings = training(epochs=4, optimizer={"name": "sgd", "lr": 0.5})
    fit = trained(settings)
    assert fit.best is not None
    fit.conclude()
    validation = BlobBatches(24, seed=5, shuffle=False)
    found = evaluate(fit.network, validation.epoch(0), fit.precision)
    assert found.accuracy == fit.best.accuracy
    blind = trained(settings, validation=False)
    last = snapshot(blind.network)
    assert blind.best is None
    blind.conclude()
    assert equal(last, snapshot(blind.network))


def test_the_average_is_kept_where_nothing_was_validated() -> None:
    fit = trained(training(ema_decay=0.99), validation=False)
    assert fit.average is not None
    raw = snapshot(fit.network)
    fit.conclude()
    assert equal(fit.average.tensors, snapshot(fit.network))
    assert not equal(raw, snapshot(fit.network))


def test_training_stops_early_when_the_accuracy_does_not_rise() -> None:
    settings = training(
        epochs=20, optimizer={"name": "sgd", "lr": 1e-8}, early_stopping={"patience": 3, "min_delta": 0.01}
    )
    monitor = Watching()
    fit = start(settings)
    fit.run(monitor)
    assert len(monitor.epochs) == 4  # the first sets the mark, three do not pass it
    assert fit.finished


def test_slow_but_steady_progress_above_min_delta_is_not_stopped() -> None:
    fit = start(training(early_stopping={"patience": 2, "min_delta": 0.05}))
    for accuracy in (0.50, 0.53, 0.56, 0.59, 0.62):  # each less than min_delta above the one before
        fit.position.epoch += 1
        fit._keep_if_best(accuracy, 1.0, averaged=False)
        assert fit.stale_epochs < 2


def test_a_loss_that_is_no_number_ends_the_loop_with_its_step_and_rate() -> None:
    settings = training(epochs=10, optimizer={"name": "sgd", "lr": 100.0}, schedule={"name": "constant"})
    fit = start(settings, graph=small_cnn(norm=False))
    with pytest.raises(NonFiniteLoss, match=r"at step \d+, learning rate 100") as caught:
        fit.run(Watching())
    assert 1 < caught.value.step < fit.position.step + 1


def test_losses_are_read_at_the_first_step_and_then_in_windows_whose_mean_is_the_epochs() -> None:
    monitor = Watching()
    start(training(epochs=1), batches=BlobBatches(1000)).run(monitor)
    assert [window.steps for window in monitor.windows] == [1, 50, 50, 24]
    mean = sum(window.losses["loss"] * window.steps for window in monitor.windows) / 125
    assert monitor.epochs[0].loss == pytest.approx(mean)
    assert all(window.images_per_s > 0 for window in monitor.windows)


def test_two_micro_batches_have_the_gradient_of_the_whole() -> None:
    graph = small_cnn(norm=False)
    settings = training(epochs=1)
    whole, halves = trained(settings, graph=graph), trained(settings, graph=graph, micro_batches=2)
    for name, tensor in snapshot(whole.network).items():
        torch.testing.assert_close(tensor, snapshot(halves.network)[name], rtol=1e-5, atol=1e-6)


def test_micro_batches_of_an_odd_batch_weigh_each_image_alike() -> None:
    graph = small_cnn(norm=False)
    settings = training(epochs=1)
    whole = trained(settings, graph=graph, batches=BlobBatches(21, batch_size=7))
    pieces = trained(settings, graph=graph, batches=BlobBatches(21, batch_size=7), micro_batches=2)
    for name, tensor in snapshot(whole.network).items():
        torch.testing.assert_close(tensor, snapshot(pieces.network)[name], rtol=1e-5, atol=1e-6)


def test_a_batch_of_three_is_not_cut_because_batch_norm_has_no_variance_of_one_image() -> None:
    layers: list[dict[str, Any]] = [{"type": "conv", "out_channels": 4, "kernel_size": 3}, {"type": "global_avg_pool"}]
    layers += [{"type": "batch_norm"}, {"type": "flatten"}, {"type": "linear", "out_features": 3}]
    batches = BlobBatches(21, batch_size=3)
    fits = [
        trained(training(epochs=1), graph=graph_of(layers), batches=batches, micro_batches=pieces) for pieces in (1, 2)
    ]
    assert equal(*(snapshot(fit.network) for fit in fits))


def test_micro_batches_move_running_statistics_once_a_step() -> None:
    fit = trained(training(epochs=1), micro_batches=2, validation=False)
    assert int(fit.network.get_buffer("batch_norm1.num_batches_tracked")) == fit.steps


def test_a_step_that_overflows_in_float16_moves_neither_weights_nor_their_average() -> None:
    fit = start(
        training(epochs=1, ema_decay=0.5), validation=False, regularizations=(Regularization(weight_decay=0.5),)
    )
    fit.scaler = torch.amp.GradScaler("cpu")
    fit.network.get_parameter("conv1.weight").register_hook(lambda gradient: gradient * torch.inf)
    parameters = {name: tensor.detach().clone() for name, tensor in fit.network.named_parameters()}
    with pytest.raises(Leave):
        fit.run(Watching(leave_before=3))
    assert fit.optimizer.steps == 0
    assert fit.average is not None
    for name, parameter in fit.network.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
        assert torch.equal(fit.average.tensors[name], parameters[name]), name


def test_a_step_that_does_not_overflow_decays_and_averages_as_without_a_scaler() -> None:
    settings, terms = training(epochs=1, ema_decay=0.5), (Regularization(weight_decay=0.05),)
    plain, scaled = (start(settings, validation=False, regularizations=terms) for _ in range(2))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for fit in (plain, scaled):
        fit.run(Watching())
    for name, tensor in snapshot(plain.network).items():
        torch.testing.assert_close(snapshot(scaled.network)[name], tensor, rtol=1e-2, atol=1e-3)
    assert plain.average is not None
    assert scaled.average is not None
    for name, tensor in plain.average.tensors.items():
        torch.testing.assert_close(scaled.average.tensors[name], tensor, rtol=1e-2, atol=1e-3)


def test_regularization_is_in_the_loss_and_told_apart_from_the_cross_entropy() -> None:
    graph = small_cnn()
    network = build_network(graph, seed=0)
    weights = [p.detach() for name, p in network.named_parameters() if name in ("conv1.weight", "linear1.weight")]
    l1, l2 = sum(float(w.abs().sum()) for w in weights), sum(float((w**2).sum()) for w in weights)
    monitor = Watching(leave_before=1)
    fit = start(training(), network=network, regularizations=(Regularization(l1=1e-3, l2=1e-4),))
    with pytest.raises(Leave):
        fit.run(monitor)
    assert monitor.windows[0].losses["l1"] == pytest.approx(1e-3 * l1, rel=1e-5)
    assert monitor.windows[0].losses["l2"] == pytest.approx(1e-4 * l2, rel=1e-5)
    plain = Watching(leave_before=1)
    with pytest.raises(Leave):
        start(training(), graph=graph).run(plain)
    assert monitor.windows[0].losses["loss"] == plain.windows[0].losses["loss"]


def test_l2_in_the_loss_equals_a_weight_decay_twice_as_large() -> None:
    graph = graph_of([{"type": "flatten"}, {"type": "linear", "out_features": 3, "bias": False}])
    sgd = {"name": "sgd", "lr": 0.05}
    term = trained(
        training(optimizer=sgd | {"weight_decay": 0.0}), graph=graph, regularizations=(Regularization(l2=0.01),)
    )
    decay = trained(training(optimizer=sgd | {"weight_decay": 0.02}), graph=graph)
    for name, tensor in snapshot(term.network).items():
        torch.testing.assert_close(tensor, snapshot(decay.network)[name], rtol=1e-4, atol=1e-6)


def test_decoupled_decay_equals_adamws_own() -> None:
    graph = graph_of([{"type": "flatten"}, {"type": "linear", "out_features": 3, "bias": False}])
    adam = {"name": "adam", "lr": 0.01}
    ours = trained(training(optimizer=adam), graph=graph, regularizations=(Regularization(weight_decay=0.1),))
    torchs = trained(training(optimizer={"name": "adamw", "lr": 0.01, "weight_decay": 0.1}), graph=graph)
    for name, tensor in snapshot(ours.network).items():
        torch.testing.assert_close(tensor, snapshot(torchs.network)[name], rtol=1e-5, atol=1e-7)


def test_a_teacher_teaches_and_is_not_changed() -> None:
    teacher = build_network(small_cnn(dropout=0.5), seed=9)
    choose_precision(training(), "cpu", spatial_axes=2).to_device(teacher)
    before = snapshot(teacher)
    monitor = Watching()
    fit = start(training(), teacher=teacher, distillation=Distillation(alpha=1.0, temperature=2.0))
    fit.run(monitor)
    assert equal(before, snapshot(teacher))
    assert monitor.windows[-1].losses["distillation"] < monitor.windows[0].losses["distillation"]


def test_only_the_teacher_counts_at_alpha_one() -> None:
    network = build_network(small_cnn(norm=False), seed=1)
    twin = build_network(small_cnn(norm=False), seed=1)
    settings = training(epochs=1, optimizer=SGD | {"weight_decay": 0.0})
    for one in (network, twin):
        choose_precision(settings, "cpu", spatial_axes=2).to_device(one)
    before = snapshot(network)
    trained(settings, network=network, teacher=twin, distillation=Distillation(alpha=1.0))
    for name, tensor in snapshot(network).items():  # it agrees with its teacher already
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5)


def test_bf16_is_computed_in_bf16_and_kept_in_float32() -> None:
    seen: list[torch.dtype] = []
    fit = start(training(epochs=1, precision="bf16"))
    fit.network.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    fit.run(Watching())
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in snapshot(fit.network).values()} == {torch.float32}


def test_fp16_scales_the_loss_and_ends_near_float32_also_after_a_resume() -> None:
    settings = training(epochs=1, gradient_clipping=1.0)
    half = Precision(torch.device("cpu"), torch.float16, channels_last=True)

    def make(precision: Precision = half) -> Fit:
        network = build_network(small_cnn(), seed=0)
        precision.to_device(network)
        return Fit(network, BlobBatches(), recipe(settings), precision)

    whole, exact = make(), make(Precision(torch.device("cpu"), None, channels_last=True))
    for fit in (whole, exact):
        fit.run(Watching())
    assert fit_state(whole)["scaler"]["scale"] >= 1024
    assert whole.optimizer.steps == exact.optimizer.steps == 6
    for name, tensor in snapshot(whole.network).items():
        torch.testing.assert_close(tensor, snapshot(exact.network)[name], rtol=0.05, atol=0.01)
    again = resumed(make, 4)
    assert equal(snapshot(whole.network), snapshot(again.network))


def test_clipping_bounds_the_gradient() -> None:
    class Measuring(Watching):
        norms: ClassVar[list[float]] = []

        def before_step(self, fit: Fit) -> None:
            gradients = [p.grad for p in fit.network.parameters() if p.grad is not None]  # of the step before
            self.norms.append(math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients)))

    start(training(epochs=1, gradient_clipping=0.01)).run(Measuring())
    assert len(Measuring.norms) == 6
    assert max(Measuring.norms) == pytest.approx(0.01, rel=1e-3)


def test_label_smoothing_is_in_the_objective() -> None:
    monitor = Watching(leave_before=1)
    fit = start(training(label_smoothing=0.2))
    logits_NK = build_network(small_cnn(), seed=0)(next(BlobBatches().epoch(0))[0])
    labels_N = next(BlobBatches().epoch(0))[1]
    with pytest.raises(Leave):
        fit.run(monitor)
    assert monitor.windows[0].losses["loss"] == pytest.approx(
        float(cross_entropy(logits_NK.detach(), labels_N, label_smoothing=0.2)), rel=1e-4
    )
