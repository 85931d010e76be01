"""Jobs that start from a network that is there, and layers that do not train or train at a rate of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.errors import SourceUnavailable, WeightsInvalid
from app.network.architecture import Preprocessing
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from tests.support.jobs.tiny import SYNTHETIC, task_of, tiny_data, tiny_layers, tiny_spec, train_alone
from worker.export.files import export_network
from worker.journal import MemoryJournal
from worker.network import Network, build_network
from worker.pipeline import Delivered, run
from worker.run.job import Job
from worker.run.preparation import prepare
from worker.run.state import Reached

NAMES = ("class 0", "class 1", "class 2")
SEEN = Preprocessing(1 / 255, (0.4,), (0.25,))
FROM_JOB = {"model": {"job": "first"}}
KEY = "job-first-pruned"
NARROW = {"type": "prune", "budget": {"macs": 0.6}, "round_to": 1, "retrain": {"epochs": 1}}
HALF = {"type": "prune", "sparsity": 0.5, "retrain": {"epochs": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Delivered, Path]:
    """A finished job, and the folder that a worker gets with its network as `first` and as `teacher`."""
    outcome = run(task_of(tiny_spec(), data, tmp_path_factory.mktemp("first")), MemoryJournal())
    assert isinstance(outcome, Delivered)
    files = {file.name: file.path for file in outcome.artifacts}
    sources = tmp_path_factory.mktemp("sources")
    for key, stem in ((KEY, ""), ("job-teacher-baseline", "baseline.")):
        (sources / key).mkdir()
        weights = files[f"{stem or 'pruned.'}safetensors"]
        (sources / key / "weights.safetensors").write_bytes(weights.read_bytes())
        (sources / key / "architecture.json").write_bytes(files[f"{stem}architecture.json"].read_bytes())
    return outcome, sources


def deliver(sources: Path, key: str, network: Network, names: tuple[str, ...] = NAMES) -> None:
    """Put a network among the sources as a finished job's."""
    export_network(network, sources / key, stem="pruned", class_names=names, preprocessing=SEEN, formats=())
    (sources / key / "pruned.safetensors").rename(sources / key / "weights.safetensors")


def upload(sources: Path, tensors: dict[str, Tensor], key: str = "weights-w1") -> None:
    """Put tensors among the sources as uploaded weights."""
    (sources / key).mkdir(parents=True)
    save_file(tensors, sources / key / "weights.safetensors")


