"""What is true of every pruned network: the same function as the masked one, its cost, its scores, its files.

Float64 with random running statistics where functions are compared: no tolerance to argue about.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.network.architecture import Preprocessing
from app.network.cost import SAFETENSORS_METADATA, cost
from app.pruning.budget import choose_block, choose_removals
from app.pruning.channel_classes import Classes, channel_classes
from app.pruning.channel_rules import OwnedAxis
from app.spec.prune import CHANNEL_CRITERIA, Criterion, Prune
from tests.support.networks.dags import one_class, random_drop, random_graph
from tests.support.networks.known import network_named
from tests.support.networks.topologies import CLASSES, TOPOLOGIES, pictures, trained
from tests.support.networks.traps import TRAPS
from worker.export.files import portable_network, portable_tensors
from worker.export.onnx_model import onnx_bytes
from worker.export.pytorch_source import model_source
from worker.network import Network
from worker.pruning.importance import channel_scores
from worker.pruning.surgery import masked_reference, shrink

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

EXACT = 1e-10
SINGLE = 1e-5
WITHOUT_DATA: tuple[Criterion, ...] = ("l1", "l2", "bn_scale", "fpgm", "lamp")
TINY = (*TOPOLOGIES, *TRAPS)


@torch.no_grad()
def logits(network: Network, images: np.ndarray) -> Tensor:
    """In eval mode, computed in the network's own precision."""
    return network.eval()(torch.from_numpy(images).to(next(network.parameters()).dtype))


def batches(network: Network, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    dtype = next(network.parameters()).dtype
    generator = torch.Generator().manual_seed(5)
    labels = [torch.randint(0, CLASSES, (6,), generator=generator) for _ in range(count)]
    return [(torch.from_numpy(pictures(network.graph, 6, n)).to(dtype), labels[n]) for n in range(count)]


def scores_of(network: Network, criterion: Criterion, data: Any = None) -> dict[int, float]:
    classes = channel_classes(network.graph)
    return channel_scores(network, classes, criterion, seed=0, batches=data or batches(network))


# --- surgery ---------------------------------------------------------------------------------------------------------


def check_exact(network: Network, classes: Classes, dropped: Any) -> Network:
    """The smaller network, which computes what the masked one does."""
    smaller, masked = shrink(network, classes, dropped), masked_reference(network, classes, dropped)
    images = pictures(network.graph, 3)
    wanted = logits(masked, images)
    assert bool(torch.isfinite(wanted).all())
    assert float((logits(smaller, images) - wanted).abs().max()) <= EXACT * (1 + float(wanted.abs().max()))
    sizes = {name: tuple(tensor.shape) for name, tensor in portable_tensors(smaller).items()}
    assert sizes == {name: tensor.shape for name, tensor in smaller.graph.tensors().items()}
    assert sum(parameter.numel() for parameter in smaller.parameters()) == cost(smaller.graph).params
    return smaller


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [node.module or "."] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


def check_delivered(network: Network, folder: Path) -> None:
    """Weights, source and ONNX file of a network: read again they are the same to the bit, in onnxruntime nearly so."""
    graph = network.graph
    tensors = portable_tensors(network)
    save_file(tensors, folder / "w.safetensors", metadata=SAFETENSORS_METADATA)
    assert (folder / "w.safetensors").stat().st_size == cost(graph).bytes
    read = load_file(folder / "w.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)

    single = portable_network(network)
    module = ModuleType("model")
    channels = graph.input_shape[0]
    source = model_source(graph, ("a", "b", "c"), Preprocessing(1.0, (0.0,) * channels, (1.0,) * channels))
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {name.partition(".")[0] for node in imports for name in _imported(node)}
    assert roots <= {*sys.stdlib_module_names, "torch", "safetensors"}
    exec(compile(source, "model.py", "exec"), module.__dict__)
    delivered = module.load(folder / "w.safetensors")

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = onnx_bytes(graph, {name: tensor.numpy() for name, tensor in tensors.items()})
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    for count in (1, 2, 7):
        images = pictures(graph, count, count)
        mine = logits(single, images)
        with torch.no_grad():
            assert torch.equal(delivered(torch.from_numpy(images)), mine)
        exact = logits(portable_network(network).double(), images)
        scale = 1 + float(exact.abs().max())
        found = torch.from_numpy(session.run(["logits"], {"images": images})[0])
        rounding = float((mine - exact).abs().max())  # a norm of nearly equal numbers enlarges it
        assert float((found - exact).abs().max()) <= SINGLE * scale + 10 * rounding


@pytest.mark.parametrize("name", TRAPS)
def test_no_trap_makes_the_smaller_network_another_function(name: str, tmp_path: Path) -> None:
    graph = network_named(name)
    classes = channel_classes(graph)
    for seed in range(3):
        network = trained(graph, seed).double()
        whole = logits(network, pictures(graph, 3))
        for share in (0.3, 0.6, 1.0):
            smaller = check_exact(network, classes, random_drop(classes, share, seed))
        check_exact(network, classes, one_class(classes, seed))
        assert float((logits(smaller, pictures(graph, 3)) - whole).abs().max()) > 1e-6, "what left did not matter"
    check_delivered(smaller, tmp_path)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1_000_000),
    criterion=st.sampled_from(CHANNEL_CRITERIA),
    scope=st.sampled_from(["layer", "global"]),
    round_to=st.sampled_from([None, None, 1, 2]),
    share=st.floats(0, 1),
)
def test_random_networks_are_pruned_to_any_budget_by_any_criterion_and_delivered(
    tmp_path: Path, seed: int, criterion: Criterion, scope: str, round_to: int | None, share: float
) -> None:
    graph = random_graph(seed)
    classes = channel_classes(graph)
    network = trained(graph, seed).double()
    options = {"type": "prune", "criterion": criterion, "scope": scope, "round_to": round_to}
    finest = Prune.model_validate({**options, "budget": {"macs": 1.0}, "round_to": round_to or 1})
    floor = choose_removals(graph, classes, None, finest).floor.macs
    allowed = max(2, floor + int(share * (cost(graph).macs - floor)))
    step = Prune.model_validate({**options, "budget": {"macs": allowed}})
    block, _ = choose_block(graph, classes, step)
    removals = choose_removals(graph, classes, scores_of(network, criterion), step, block=block)
    smaller = check_exact(network, classes, removals.dropped)
    assert cost(smaller.graph) == removals.cost
    assert removals.cost.macs <= allowed

    first = sorted(removals.dropped)[::2]
    between = shrink(network, classes, first)
    left = [c for c in classes.all().tolist() if c not in set(first)]
    new = channel_classes(between.graph, graph)
    if len(new.all()) == len(left):  # else a product of single channels, which ties more
        number = dict(zip(left, new.all().tolist(), strict=True))
        twice = shrink(between, new, [number[c] for c in sorted(removals.dropped)[1::2]]).state_dict()
        assert all(torch.equal(tensor, twice[name]) for name, tensor in smaller.state_dict().items())
    check_delivered(smaller, tmp_path)


