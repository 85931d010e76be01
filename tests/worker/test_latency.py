"""Latency: both networks under the same conditions, and a plain sentence where pruning brought nothing."""

from __future__ import annotations

import time

import pytest
import torch

from app.compression.factorization import separate
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from tests.support.networks.topologies import CLASSES, HEAD, conv, layer, topology, trained
from worker.export.files import portable_tensors
from worker.export.onnx_model import onnx_bytes
from worker.latency import MOST_RUNS, Latency, measure_latency
from worker.network import Network


def plain(width: int) -> Network:
    layers = [conv(width), layer("relu"), conv(width), layer("global_avg_pool"), layer("flatten")]
    return trained(build_graph(read_layers([*layers, layer("linear", out_features=CLASSES)]), (3, 32, 32)))


def measured(dense: Network, pruned: Network) -> Latency:
    return measure_latency(dense, pruned, seconds=0.8, batch_sizes=(1, 8))


def test_a_much_smaller_network_is_faster_in_both_runtimes_and_nothing_is_noted() -> None:
    found = measured(plain(64), plain(4))
    assert found.notes == ()
    assert found.dense.keys() == found.pruned.keys() == {"torch", "onnxruntime"}
    for runtime, sizes in found.dense.items():
        assert sizes.keys() == {"batch_1", "batch_8"}
        for key, figures in sizes.items():
            assert 0 < found.pruned[runtime][key]["p50"] < figures["p50"] <= figures["p95"]


def test_zeros_alone_are_said_to_bring_nothing_once_for_each_runtime() -> None:
    dense, pruned = plain(32), plain(32)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.view(-1)[::2] = 0
    found = measured(dense, pruned)
    assert len(found.notes) >= 1
    for note in found.notes:
        assert note.startswith(("zeros alone do not make torch faster", "zeros alone do not make onnxruntime faster"))
        assert " ms against " in note


def test_more_layers_that_are_not_faster_are_said_to_be_many() -> None:
    layers = [conv(16), layer("relu"), conv(16, name="wide"), *HEAD]
    dense = trained(build_graph(read_layers(layers), (3, 4, 4)))
    split = trained(separate(dense.graph, ["wide"]))
    found = measured(dense, split)
    assert any(note.startswith("the network of smaller layers is not faster in torch: ") for note in found.notes)
    assert all("it multiplies less, but in more layers" in note for note in found.notes)


def test_an_8_bit_file_takes_turns_in_onnxruntime_and_no_gain_is_said_with_figures() -> None:
    small, large = plain(4), plain(64)
    tensors = {name: tensor.numpy() for name, tensor in portable_tensors(large).items()}
    slow = onnx_bytes(large.graph, tensors)  # stands for a file that is slower than the network of the job
    found = measure_latency(small, small, int8=slow, seconds=0.4, batch_sizes=(1, 8))
    assert found.int8.keys() == {"onnxruntime"}
    assert found.int8["onnxruntime"].keys() == found.pruned["onnxruntime"].keys()
    assert found.notes == ()
    (note,) = found.int8_notes
    assert note.startswith("8 bits are not faster than float32 in onnxruntime on this processor: ")
    assert "at batch 1, " in note
    assert "at batch 8;" in note
    fast = onnx_bytes(small.graph, {name: tensor.numpy() for name, tensor in portable_tensors(small).items()})
    assert measure_latency(large, large, int8=fast, seconds=0.4, batch_sizes=(1,)).int8_notes == ()


def test_nothing_is_noted_where_nothing_was_pruned() -> None:
    assert measured(plain(8), plain(8)).notes == ()


def test_conditions_are_stated_and_the_process_is_left_as_it_was() -> None:
    dense, before = trained(topology("chain")), torch.get_num_threads()
    dense.train()
    within: list[int] = []
    found = measure_latency(
        *(dense, dense),
        threads=before + 1,
        seconds=0.2,
        batch_sizes=(1,),
        waiting=lambda: within.append(torch.get_num_threads()),
    )
    assert within == [before + 1] * 2
    assert dict(found.conditions) | {"runs": None} == {"device": "cpu", "threads": before + 1, "runs": None}
    runs = found.conditions["runs"]
    assert isinstance(runs, dict)
    assert all(isinstance(count, int) and 1 <= count <= MOST_RUNS for count in runs.values())
    assert dense.training
    assert torch.get_num_threads() == before


def test_the_time_is_kept_and_the_caller_may_give_up_between_measurements() -> None:
    start = time.perf_counter()
    measure_latency(plain(16), plain(16), seconds=0.5)
    assert time.perf_counter() - start < 5

    def cancelled() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        measure_latency(plain(4), plain(4), seconds=0.2, waiting=cancelled)
