"""Loss terms against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from app.spec.optimizations import Regularization
from tests.support.jobs.blobs import small_cnn
from worker.network import build_network
from worker.training.losses import Penalty, cross_entropy, decoupled_decay, distillation

LOGITS_NK = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -0.3]])


def gradient_norm(temperature: float, *, scaled: bool) -> float:
    """The norm of the distillation loss's gradient, with or without its factor T^2."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(64, 10, generator=generator, requires_grad=True)
    teacher = torch.randn(64, 10, generator=generator)
    loss = distillation(student, teacher, temperature=temperature)
    (loss if scaled else loss / temperature**2).backward()
    assert student.grad is not None
    return float(student.grad.norm())


def test_distillation_is_the_divergence_of_the_softened_answers_per_image() -> None:
    teacher = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    p, q = F.softmax(teacher / 4, dim=1), F.softmax(LOGITS_NK / 4, dim=1)
    wanted = 16 * (p * (p / q).log()).sum() / 2
    torch.testing.assert_close(distillation(LOGITS_NK, teacher, temperature=4.0), wanted)


def test_a_student_that_agrees_with_its_teacher_has_no_gradient() -> None:
    student = LOGITS_NK.clone().requires_grad_()
    distillation(student, LOGITS_NK, temperature=4.0).backward()
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-7


def test_the_factor_t_squared_keeps_the_size_of_the_gradient() -> None:
    scaled = [gradient_norm(temperature, scaled=True) for temperature in (2.0, 4.0, 10.0)]
    assert max(scaled) / min(scaled) < 1.1
    assert gradient_norm(10.0, scaled=False) < 0.02 * scaled[0]


def test_cross_entropy_is_computed_in_float32_and_smooths_labels() -> None:
    labels_N = torch.tensor([0, 2])
    assert cross_entropy(LOGITS_NK.bfloat16(), labels_N).dtype == torch.float32
    log_p = F.log_softmax(LOGITS_NK, dim=1)
    wanted = -(0.9 * log_p[[0, 1], labels_N] + 0.1 * log_p.mean(dim=1)).mean()
    torch.testing.assert_close(cross_entropy(LOGITS_NK, labels_N, label_smoothing=0.1), wanted)


def total(part: Regularization) -> tuple[float, dict[str, Tensor]]:
    """The penalty of a small network, and its parameters."""
    network = build_network(small_cnn(), seed=0)
    for parameter in network.parameters():
        parameter.data += 0.25
    terms = Penalty(network, (part,)).terms()
    return float(torch.stack(list(terms.values())).sum().detach()), {
        n: p.detach() for n, p in network.named_parameters()
    }


def test_l1_and_l2_are_sums_over_the_weights_of_convolutions_and_linear_layers() -> None:
    found, parameters = total(Regularization(l1=0.5, l2=0.25))
    weights = [parameters["conv1.weight"], parameters["linear1.weight"]]
    assert found == pytest.approx(sum(float(0.5 * w.abs().sum() + 0.25 * (w**2).sum()) for w in weights), rel=1e-5)


def test_all_takes_biases_and_norms_too_as_the_seed_program_does() -> None:
    found, parameters = total(Regularization(l1=0.5, all=True))
    assert found == pytest.approx(sum(float(0.5 * p.abs().sum()) for p in parameters.values()), rel=1e-5)


def test_bn_l1_is_over_the_scales_of_batch_norm() -> None:
    found, parameters = total(Regularization(bn_l1=0.5))
    assert found == pytest.approx(0.5 * float(parameters["batch_norm1.weight"].abs().sum()), rel=1e-5)


def test_a_zero_weight_has_the_gradient_zero() -> None:
    network = build_network(small_cnn(), seed=0)
    weight = network.get_parameter("linear1.weight")
    weight.data[0] = 0.0
    terms = Penalty(network, (Regularization(l1=1.0, l2=1.0),)).terms()
    torch.stack(list(terms.values())).sum().backward()
    assert weight.grad is not None
    assert not weight.grad[0].any()
    torch.testing.assert_close(weight.grad[1], weight.detach()[1].sign() + 2 * weight.detach()[1])


def test_a_job_without_terms_has_no_penalty_and_decay_names_its_parameters() -> None:
    network = build_network(small_cnn(), seed=0)
    assert not Penalty(network, ())
    assert not Penalty(network, (Regularization(weight_decay=0.1),))
    ((decay, among),) = decoupled_decay(network, (Regularization(weight_decay=0.1), Regularization(l1=0.1)))
    assert decay == 0.1
    assert {tuple(p.shape) for p in among} == {(4, 1, 3, 3), (3, 64)}
