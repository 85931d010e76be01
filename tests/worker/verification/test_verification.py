"""Verification: a delivered file that does not give the trained network's logits ends the job, with numbers."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from app.errors import VerificationFailed
from app.network.architecture import Preprocessing
from app.network.cost import SAFETENSORS_METADATA
from app.network.presets.registry import preset_layers
from app.spec.prune import Prune
from tests.support.jobs.specs import graph_of
from tests.support.networks.topologies import topology, trained
from worker.export.files import export_network, file_sha256
from worker.network import Network
from worker.pruning.weight_masks import weight_masks
from worker.verification import clean_process
from worker.verification.verification import (
    Verification,
    compare,
    compute_logits,
    verification_batch_size,
    verify_files,
)

PREPROCESSING = Preprocessing(1 / 255, (0.5, 0.25, 0.125), (0.25, 0.5, 0.75))
COUNT = 300  # more than one batch


@pytest.fixture(scope="module")
def network() -> Network:
    return trained(topology("residual"))


@pytest.fixture(scope="module")
def images() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 3, 8, 8), np.uint8)


@pytest.fixture
def folder(tmp_path: Path, network: Network) -> Path:
    export_network(network, tmp_path / "out", stem="pruned", class_names=("a", "b", "c"), preprocessing=PREPROCESSING)
    return tmp_path / "out"


def verified(folder: Path, network: Network, images: np.ndarray[Any, Any], **more: Any) -> Verification:
    reference = compute_logits(network, images, PREPROCESSING)
    return verify_files(
        folder,
        images=images,
        labels=np.arange(COUNT) % 3,
        reference_logits={"pruned": reference, **more.pop("others", {})},
        threads=torch.get_num_threads(),
        **more,
    )


def test_every_file_is_proven_with_no_difference_in_torch_and_a_small_one_in_onnxruntime(
    folder: Path, network: Network, images: np.ndarray[Any, Any]
) -> None:
    baseline = trained(topology("dense"), seed=1)
    export_network(baseline, folder, stem="baseline", class_names=("a", "b", "c"), preprocessing=PREPROCESSING)
    expected = compute_logits(baseline, images, PREPROCESSING)
    found = verified(folder, network, images, others={"baseline": expected})
    assert set(found.files) == {"pruned.safetensors", "model.py", "pruned.onnx", "baseline.safetensors"}
    for name in ("pruned.safetensors", "model.py", "baseline.safetensors"):
        assert found.files[name].max_abs_difference == 0
    assert 0 < found.files["pruned.onnx"].max_abs_difference < 1e-5
    reference = compute_logits(network, images, PREPROCESSING)
    assert np.array_equal(found.logits["pruned"], reference)
    assert np.array_equal(found.logits["baseline"], expected)
    right = float(np.mean(reference.argmax(axis=1) == np.arange(COUNT) % 3))
    assert found.files["pruned.safetensors"].accuracy == right
    assert set(found.document()["model.py"]) >= {"max_abs_difference", "accuracy", "loss", "tolerance"}  # type: ignore[arg-type]
    assert set(found.sha256) >= {"pruned.safetensors", "model.py", "pruned.onnx", "architecture.json"}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out"], (
        "the scratch of the verification is removed"
    )


def test_stored_pictures_with_channels_last_are_read_where_they_are(
    folder: Path, network: Network, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    np.save(tmp_path / "stored.npy", images.transpose(0, 2, 3, 1))
    view = np.load(tmp_path / "stored.npy", mmap_mode="r").transpose(0, 3, 1, 2)
    seen: list[list[str]] = []
    verified(
        folder,
        network,
        view,
        waiting=lambda: seen.append([path.name for path in tmp_path.glob("verification-*/*.npy")]),
    )
    assert seen
    assert not any("images.npy" in names for names in seen), "a copy was made"


def test_one_changed_weight_is_found(folder: Path, network: Network, images: np.ndarray[Any, Any]) -> None:
    weights = load_file(folder / "pruned.safetensors")
    weights["residual1_conv1.weight"][0, 0, 0, 0] += 0.05
    save_file(weights, folder / "pruned.safetensors", metadata=SAFETENSORS_METADATA)
    with pytest.raises(
        VerificationFailed, match=r"pruned\.safetensors does not reproduce .* differ by up to 0\."
    ) as caught:
        verified(folder, network, images)
    assert "accuracy" in caught.value.message
    assert caught.value.document()["code"] == "verification_failed"


@pytest.fixture
def sparse_folder(tmp_path: Path) -> tuple[Path, Network]:
    """A network with nine of ten weights zero, with and without them."""
    network = trained(topology("residual"))
    weight_masks(network, Prune(sparsity=0.9), 0.9, seed=0).apply(network)
    about: dict[str, Any] = {"class_names": ("a", "b", "c"), "preprocessing": PREPROCESSING}
    export_network(network, tmp_path / "out", stem="pruned", formats=("safetensors", "pytorch"), sparse=True, **about)
    return tmp_path / "out", network


def test_the_file_without_zeros_is_proven_by_the_bits_that_the_source_reads_from_it(
    sparse_folder: tuple[Path, Network], images: np.ndarray[Any, Any]
) -> None:
    folder, network = sparse_folder
    found = verified(folder, network, images)
    assert set(found.files) == {"pruned.safetensors", "pruned.sparse.safetensors", "model.py"}
    assert found.files["pruned.sparse.safetensors"].max_abs_difference == 0
    assert found.sha256["pruned.sparse.safetensors"] == file_sha256(folder / "pruned.sparse.safetensors")


def test_one_changed_bit_in_the_file_without_zeros_is_found(
    sparse_folder: tuple[Path, Network], images: np.ndarray[Any, Any]
) -> None:
    folder, network = sparse_folder
    path = folder / "pruned.sparse.safetensors"
    stored = load_file(path)
    key = next(key for key in stored if key.endswith(".values"))
    stored[key].view(torch.int32)[0] ^= 1  # the last bit of one weight: no logit would show it
    save_file(stored, path)
    with pytest.raises(VerificationFailed, match=r"pruned\.sparse\.safetensors holds other weights than .*: conv1"):
        verified(folder, network, images)


def test_a_changed_onnx_file_is_found_though_the_weights_are_right(
    folder: Path, network: Network, images: np.ndarray[Any, Any]
) -> None:
    model = onnx.load(folder / "pruned.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "linear1.bias")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 0.01, weight.name))
    onnx.save(model, folder / "pruned.onnx")
    with pytest.raises(VerificationFailed, match=r"pruned\.onnx does not reproduce"):
        verified(folder, network, images)


def test_a_wrong_mean_in_the_architecture_is_found(
    folder: Path, network: Network, images: np.ndarray[Any, Any]
) -> None:
    for name in ("architecture.json", "model.py"):
        path = folder / name
        path.write_text(path.read_text().replace("0.125", "0.126"))
    with pytest.raises(VerificationFailed, match=r"pruned\.safetensors does not reproduce"):
        verified(folder, network, images)


def test_a_file_that_cannot_be_loaded_says_why(folder: Path, network: Network, images: np.ndarray[Any, Any]) -> None:
    (folder / "pruned.onnx").write_bytes(b"no protobuf")
    with pytest.raises(
        VerificationFailed, match=r"^pruned\.onnx: .* ended with code 1: .*INVALID_PROTOBUF|[Pp]rotobuf"
    ):
        verified(folder, network, images)


def test_a_source_that_is_not_of_the_architecture_is_found_before_anything_runs(
    folder: Path, network: Network, images: np.ndarray[Any, Any]
) -> None:
    path = folder / "model.py"
    path.write_text(path.read_text().replace("F.relu", "F.relu6", 1))
    with pytest.raises(VerificationFailed, match=r"model\.py is not the network that architecture\.json describes"):
        verified(folder, network, images)


def test_a_missing_file_and_a_process_out_of_time_end_the_verification(
    folder: Path, network: Network, images: np.ndarray[Any, Any]
) -> None:
    with pytest.raises(VerificationFailed, match="did not end in time"):
        verified(folder, network, images, timeout_s=0.1)
    (folder / "pruned.safetensors").unlink()
    with pytest.raises(VerificationFailed, match=r"pruned\.safetensors was not written"):
        verified(folder, network, images)


def test_the_clean_processes_see_no_variable_of_ours_and_have_ended_when_the_verification_is_given_up(
    folder: Path, network: Network, images: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_API_KEY", "secret")
    children: list[int] = []

    class Cancelled(Exception):
        pass

    def look() -> None:
        found = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in map(int, found)}
        children[:] = [pid for pid, command in commands.items() if clean_process.__file__.encode() in command]
        if len(children) == 2:
            assert all(b"-I" in commands[pid] for pid in children)
            assert not any(b"ESPALIER" in Path(f"/proc/{pid}/environ").read_bytes() for pid in children)
            raise Cancelled

    with pytest.raises(Cancelled):
        verified(folder, network, images, waiting=look)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_a_clean_process_ends_with_its_parent() -> None:
    child = (
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(Path(clean_process.__file__).parent)!r})\n"
        "import clean_process\n"
        "clean_process.end_with_parent(os.getppid())\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline, "the child outlived its parent"
            time.sleep(0.02)


def test_a_clean_process_whose_parent_has_ended_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "order.json").write_text('{"parent": 1}')
    command = [sys.executable, "-I", "-B", clean_process.__file__, str(tmp_path / "order.json")]
    assert subprocess.run(command, check=False).returncode == clean_process.ORPHANED


WANTED = np.array([[4.0, 1.0, 0.0], [2.0, 2.0001, 0.0]], np.float32)
LABELS = np.array([0, 1])


def test_an_answer_may_change_only_where_two_classes_are_close() -> None:
    close = WANTED + np.array([[0, 0, 0], [0.0002, 0, 0]], np.float32)
    file = compare("x.onnx", close, WANTED, LABELS, 1e-4)
    assert (file.changed_answers, file.accuracy) == (1, 0.5)
    assert file.tolerance == pytest.approx(4e-4)
    far = WANTED + np.array([[0, 3.5, 0], [0, 0, 0]], np.float32)
    with pytest.raises(VerificationFailed, match=r"1 of 2 answers change; accuracy 0\.5000 instead of 1\.0000"):
        compare("x.onnx", far, WANTED, LABELS, 1.0)


@pytest.mark.parametrize(
    ("found", "wanted", "sentence"),
    [
        (WANTED * np.nan, WANTED, "gives 6 logits of 6 that are not finite"),
        (WANTED, WANTED * np.nan, "own logits are not finite"),
        (WANTED[:, :2], WANTED, "gives logits"),
        (WANTED + np.float32(1e-3), WANTED, "differ by up to 0.001"),
    ],
)
def test_logits_that_are_wrong_are_refused_with_numbers(found: Any, wanted: Any, sentence: str) -> None:
    with pytest.raises(VerificationFailed, match=sentence):
        compare("model.py", found, wanted, LABELS, 1e-5)


def test_computing_logits_leaves_the_networks_mode_alone(network: Network, images: np.ndarray[Any, Any]) -> None:
    network.train()
    first = compute_logits(network, images[:5], PREPROCESSING)
    assert network.training
    network.eval()
    assert np.array_equal(first, compute_logits(network, images[:5], PREPROCESSING))
    ready = torch.from_numpy(PREPROCESSING.apply(images[:5]))
    with torch.no_grad():
        assert np.allclose(first, network(ready).numpy(), rtol=0, atol=1e-5)


def test_a_gpu_is_given_batches_that_keep_it_busy_and_a_processor_what_fits_its_caches() -> None:
    small = topology("chain")
    assert (verification_batch_size(small), verification_batch_size(small, "cuda")) == (128, 512)
    large = graph_of(preset_layers("resnet50", (3, 224, 224), 10), (3, 224, 224), 10)
    assert (verification_batch_size(large), verification_batch_size(large, "cuda")) == (5, 83)