@pytest.mark.parametrize("name", TINY)
def test_dropping_nothing_keeps_graph_and_bits(name: str) -> None:
    network = trained(network_named(name))
    same = shrink(network, channel_classes(network.graph), [])
    assert same.graph == network.graph
    before, after = network.state_dict(), same.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) and before[key] is not after[key] for key in before)


# --- scores ----------------------------------------------------------------------------------------------------------


def places_of(axis: OwnedAxis, c: int) -> Tensor:
    return torch.from_numpy(np.flatnonzero(axis.slots.runs(1) == c))


@torch.no_grad()
def exchange(network: Network, classes: Classes, one: int, other: int) -> bool:
    """Everything that belongs to one class changes places with that of the other; False where they differ in size."""
    state = network.state_dict()
    pairs = [(axis, places_of(axis, one), places_of(axis, other)) for axis in classes.axes]
    if any(len(left) != len(right) for _, left, right in pairs):
        return False
    for axis, left, right in pairs:
        tensor = state[f"{axis.layer}.{axis.tensor}"]
        moved = tensor.index_select(axis.axis, torch.cat([right, left]))
        tensor.index_copy_(axis.axis, torch.cat([left, right]), moved)
    return True


@pytest.mark.parametrize("name", TINY)
def test_classes_that_change_places_change_scores_in_every_group(name: str) -> None:
    graph = network_named(name)
    classes = channel_classes(graph)
    pairs = [group.classes[[0, -1]].tolist() for group in classes.groups if len(group.classes) > 1]
    for one, other in [pair for pair in pairs if pair[0] not in classes.pins][:3]:
        network, exchanged = trained(graph, 2).double(), trained(graph, 2).double()
        if not exchange(exchanged, classes, one, other):
            continue
        for criterion in WITHOUT_DATA:
            before, after = scores_of(network, criterion), scores_of(exchanged, criterion)
            wanted = before | {one: before[other], other: before[one]}
            assert after == pytest.approx(wanted, rel=1e-9, abs=1e-12), criterion


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_scores_depend_neither_on_the_order_of_batches_nor_on_the_run(name: str) -> None:
    network = trained(network_named(name)).double()
    data = batches(network, 3)
    for criterion in ("taylor", "activation"):
        one = scores_of(network, criterion, data)
        assert scores_of(network, criterion, data[::-1]) == pytest.approx(one, rel=1e-12, abs=1e-300)
        assert scores_of(trained(network.graph).double(), criterion, data) == one


def gate(network: Network, classes: Classes, c: int, factor: float) -> list[Any]:
    """Hooks that multiply the channels of class `c` after every layer that makes them (after its norm, if alone)."""
    graph, hooks = network.graph, []
    for owner in dict.fromkeys(axis.layer for axis in classes.axes if axis.role == "out"):
        places = graph.places(owner)
        readers = [graph.consumers(place.name) for place in places]
        behind_norm = all(len(found) == 1 and found[0].type == "batch_norm" for found in readers)
        for last in dict.fromkeys(found[0].name if behind_norm else owner for found in readers):
            channels = torch.from_numpy(classes.slots[owner].runs(1) == c)

            def scale(module: Any, inputs: Any, output: Tensor, channels: Tensor = channels) -> Tensor:
                factors = torch.ones(len(channels), dtype=output.dtype).masked_fill_(channels, factor)
                return output * factors.view(1, -1, *[1] * (output.dim() - 2))

            hooks.append(network.get_submodule(last).register_forward_hook(scale))
    return hooks


@pytest.mark.parametrize("name", TINY)
def test_taylor_is_the_squared_derivative_by_a_gate_on_all_that_makes_a_class(name: str) -> None:
    network = trained(network_named(name), 1).double().eval()
    classes = channel_classes(network.graph)
    data = batches(network, 2)
    found = scores_of(network, "taylor", data)
    groups = [group for group in classes.groups if int(group.classes[0]) not in classes.pins]
    for c in [int(group.classes[-1]) for group in groups][:3]:
        squares = []
        for images, labels in data:
            losses = []
            for factor in (1 + 1e-5, 1 - 1e-5):
                hooks = gate(network, classes, c, factor)
                with torch.no_grad():
                    losses.append(float(torch.nn.functional.cross_entropy(network(images), labels)))
                for hook in hooks:
                    hook.remove()
            squares.append(((losses[0] - losses[1]) / 2e-5) ** 2)
        assert found[c] == pytest.approx(np.mean(squares), rel=1e-3, abs=1e-12)
