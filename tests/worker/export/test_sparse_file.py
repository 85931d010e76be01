"""The file without zeros: smaller, every bit back, the same bytes each time, read by a few lines of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from app.network.architecture import Preprocessing
from app.spec.prune import Prune
from tests.support.networks.topologies import TOPOLOGIES, topology, trained
from worker.export.files import export_network, portable_tensors
from worker.export.pytorch_source import model_source
from worker.export.sparse_file import SPARSE_WEIGHTS, save_sparse, sparse_tensors
from worker.network import Network
from worker.pruning.weight_masks import weight_masks

STEPS = {
    "weights": Prune(sparsity=0.9, scope="layer"),
    "n:m": Prune(structure="n:m", pattern="1:4"),
    "blocks": Prune(structure="blocks", block=(2, 2), sparsity=0.8, scope="layer"),
}


def pruned(name: str, step: Prune) -> Network:
    network = trained(topology(name))
    weight_masks(network, step, step.sparsity, seed=0).apply(network)
    return network


def module_of(network: Network, *, sparse: bool = True) -> ModuleType:
    channels = network.graph.input_shape[0]
    preprocessing = Preprocessing(1.0, (0.0,) * channels, (1.0,) * channels)
    module = ModuleType("model")
    exec(model_source(network.graph, ("a", "b", "c"), preprocessing, sparse=sparse), module.__dict__)
    return module


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[key].numpy().tobytes() == right[key].numpy().tobytes() for key in left
    )


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_delivered_source_gives_every_bit_back(name: str, tmp_path: Path) -> None:
    for kind, step in STEPS.items():
        network = pruned(name, step)
        path = tmp_path / f"{kind.replace(':', '')}.safetensors"
        save_sparse(portable_tensors(network), path)
        found = module_of(network).load(path).state_dict()
        assert same_bits({key: found[key] for key in portable_tensors(network)}, portable_tensors(network))


def test_a_weight_of_which_few_are_left_takes_a_bit_for_each_and_four_bytes_for_those(tmp_path: Path) -> None:
    weight = torch.zeros(100, 100)
    weight[3, 5], weight[99, 99] = 2.0, -1.0
    save_sparse({"a.weight": weight, "a.bias": torch.ones(100)}, tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    assert {key: (value.dtype, tuple(value.shape)) for key, value in stored.items()} == {
        "a.weight.mask": (torch.uint8, (1250,)),
        "a.weight.values": (torch.float32, (2,)),
        "a.bias": (torch.float32, (100,)),
    }
    assert stored["a.weight.mask"][305 // 8] == 1 << 305 % 8
    assert stored["a.weight.values"].tolist() == [2.0, -1.0]
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert list(metadata) == ["espalier"]
    assert json.loads(metadata["espalier"]) == {"format_version": 1, "shapes": {"a.weight": [100, 100]}}


def test_a_tensor_that_would_not_become_smaller_stays_as_it_is() -> None:
    dense, thin = torch.ones(1000), torch.ones(1000)
    thin[:31] = 0.0  # 124 bytes saved, 125 for the bits
    small = torch.zeros(20)
    stored, shapes = sparse_tensors({"dense": dense, "thin": thin, "small": small})
    assert set(stored) == {"dense", "thin", "small"}
    assert shapes == {}


def test_numbers_that_only_look_like_zero_keep_their_bits() -> None:
    odd = torch.zeros(1000)
    odd[1], odd[2], odd[3], odd[4] = -0.0, float("nan"), 1e-45, float("-inf")
    stored, _ = sparse_tensors({"odd": odd})
    assert len(stored["odd.values"]) == 4
    assert stored["odd.values"].numpy().tobytes() == odd[1:5].numpy().tobytes()


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_sparse(portable_tensors(pruned("residual", STEPS["weights"])), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_file_is_smaller_by_what_the_zeros_take(tmp_path: Path) -> None:
    weights = {f"layer{number}.weight": torch.randn(64, 64, 3, 3) for number in range(3)}
    for weight in weights.values():
        weight.flatten()[: int(0.9 * weight.numel())] = 0
    save_sparse(weights, tmp_path / "a")
    assert (tmp_path / "a").stat().st_size < (0.1 + 1 / 32 + 0.01) * 3 * 4 * 36_864


def test_only_a_pruned_network_for_which_it_is_asked_gets_the_file_and_others_stay_as_they_were(tmp_path: Path) -> None:
    network = pruned("residual", STEPS["weights"])
    about = {"class_names": ("a", "b", "c"), "preprocessing": Preprocessing(1.0, (0.0,) * 3, (1.0,) * 3)}

    def names(folder: str, stem: str, formats: tuple[str, ...], *, sparse: bool = True) -> list[str]:
        written = export_network(
            network,
            tmp_path / folder,
            stem=stem,  # type: ignore[arg-type]
            formats=formats,
            sparse=sparse,
            **about,  # type: ignore[arg-type]
        )
        return [path.name for path in written]

    both = ("safetensors", "pytorch")
    assert names("a", "pruned", both) == ["pruned.safetensors", SPARSE_WEIGHTS, "architecture.json", "model.py"]
    assert names("b", "pruned", ("pytorch",)) == ["pruned.safetensors", "architecture.json", "model.py"]
    assert names("c", "pruned", both, sparse=False) == ["pruned.safetensors", "architecture.json", "model.py"]
    assert SPARSE_WEIGHTS not in names("d", "baseline", both)
    assert (tmp_path / "b" / "model.py").read_text() == (tmp_path / "c" / "model.py").read_text()
    assert ".mask" not in (tmp_path / "c" / "model.py").read_text()
    assert ".mask" in (tmp_path / "a" / "model.py").read_text()


def test_the_source_that_reads_it_is_laid_out_as_ruff_does_it(tmp_path: Path) -> None:
    network = trained(topology("chain"))
    (tmp_path / "model.py").write_text(
        model_source(network.graph, "abc", Preprocessing(1.0, (0.0,), (1.0,)), sparse=True)
    )
    for command in (["format", "--diff"], ["check"]):
        ruff = [str(Path(sys.executable).with_name("ruff")), *command, "--isolated", "--no-cache", "."]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_a_file_with_too_few_values_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    network = pruned("residual", STEPS["weights"])
    stored, _ = sparse_tensors(portable_tensors(network))
    key = next(key for key in stored if key.endswith(".values"))
    save_file(stored | {key: stored[key][:-1].clone()}, tmp_path / "a")
    with pytest.raises((RuntimeError, IndexError), match=r"shape mismatch|does not match"):
        module_of(network).load(tmp_path / "a")
