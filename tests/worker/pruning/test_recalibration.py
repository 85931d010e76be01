"""Batch norm counts its statistics again: nothing else changes, and the same images give the same statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.spec.job import Training
from tests.support.networks.topologies import HEAD, PICTURE, conv, layer, topology, trained
from worker.network import Network
from worker.precision import choose_precision
from worker.pruning.recalibration import recalibrate_batch_norm


def batches(network: Network, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, *network.graph.input_shape, generator=generator) for _ in range(count)]


def test_running_statistics_become_those_of_the_images() -> None:
    layers = [conv(4, name="a"), layer("batch_norm", name="n"), layer("relu"), *HEAD]
    network = trained(build_graph(read_layers(layers), PICTURE))
    images = batches(network)
    assert recalibrate_batch_norm(network, images) == 48
    output_Cx = network.get_submodule("a")(torch.cat(images)).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(network.get_buffer("n.running_mean"), output_Cx.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network.get_buffer("n.running_var"), output_Cx.var(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[48], [2] * 24, [16, 16, 13, 3], [45, 3]])
def test_the_first_batch_norm_does_not_mind_how_the_images_are_cut(sizes: list[int]) -> None:
    layers = [conv(4, name="a"), layer("batch_norm", name="n"), layer("relu"), *HEAD]
    one, other = (trained(build_graph(read_layers(layers), PICTURE)) for _ in range(2))
    images_NCx = torch.cat(batches(one)) + torch.arange(48).view(-1, 1, 1, 1)  # batches differ as much as images do
    recalibrate_batch_norm(one, [images_NCx])
    recalibrate_batch_norm(other, images_NCx.split(sizes))
    for kind in ("running_mean", "running_var"):
        torch.testing.assert_close(other.get_buffer(f"n.{kind}"), one.get_buffer(f"n.{kind}"), rtol=1e-5, atol=1e-6)


def test_statistics_can_be_counted_in_the_jobs_number_format() -> None:
    network, wide = trained(topology("chain")), trained(topology("chain"))
    precision = choose_precision(Training(precision="bf16"), "cpu", spatial_axes=2)
    seen = []
    network.get_submodule("conv2").register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    recalibrate_batch_norm(network, batches(network), precision=precision)
    recalibrate_batch_norm(wide, batches(wide))
    assert set(seen) == {torch.bfloat16}
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == wide.state_dict()[name].dtype
        torch.testing.assert_close(tensor, wide.state_dict()[name], rtol=0.03, atol=0.03)


def test_only_running_statistics_change_and_modes_and_momenta_are_as_before() -> None:
    network = trained(topology("chain")).train()
    network.get_submodule("batch_norm2").eval()
    modes = [module.training for module in network.modules()]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    recalibrate_batch_norm(network, batches(network))
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    norms = [node.name for node in network.graph.nodes if node.type == "batch_norm"]
    assert changed == {f"{norm}.{kind}" for norm in norms for kind in kinds}
    assert [module.training for module in network.modules()] == modes
    assert {network.get_submodule(norm).momentum for norm in norms} == {0.1}


def test_dropout_is_off_and_the_same_images_give_the_same_statistics_in_any_order() -> None:
    one, other = trained(topology("chain")).train(), trained(topology("chain"))
    recalibrate_batch_norm(one, batches(one))
    recalibrate_batch_norm(one, batches(one))
    recalibrate_batch_norm(other, batches(other)[::-1])
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_network_without_batch_norm_reads_no_images() -> None:
    network = trained(build_graph(read_layers([conv(2), *HEAD]), PICTURE))

    def unread() -> Tensor:
        raise AssertionError("an image was read")

    assert recalibrate_batch_norm(network, (unread() for _ in range(1))) == 0


def test_no_batches_at_all_are_refused_and_leave_the_statistics() -> None:
    network = trained(topology("chain"))
    before = network.get_buffer("batch_norm1.running_mean").clone()
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batch_norm(network, [])
    assert torch.equal(network.get_buffer("batch_norm1.running_mean"), before)


@pytest.mark.parametrize("sizes", [[47, 1], [1, 47], [1] * 48])
def test_a_batch_of_one_value_per_channel_counts_like_any_other(sizes: list[int]) -> None:
    layers = [layer("flatten"), layer("linear", out_features=4), layer("batch_norm", name="n"), layer("relu")]
    network = trained(build_graph(read_layers([*layers, layer("linear", out_features=3)]), PICTURE))
    images_NCx = torch.cat(batches(network))
    assert recalibrate_batch_norm(network, images_NCx.split(sizes)) == 48
    output_NC = network.get_submodule("linear1")(images_NCx.flatten(1)).detach()
    torch.testing.assert_close(network.get_buffer("n.running_mean"), output_NC.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network.get_buffer("n.running_var"), output_NC.var(0), rtol=1e-5, atol=1e-6)
