"""A batch in pieces: equal shares, never one image, and batch norm's running statistics at the pace of whole batches."""

from __future__ import annotations

import pytest
import torch

from tests.support.jobs.blobs import blobs, small_cnn
from worker.network import Network, build_network
from worker.training.micro_batches import joined_batches, norms_paced, split_batch


@pytest.mark.parametrize(
    ("images", "pieces", "sizes"),
    [(8, 2, [4, 4]), (7, 2, [4, 3]), (3, 2, [3]), (2, 2, [2]), (1, 2, [1]), (9, 4, [3, 2, 2, 2]), (5, 4, [3, 2])],
)
def test_pieces_are_nearly_equal_and_none_has_one_image(images: int, pieces: int, sizes: list[int]) -> None:
    images_NCHW, labels_N = blobs(images)
    found = split_batch(images_NCHW, labels_N, pieces)
    assert [len(part) for part, _ in found] == sizes
    assert torch.equal(torch.cat([part for part, _ in found]), images_NCHW)
    assert torch.equal(torch.cat([labels for _, labels in found]), labels_N)


def statistics_after(network: Network, pieces: int, *, steps: int = 1) -> dict[str, torch.Tensor]:
    """The buffers after batches of 16 blobs in so many pieces."""
    network.train()
    for step in range(steps):
        parts = split_batch(*blobs(16, seed=step), pieces)
        with norms_paced(network, len(parts)):
            for images_NCHW, _ in parts:
                network(images_NCHW)
    return {name: tensor.clone() for name, tensor in network.named_buffers()}


def test_running_statistics_of_the_first_layer_move_as_far_in_pieces_as_in_one() -> None:
    whole, pieces = (build_network(small_cnn(), seed=0) for _ in range(2))
    for network in (whole, pieces):
        network.get_buffer("batch_norm1.running_mean").fill_(1000.0)  # far away, so that the pace is what is seen
    one, other = statistics_after(whole, 1, steps=5), statistics_after(pieces, 4, steps=5)
    torch.testing.assert_close(other["batch_norm1.running_mean"], one["batch_norm1.running_mean"], rtol=1e-4, atol=0.0)
    assert int(other["batch_norm1.num_batches_tracked"]) == int(one["batch_norm1.num_batches_tracked"]) == 5
    assert pieces.get_submodule("batch_norm1").momentum == 0.1


def test_norms_that_keep_their_statistics_keep_them_and_momenta_come_back_after_an_error() -> None:
    network = build_network(small_cnn(), seed=0)
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    network.train()
    network.get_submodule("batch_norm1").eval()
    with norms_paced(network, 2):
        network(blobs(8)[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.named_buffers())
    network.train()
    with pytest.raises(MemoryError), norms_paced(network, 2):
        raise MemoryError
    assert network.get_submodule("batch_norm1").momentum == 0.1


@pytest.mark.parametrize("sizes", [[1], [1, 1], [4, 1], [1, 4], [1, 1, 1], [4, 1, 4, 1], [2, 3]])
def test_joined_batches_have_two_images_where_there_are_two(sizes: list[int]) -> None:
    images = torch.arange(sum(sizes)).float()
    joined = joined_batches(images.split(sizes))
    assert torch.equal(torch.cat(joined), images)
    assert all(len(batch) >= min(2, sum(sizes)) for batch in joined)
    assert max(map(len, joined)) <= max(sizes) + 2
