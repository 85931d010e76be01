"""Accuracy after pruning: ours against `torch.nn.utils.prune` and Torch-Pruning, from the same trained network.

    .venv/bin/python benchmarks/quality.py [--data emoji] [--models deep_cnn] [--points channels=0.25 weights=0.9] ...
    .venv/bin/python benchmarks/quality.py --resume [the same options]        # go on where a broken run stopped
    .venv/bin/python benchmarks/quality.py --table [--write]                  # the tables of what is there; store it

For each seed a dense network is trained by a plain job, and others as peers train. Ours goes on from the first through the
stages of a real job: score, choose, mask or cut, reconstruct, recalibrate, retrain. The peers take the same weights in
plain PyTorch, zero weights of all layers together or layer by layer, or remove channels with Torch-Pruning (global and
local), and retrain for the same epochs on the same batches: by SGD at a constant rate (a tenth and a hundredth of the
highest) or along a line from the highest to 0, and along our schedule with our optimizer. They also start from their own
dense network. A control is the dense network, trained for as many epochs more. Every result is one line of a file,
written as soon as it is known.

Needs `script/setup api,worker,bench`, and npm for the emoji.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_sets
import peers
import quality_tables
import records
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.errors import EspalierError
from app.network.cost import cost
from app.network.presets.registry import preset_layers
from app.spec.job import Optimizer
from worker.evaluation import Scores
from worker.journal import MemoryJournal
from worker.network import assign_tensors, snapshot
from worker.run import preparation, stages
from worker.run.job import Job, Task

CACHE = records.ROOT / "var" / "benchmarks" / "cache"
DENSE, CONTROL = "dense", "control"
AFTER_TRAINING = 2  # stages of every job: training, evaluating
AUGMENTATION = {
    "fashion-mnist": ["random_crop", "horizontal_flip"],
    "emoji": ["random_crop"],
    "emoji-vendors": ["random_crop", "horizontal_flip"],
    "letters": ["random_crop"],
    "clothes-choice": ["random_crop", "horizontal_flip"],
    "emoji-choice": ["random_crop", "horizontal_flip"],
}
MODELS = {
    "fashion-mnist": ("deep_cnn", "mobilenet_v1 x 0.25"),
    "emoji": ("deep_cnn",),
    "emoji-vendors": ("deep_cnn", "resnet20"),
    "letters": ("deep_cnn", "resnet20"),
    "mnist1d": ("audio_cnn",),
    "clothes-choice": ("deep_cnn",),
    "emoji-choice": ("deep_cnn",),
    "mnist1d-choice": ("audio_cnn",),
    "synthetic": ("deep_cnn",),
}
LIMITS = {"fashion-mnist": 10_000, "emoji-vendors": 3_000, "letters": 3_000}
"""Training images, where there are more."""
MODELS_OF_A_GPU = ("deep_cnn", "resnet20", "resnet20_projection", "mobilenet_v1 x 0.25")
POINTS = ("weights=0.8", "weights=0.9", "weights=0.95", "channels=0.5", "channels=0.25", "channels=0.12")
TRAININGS: dict[str, dict[str, Any]] = {
    "default": {},
    "SGD, one cycle": {"batch_size": 128, "optimizer": {"name": "sgd"}},
    "SGD, cosine": {"batch_size": 128, "optimizer": {"name": "sgd"}, "schedule": {"name": "cosine"}},
    "Adam, constant": {"batch_size": 128, "optimizer": {"name": "adam"}, "schedule": {"name": "constant"}},
}
"""How dense networks are trained: as a plain job does, and as peers do. Pruning starts from the first two."""
PEERS_TRAINING = "SGD, one cycle"
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "default": (("weights", "channels"), {}),
    "global": (("channels",), {"scope": "global"}),
    "layer": (("weights", "channels"), {"scope": "layer"}),
    "learned": (("channels",), {"scope": "learned"}),
    "round_to_1": (("channels",), {"round_to": 1}),
    "not_reconstructed": (("channels",), {"reconstruct": False}),
    "reconstructed": (("weights",), {"reconstruct": True}),
    "lr_rewind": (("weights", "channels"), {"retrain": {"policy": "lr_rewind"}}),
    "no_race": (("weights", "channels"), {"retrain": {"lr": 0.1}}),
    "distilled": (("weights", "channels"), {"retrain": {"distillation": {}}}),
    "from_the_top": (("weights", "channels"), {"retrain": {"lr": 0.1}}),
    "from_half": (("weights", "channels"), {"retrain": {"lr": 0.05}}),
    "from_a_quarter": (("weights", "channels"), {"retrain": {"lr": 0.025}}),
    "half_not_reconstructed": (("channels",), {"reconstruct": False, "retrain": {"lr": 0.05}}),
    "top_distilled": (("weights", "channels"), {"retrain": {"lr": 0.1, "distillation": {}}}),
    "cubic": (("weights",), {"schedule": {"name": "cubic"}}),
    "l2": (("weights",), {"criterion": "l2"}),
    "erk": (("weights",), {"criterion": "erk"}),
    "taylor": (("channels",), {"criterion": "taylor"}),
    "fpgm": (("channels",), {"criterion": "fpgm"}),
    "bn_scale": (("channels",), {"criterion": "bn_scale"}),
    "activation": (("channels",), {"criterion": "activation"}),
    "random": (("weights", "channels"), {"criterion": "random"}),
    "fine_tune": (("weights", "channels"), {"retrain": {"policy": "fine_tune"}}),
    "none": (("weights", "channels"), {"retrain": {"policy": "none", "epochs": 0}}),
    "none_sensitivity": (("channels",), {"scope": "sensitivity", "retrain": {"policy": "none", "epochs": 0}}),
}
CONSTANT = {"constant 0.1": 0.1, "constant 0.01": 0.01}  # of the highest rate of SGD
LINE = "line to 0"  # from the highest rate of SGD
SCHEDULE = "our schedule"  # with our optimizer
RETRAINS = (*CONSTANT, LINE, SCHEDULE)

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One data set and network, how it is trained, and from which seed."""

    data: str
    model: str
    limit: int | None
    epochs: int
    retrain_epochs: int
    seed: int
    training: str = "default"

    def spec(self, optimizations: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The job."""
        shape = data_sets.SHAPES[self.data]
        source: dict[str, Any] = {"dataset": self.data}
        if self.data == "synthetic":
            source = {"synthetic": data_sets.SYNTHETIC}
        return {
            "spec_version": 1,
            "data": source | ({} if self.limit is None else {"limit": self.limit}),
            "model": _model(self.model, shape, data_sets.CLASSES[self.data]),
            "training": {"epochs": self.epochs, "augmentation": AUGMENTATION.get(self.data, []), "seed": self.seed}
            | TRAININGS[self.training],
            "optimizations": list(optimizations),
        }

    def key(self) -> Row:
        """What names it in a row."""
        return dict(vars(self))


@dataclass(frozen=True)
class Cell:
    """One method at one point: `amount` is a sparsity of the weights, or the part of the MACs that channels keep."""

    structure: str
    amount: float
    method: str
    retrain: str

    def key(self) -> Row:
        """What names it in a row."""
        return dict(vars(self))


@dataclass(frozen=True)
class Dense:
    """The trained network: its tensors, its scores on the test images."""

    tensors: dict[str, Tensor]
    scores: Scores


def _model(name: str, shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    if name != "resnet20_projection":
        preset, _, width = name.partition(" x ")
        return {"preset": preset, "input_shape": list(shape)} | ({"width": float(width)} if width else {})
    layers = preset_layers("resnet20", shape, classes)
    for layer in layers:
        if layer.get("shortcut") == "pad":
            layer["shortcut"] = "projection"
    return {"layers": layers, "input_shape": list(shape)}


class Bench:
    """Trains dense networks once, keeps them, and measures cells from them."""

    def __init__(self, threads: int, device: str, cache: Path = CACHE) -> None:
        self.threads, self.device, self.cache = threads, device, cache
        self._compared: set[Setting] = set()

    def prepare(self, setting: Setting, optimizations: Sequence[dict[str, Any]], scratch: Path) -> Job:
        """A job before its first stage."""
        folder = data_sets.packed(setting.data, self.cache)
        spec = setting.spec(optimizations)
        task = Task("quality", 1, spec, folder, scratch, threads=self.threads, device=self.device)
        return preparation.prepare(task, MemoryJournal(keep=False))

    def dense(self, setting: Setting) -> Dense:
        """The setting's trained network: from the disk, or trained now."""
        with tempfile.TemporaryDirectory() as scratch:
            job = self.prepare(setting, [], Path(scratch))
            text = json.dumps([job.plan.spec.document(), torch.__version__, self.threads], sort_keys=True)
            name = hashlib.sha256(text.encode()).hexdigest()[:24]
            path = self.cache / "benchmarks" / "dense" / f"{name}.safetensors"
            about = path.with_suffix(".json")
            if not about.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                stages.run_stages(job)
                baseline, network = job.reached.record.baseline, snapshot(job.reached.network)
                assert baseline is not None
                save_file({key: tensor.contiguous().cpu() for key, tensor in network.items()}, path)
                about.write_text(json.dumps(baseline.document()))
            job.close()
        return Dense(load_file(path), Scores.from_document(json.loads(about.read_text())))

    def measure(self, setting: Setting, dense: Dense, cell: Cell) -> Row:
        """One result."""
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            ours = cell.method.startswith("espalier ")
            step = (
                _step(setting, cell)
                if ours
                else _plain_step(setting, cell) | {"retrain": {"epochs": setting.retrain_epochs}}
            )
            job = None
            try:
                job = self.prepare(setting, [step], Path(scratch))
                if ours:
                    found = _our_result(job, dense)
                else:
                    self._compare_starts(job, setting, dense)
                    found = _peer_result(job, dense, setting, cell)
            except (peers.PeerFailed, EspalierError) as failed:
                found = {"error": str(failed)}
            finally:
                if job is not None:
                    job.close()
        return found | {"seconds": round(time.perf_counter() - began, 1)}

    def _compare_starts(self, job: Job, setting: Setting, dense: Dense) -> None:
        """Once a setting: the peers' network is the trained one, and both sides count alike."""
        if setting not in self._compared:
            network = peers.plain_network(job, dense.tensors)
            assert abs(peers.accuracy(network, job) - dense.scores.accuracy) < 2e-3, "another network"
            counted = peers.count_macs(network, job.plan.baseline.input_shape)
            assert counted == job.plan.baseline_cost.macs, "MACs are counted otherwise"
            self._compared.add(setting)


def _plain_step(setting: Setting, cell: Cell) -> dict[str, Any]:
    amount = {"budget": {"macs": cell.amount}} if cell.structure == "channels" else {"sparsity": cell.amount}
    if cell.structure == DENSE:
        return {"type": "prune", "sparsity": 0.5, "retrain": {"epochs": setting.retrain_epochs}}
    return {"type": "prune", "structure": cell.structure, **amount, "retrain": {"epochs": setting.retrain_epochs}}


def _step(setting: Setting, cell: Cell) -> dict[str, Any]:
    """The prune step of one of our variants."""
    _, fields = VARIANTS[cell.method.removeprefix("espalier ")]
    plain = _plain_step(setting, cell)
    return plain | fields | {"retrain": plain["retrain"] | fields.get("retrain", {})}


def _our_result(job: Job, dense: Dense) -> Row:
    """Carry out the job's stages from the trained network on."""
    reached = job.reached
    assign_tensors(reached.network, {name: tensor.to(job.precision.device) for name, tensor in dense.tensors.items()})
    reached.kept["baseline"] = snapshot(reached.network)
    reached.record.baseline = reached.record.latest = dense.scores
    reached.stage = AFTER_TRAINING
    stages.run_stages(job)
    after, record = job.reached.record.latest, job.reached.record.steps[-1]
    assert after is not None
    network = job.reached.network
    return {
        "accuracy": after.accuracy,
        "after_cut": record.rounds[-1]["after_recalibration"],
        "macs": cost(network.graph).macs / job.plan.baseline_cost.macs,
        "sparsity": peers.sparsity(network),
        "widths": peers.widths(network),
    }


def _peer_result(job: Job, dense: Dense, setting: Setting, cell: Cell) -> Row:
    network = peers.plain_network(job, dense.tensors)
    shape, whole = job.plan.baseline.input_shape, job.plan.baseline_cost.macs
    everywhere = cell.method.endswith(" global")
    if cell.structure == "weights":
        network = peers.zero_weights(network, cell.amount, everywhere=everywhere)
    elif cell.structure == "channels":
        network = peers.remove_channels(network, job, int(cell.amount * whole), everywhere=everywhere)
    after_cut = peers.accuracy(network, job)
    as_the_job = cell.retrain == SCHEDULE
    highest = job.training.optimizer.lr if as_the_job else Optimizer(name="sgd").lr
    if cell.retrain in CONSTANT:
        rate = functools.partial(_constant, highest * CONSTANT[cell.retrain])
    else:
        rate = functools.partial(_line, highest)
    peers.retrain(network, job, epochs=setting.retrain_epochs, rate=rate, as_the_job=as_the_job)
    return {
        "accuracy": peers.accuracy(network, job),
        "after_cut": after_cut,
        "macs": peers.count_macs(network, shape) / whole,
        "sparsity": peers.sparsity(network),
        "widths": peers.widths(network),
    }


def _constant(rate: float, progress: float) -> float:
    return rate


def _line(highest: float, progress: float) -> float:
    return highest * (1 - progress)


def cells(points: Sequence[str], variants: Sequence[str], retrains: Sequence[str]) -> Iterator[Cell]:
    """Every method at every point, and the control: the dense network, trained for as many epochs more."""
    yield Cell(DENSE, 1.0, CONTROL, SCHEDULE)
    for point in points:
        structure, _, amount = point.partition("=")
        for variant in variants:
            if structure in VARIANTS[variant][0]:
                yield Cell(structure, float(amount), f"espalier {variant}", "own")
        library = {"weights": "torch.prune", "channels": "Torch-Pruning"}[structure]
        for scope in ("global", "local"):
            for retrain in retrains:
                yield Cell(structure, float(amount), f"{library} {scope}", retrain)


def cells_from(training: str, options: argparse.Namespace, points: Sequence[str]) -> list[Cell]:
    """What is measured from a dense network that was trained so: from the peers' own, peers with their own retraining."""
    if training == "default":
        return list(cells(points, options.ours, options.retrains))
    if training != PEERS_TRAINING or not options.peers_own:
        return []
    return list(cells(points, [], [LINE]))


def run(options: argparse.Namespace, path: Path, say: Callable[[str], None]) -> None:
    """Measure what the file does not have yet."""
    done = {_identity(row) for row in records.rows(path)} if path.exists() else set()
    records.append(path, records.about() | {"threads": options.threads})
    bench = Bench(options.threads, options.device)
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for data in options.data:
            usual = MODELS_OF_A_GPU if on_gpu and data != "mnist1d" else MODELS[data]
            for model in options.models or usual:
                limit = LIMITS.get(data) if options.limit is None else options.limit or None
                for training in options.trainings:
                    setting = Setting(data, model, limit, options.epochs, options.retrain_epochs, seed, training)
                    _measure_setting(bench, setting, options, done, path, say)


def _measure_setting(
    bench: Bench,
    setting: Setting,
    options: argparse.Namespace,
    done: set[tuple[Any, ...]],
    path: Path,
    say: Callable[[str], None],
) -> None:
    trained = Cell(DENSE, 1.0, f"training {setting.training}", "none")
    left = [
        cell
        for cell in (trained, *cells_from(setting.training, options, options.points or POINTS))
        if _identity(setting.key() | cell.key()) not in done
    ]
    if not left:
        return
    dense = bench.dense(setting)
    say(f"seed {setting.seed} {setting.data} {setting.model}, {setting.training}: dense {dense.scores.accuracy:.4f}")
    for cell in left:
        found = {"accuracy": dense.scores.accuracy} if cell is trained else bench.measure(setting, dense, cell)
        records.append(path, setting.key() | cell.key() | {"dense": dense.scores.accuracy} | found)
        told = found.get("error") or f"{found['accuracy']:.4f}"
        say(f"  {cell.structure}={cell.amount} {cell.method}, {cell.retrain}: {told} ({found.get('seconds', 0)} s)")


def _identity(row: Row) -> tuple[Any, ...]:
    names = ("data", "model", "limit", "epochs", "retrain_epochs", "seed", "structure", "amount", "method", "retrain")
    return (row.get("training", "default"), *(row.get(name) for name in names))


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data", nargs="+", default=["fashion-mnist", "emoji-vendors", "mnist1d", "letters"], choices=data_sets.SHAPES
    )
    parser.add_argument("--models", nargs="+", help="default: those that go with the data")
    parser.add_argument("--points", nargs="+", help="such as weights=0.9 channels=0.25; default: the whole grid")
    parser.add_argument("--ours", nargs="+", default=["default"], choices=VARIANTS, help="variants of our step")
    parser.add_argument("--retrains", nargs="+", default=list(RETRAINS), choices=RETRAINS)
    parser.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=TRAININGS, help="of dense networks")
    parser.add_argument(
        "--no-peers-own", dest="peers_own", action="store_false", help="no peers from their own training"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    listed = ", ".join(f"{limit} of {name}" for name, limit in LIMITS.items())
    parser.add_argument("--limit", type=int, help=f"training images; 0: all; default: {listed}")
    parser.add_argument("--epochs", type=int, default=8, help="of the dense network")
    parser.add_argument("--retrain-epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    records.add_gathering_options(parser)
    parser.add_argument("--short", action="store_true", help="a minute on images drawn from a seed: does it still run?")
    options = parser.parse_args()
    if options.short:
        options.data, options.seeds, options.epochs, options.retrain_epochs = ["synthetic"], 1, 2, 1
        options.points = options.points or ["weights=0.9", "channels=0.5"]

    def measured(options: argparse.Namespace, path: Path) -> None:
        run(options, path, lambda line: print(line, flush=True))

    records.gather("quality", options, measured, quality_tables.document)


if __name__ == "__main__":
    main()