def tiny_network(seed: int = 5) -> Network:
    """The network of tiny jobs with weights, and statistics, that no job has drawn."""
    network = build_network(build_graph(read_layers(tiny_layers()), (1, 8, 8)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and ("running" in name or "batch_norm" in name or "bias" in name):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network


def prepared(spec: dict[str, Any], data: Path, folder: Path, sources: Path | None) -> Job:
    """A job before its first step."""
    job = prepare(task_of(spec, data, folder, sources=sources), MemoryJournal())
    job.close()
    return job


def trained(spec: dict[str, Any], data: Path, folder: Path, sources: Path | None) -> Reached:
    """What a job reached."""
    return train_alone(task_of(spec, data, folder, sources=sources), MemoryJournal())


def tensors_of(network: Network) -> dict[str, Tensor]:
    """Copies of all floating tensors."""
    return {name: t.clone() for name, t in network.state_dict().items() if t.is_floating_point()}


# --- a finished job's network ----------------------------------------------------------------------------------------


def test_a_job_starts_with_the_bits_that_another_delivered(
    first: tuple[Delivered, Path], data: Path, tmp_path: Path
) -> None:
    _, sources = first
    job = prepared(tiny_spec(**FROM_JOB, training={"seed": 9}), data, tmp_path, sources)
    stored = load_file(sources / KEY / "weights.safetensors")
    found = tensors_of(job.reached.network)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


def test_without_epochs_the_baseline_is_what_was_delivered_and_scores_the_same(
    first: tuple[Delivered, Path], data: Path, tmp_path: Path
) -> None:
    outcome, sources = first
    spec = tiny_spec(NARROW | {"retrain": None}, **FROM_JOB, training={"epochs": 0, "seed": 9})
    journal = MemoryJournal()
    again = run(task_of(spec, data, tmp_path, sources=sources), journal)
    assert isinstance(again, Delivered)
    baseline = next(file.path for file in again.artifacts if file.name == "baseline.safetensors")
    assert baseline.read_bytes() == (sources / KEY / "weights.safetensors").read_bytes()
    for measure in ("accuracy", "loss", "macs", "params"):
        assert again.summary["baseline"][measure] == outcome.summary["final"][measure]
    assert again.summary["final"]["macs"] <= 0.6 * outcome.summary["final"]["macs"]
    assert again.report["data"]["preprocessing"] == outcome.report["data"]["preprocessing"]
    assert "the training started from job first (pruned)" in again.report["notes"]
    finished = [event.data["phase"] for event in journal.of_type("epoch.finished")]
    assert finished == ["retraining"] * 3
    fractions = [progress.fraction for progress in journal.progresses]
    assert (fractions[-1], fractions == sorted(fractions)) == (1.0, True)


def test_a_network_takes_over_the_preprocessing_it_was_trained_under(data: Path, tmp_path: Path) -> None:
    deliver(tmp_path, KEY, tiny_network())
    job = prepared(tiny_spec(**FROM_JOB), data, tmp_path, tmp_path)
    assert job.preprocessing == SEEN
    own = prepared(tiny_spec(), data, tmp_path, None).preprocessing
    assert own != SEEN


def test_a_new_head_is_drawn_from_the_jobs_seed_and_the_rest_is_the_sources(data: Path, tmp_path: Path) -> None:
    network = tiny_network()
    deliver(tmp_path, KEY, network)
    spec = tiny_spec(model={"job": "first", "head": "new"}, training={"seed": 3})
    found = tensors_of(prepared(spec, data, tmp_path, tmp_path).reached.network)
    drawn, given = tensors_of(build_network(network.graph, seed=3)), tensors_of(network)
    for name in found:
        assert torch.equal(found[name], (drawn if name.startswith("linear1") else given)[name]), name


def test_other_classes_get_a_head_of_their_own_and_are_learnt(data: Path, tmp_path: Path) -> None:
    four = SYNTHETIC | {"classes": 4}
    deliver(tmp_path, KEY, tiny_network())
    spec = tiny_spec(**FROM_JOB, data={"synthetic": four}, training={"epochs": 8})
    reached = trained(spec, tiny_data(tmp_path / "cache", four), tmp_path, tmp_path)
    assert reached.network.graph["linear1"].shape == (4,)
    assert reached.record.baseline is not None
    assert reached.record.baseline.accuracy > 0.5
    assert "these layers started fresh: linear1" in reached.record.notes[0]


def test_zeros_of_a_pruned_start_are_told(data: Path, tmp_path: Path) -> None:
    network = tiny_network()
    with torch.no_grad():
        network.get_parameter("conv2.weight")[:, ::2] = 0.0
    deliver(tmp_path, KEY, network)
    notes = prepared(tiny_spec(**FROM_JOB), data, tmp_path, tmp_path).reached.record.notes
    assert any("288 of" in note and "zero at the start" in note for note in notes)


def test_layers_that_a_rewrite_brings_start_as_a_fresh_network_has_them(data: Path, tmp_path: Path) -> None:
    network = tiny_network()
    deliver(tmp_path, KEY, network)
    job = prepared(tiny_spec({"type": "deeper"}, **FROM_JOB, training={"seed": 3}), data, tmp_path, tmp_path)
    drawn = build_network(job.plan.baseline, seed=3).state_dict()
    inserted = [node.name for node in job.plan.baseline.nodes if node.tensors and node.name not in network.graph]
    assert inserted
    for name, tensor in tensors_of(job.reached.network).items():
        source = drawn if name.rpartition(".")[0] in inserted else network.state_dict()
        assert torch.equal(tensor, source[name]), name


@pytest.mark.parametrize("damage", ["no folder", "no weights", "no architecture", "cut", "another network"])
def test_a_network_that_is_not_there_fails_the_job_with_its_place_and_what_to_do(
    damage: str, data: Path, tmp_path: Path
) -> None:
    deliver(tmp_path, KEY, tiny_network())
    weights = tmp_path / KEY / "weights.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "no architecture":
        (tmp_path / KEY / "architecture.json").unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "another network":
        save_file({"conv1.weight": torch.zeros(1)}, weights)
    sources = None if damage == "no folder" else tmp_path
    with pytest.raises(SourceUnavailable) as refused:
        prepared(tiny_spec(**FROM_JOB), data, tmp_path, sources)
    assert refused.value.pointer == "/model/job"
    assert str(tmp_path) not in refused.value.message


# --- uploaded weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_uploaded_weights_of_every_floating_type_become_float32(kind: torch.dtype, data: Path, tmp_path: Path) -> None:
    given = {name: tensor.to(kind) for name, tensor in tensors_of(tiny_network()).items()}
    upload(tmp_path, given | {"batch_norm1.num_batches_tracked": torch.tensor(7)})
    spec = tiny_spec(model={"layers": tiny_layers(), "input_shape": [1, 8, 8], "weights": "w1"})
    job = prepared(spec, data, tmp_path, tmp_path)
    found = tensors_of(job.reached.network)
    assert all(torch.equal(found[name], tensor.to(torch.float32)) for name, tensor in given.items())
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert any("nobody stated the preprocessing of weights w1" in note for note in job.reached.record.notes)
    assert job.preprocessing == prepared(tiny_spec(), data, tmp_path, None).preprocessing


def test_a_preprocessing_that_was_stated_with_weights_is_used(data: Path, tmp_path: Path) -> None:
    upload(tmp_path, tensors_of(tiny_network()))
    model = {"layers": tiny_layers(), "input_shape": [1, 8, 8], "weights": "w1"}
    stated = model | {"preprocessing": {"mean": [0.1], "std": [0.9]}}
    job = prepared(tiny_spec(model=stated), data, tmp_path, tmp_path)
    assert job.preprocessing == Preprocessing(1 / 255, (0.1,), (0.9,))


def test_with_a_new_head_the_last_layer_of_uploaded_weights_is_not_looked_at(data: Path, tmp_path: Path) -> None:
    given = {name: t for name, t in tensors_of(tiny_network()).items() if name != "linear1.bias"}
    upload(tmp_path, given | {"linear1.weight": torch.zeros(1000, 32)})
    model = {"layers": tiny_layers(), "input_shape": [1, 8, 8], "weights": "w1", "head": "new"}
    job = prepared(tiny_spec(model=model, training={"seed": 3}), data, tmp_path, tmp_path)
    drawn = build_network(job.plan.baseline, seed=3)
    assert torch.equal(job.reached.network.get_parameter("linear1.weight"), drawn.get_parameter("linear1.weight"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_in_float32_fail_the_job_with_the_tensors_name(
    value: float, data: Path, tmp_path: Path
) -> None:
    given = {name: tensor.double() for name, tensor in tensors_of(tiny_network()).items()}
    given["conv2.weight"][0, 0, 0, 0] = value
    upload(tmp_path, given)
    spec = tiny_spec(model={"layers": tiny_layers(), "input_shape": [1, 8, 8], "weights": "w1"})
    with pytest.raises(WeightsInvalid, match=r"conv2\.weight of weights w1") as refused:
        prepared(spec, data, tmp_path, tmp_path)
    assert refused.value.pointer == "/model/weights"


def test_weights_with_variances_below_0_fail_the_job_with_the_tensors_name(data: Path, tmp_path: Path) -> None:
    given = tensors_of(tiny_network())
    given["batch_norm1.running_var"][3] = -1e-3
    upload(tmp_path, given)
    spec = tiny_spec(model={"layers": tiny_layers(), "input_shape": [1, 8, 8], "weights": "w1"})
    with pytest.raises(WeightsInvalid, match=r"batch_norm1\.running_var of weights w1 has variances below 0"):
        prepared(spec, data, tmp_path, tmp_path)


# --- frozen layers ---------------------------------------------------------------------------------------------------

EVERYTHING = {"type": "regularization", "l1": 1e-3, "l2": 1e-3, "weight_decay": 0.1, "bn_l1": 1e-2, "all": True}
EVERYTHING |= {"group_lasso": 1e-3}


@pytest.mark.parametrize(
    "training",
    [
        {"ema_decay": 0.9, "gradient_clipping": 1.0, "augmentation": ["random_crop"]},
        {"optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.5}},
        {"optimizer": {"name": "adam", "lr": 0.01, "weight_decay": 0.5}, "precision": "bf16"},
    ],
    ids=["sgd", "adamw", "adam"],
)
def test_no_training_changes_a_bit_of_a_frozen_layer(training: dict[str, Any], data: Path, tmp_path: Path) -> None:
    network = tiny_network()
    deliver(tmp_path, KEY, network)
    spec = tiny_spec(EVERYTHING, HALF, **FROM_JOB, training=training | {"frozen": ["conv1", "batch_norm1"]})
    reached = trained(spec, data, tmp_path, tmp_path)
    before, dense, after = tensors_of(network), reached.kept["baseline"], tensors_of(reached.network)
    for name in before:
        frozen = name.startswith(("conv1", "batch_norm1"))
        assert torch.equal(before[name], dense[name]) == frozen, name
        if name != "conv1.weight":
            assert torch.equal(before[name], after[name]) == frozen, name
    kept = after["conv1.weight"] != 0  # masks may take weights of a frozen layer; the others stay as they were
    assert torch.equal(after["conv1.weight"][kept], before["conv1.weight"][kept])
    assert 0 < int(kept.sum()) < kept.numel()


def test_channels_of_a_frozen_layer_may_go_and_those_that_stay_are_as_they_were(data: Path, tmp_path: Path) -> None:
    network = tiny_network()
    deliver(tmp_path, KEY, network)
    frozen = {"frozen": ["*1", "batch_norm2"]}
    excluded = tiny_spec(NARROW | {"exclude": ["conv1"]}, **FROM_JOB, training={"frozen": ["conv1"]})
    assert trained(excluded, data, tmp_path, tmp_path).network.graph["conv1"].shape[0] == 8
    for criterion in ("l2", "taylor"):  # taylor needs the gradients of frozen layers too
        spec = tiny_spec(NARROW | {"criterion": criterion, "scope": "layer"}, **FROM_JOB, training=frozen)
        small = trained(spec, data, tmp_path, tmp_path).network
        assert all(parameter.requires_grad for parameter in small.parameters())
        for conv, norm in (("conv1", "batch_norm1"), (None, "batch_norm2")):
            mean, wide = small.get_buffer(f"{norm}.running_mean"), network.get_buffer(f"{norm}.running_mean")
            rows = [int((wide == value).nonzero()[0]) for value in mean]
            assert 0 < len(rows) < 8
            assert rows == sorted(rows)
            if conv is not None:
                weights = network.get_parameter(f"{conv}.weight")[rows]
                assert torch.equal(small.get_parameter(f"{conv}.weight"), weights)


def test_recalibration_leaves_frozen_norms_alone_and_counts_the_others(data: Path, tmp_path: Path) -> None:
    deliver(tmp_path, KEY, tiny_network())
    recalibrated = HALF | {"retrain": {"policy": "none"}}
    spec = tiny_spec(recalibrated, **FROM_JOB, training={"epochs": 0, "frozen": ["batch_norm1"]})
    after, before = tensors_of(trained(spec, data, tmp_path, tmp_path).network), tensors_of(tiny_network())
    assert torch.equal(after["batch_norm1.running_mean"], before["batch_norm1.running_mean"])
    assert not torch.equal(after["batch_norm2.running_mean"], before["batch_norm2.running_mean"])


# --- rates of their own ----------------------------------------------------------------------------------------------


def test_a_factor_of_zero_keeps_weights_and_lets_statistics_move(data: Path, tmp_path: Path) -> None:
    network = tiny_network()
    deliver(tmp_path, KEY, network)
    factors = {"conv*": 0, "batch*": 0}
    spec = tiny_spec(
        {"type": "regularization", "weight_decay": 0.1, "all": True}, **FROM_JOB, training={"lr_factors": factors}
    )
    before, after = tensors_of(network), tensors_of(trained(spec, data, tmp_path, tmp_path).network)
    for name in before:
        still = name.startswith(("conv", "batch_norm")) and "running" not in name
        assert torch.equal(before[name], after[name]) == still, name


def test_a_small_factor_moves_a_layer_less_and_the_reported_rate_is_that_of_all(data: Path, tmp_path: Path) -> None:
    network = tiny_network()
    deliver(tmp_path, KEY, network)

    def moved(factors: dict[str, float]) -> tuple[float, list[float]]:
        journal = MemoryJournal()
        spec = tiny_spec(**FROM_JOB, training={"lr_factors": factors})
        reached = train_alone(task_of(spec, data, tmp_path, sources=tmp_path), journal)
        rates = [value for _, value in journal.metrics["train.lr"]]
        change = reached.network.get_parameter("conv1.weight") - network.get_parameter("conv1.weight")
        return float(change.detach().norm()), rates

    (plain, rates), (slow, same), (ones, _) = moved({}), moved({"conv1": 0.1}), moved({"*": 1})
    assert 0.03 < slow / plain < 0.3
    assert rates == same
    assert ones == plain


def test_a_job_alone_reads_its_sources_from_a_folder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from worker import pipeline

    deliver(tmp_path / "sources", KEY, tiny_network())
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps(tiny_spec(**FROM_JOB, training={"epochs": 0})))
    code = pipeline.main([str(spec), str(data), str(tmp_path / "out"), "--sources", str(tmp_path / "sources")])
    assert code == 0, capsys.readouterr().err
    found = load_file(tmp_path / "out" / "pruned.safetensors")
    assert torch.equal(found["conv1.weight"], tiny_network().get_parameter("conv1.weight"))
