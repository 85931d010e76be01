"""The benchmarks: both sides count alike and start alike, goals are judged from the lines, the page is what is stored."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageFont

from app.network.architecture import Preprocessing
from app.network.cost import cost
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.network.presets.registry import preset_layers
from app.spec.job import parse_job
from tests.support.checkout import ROOT
from worker.export.pytorch_source import model_source
from worker.network import build_network

FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))
import data_sets  # noqa: E402
import document  # noqa: E402
import peers  # noqa: E402
import quality  # noqa: E402
import quality_tables  # noqa: E402
import recipes  # noqa: E402
import records  # noqa: E402

sys.path.remove(str(FOLDER))


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    yield 1
    torch.set_num_threads(before)


def row(method: str, retrain: str, accuracy: float, **fields: Any) -> dict[str, Any]:
    usual = {"data": "d", "model": "m", "limit": None, "epochs": 2, "retrain_epochs": 1, "seed": 0}
    cell = {"structure": "channels", "amount": 0.25, "method": method, "retrain": retrain}
    return usual | cell | {"dense": 0.9, "accuracy": accuracy, "macs": 0.25} | fields


def goal(*rows: dict[str, Any]) -> str:
    line = quality_tables.against_peers(rows).splitlines()[4]
    return line.split(" | ")[-2]


def seeds_of(method: str, retrain: str, *accuracies: float, **fields: Any) -> list[dict[str, Any]]:
    return [row(method, retrain, value, seed=seed, **fields) for seed, value in enumerate(accuracies)]


def test_at_a_quarter_of_the_macs_the_lead_is_more_than_its_standard_error() -> None:
    ours = seeds_of("espalier default", "own", 0.80, 0.84)
    peer = "Torch-Pruning local"
    assert goal(*ours, *seeds_of(peer, "line to 0", 0.79, 0.82)) == "met", "1.5 points, error 0.5"
    assert goal(*ours, *seeds_of(peer, "line to 0", 0.80, 0.82)) == "met", "1 point, error 1"
    assert goal(*ours, *seeds_of(peer, "line to 0", 0.81, 0.82)) == "1.00 short", "0.5 points, error 1.5"
    half = {"amount": 0.5}
    assert (
        goal(*seeds_of("espalier default", "own", 0.80, **half), *seeds_of(peer, "constant 0.1", 0.80, **half)) == "met"
    )


def test_at_the_smallest_budgets_the_lead_is_a_point() -> None:
    for structure, amount, peer in (("channels", 0.12, "Torch-Pruning local"), ("weights", 0.95, "torch.prune global")):
        point = {"structure": structure, "amount": amount}
        ours = row("espalier default", "own", 0.800, **point)
        assert goal(ours, row(peer, "line to 0", 0.790, **point)) == "met"
        assert goal(ours, row(peer, "line to 0", 0.795, **point)) == "0.50 short"


def test_the_best_cell_of_the_peers_counts_and_seeds_are_compared_with_themselves() -> None:
    rows = seeds_of("espalier default", "own", 0.70, 0.80)
    rows += seeds_of("Torch-Pruning global", "constant 0.1", 0.69, 0.78)
    rows += seeds_of("Torch-Pruning local", "our schedule", 0.60, 0.79)
    line = quality_tables.against_peers(rows).splitlines()[4]
    assert "| 73.50 ± 6.36 | Torch-Pruning global, constant 0.1 |" in line
    assert "| +1.50 ± 0.71 |" in line


def test_peers_from_their_own_training_and_dense_networks_have_tables_of_their_own() -> None:
    theirs = {"training": quality_tables.PEERS_TRAINING}
    dense = {"structure": "dense", "amount": 1.0}
    rows = [
        row("espalier default", "own", 0.80),
        row("Torch-Pruning local", "line to 0", 0.70, **theirs),
        row("training default", "none", 0.90, **dense),
        row("control", "our schedule", 0.92, **dense),
        row("training SGD, one cycle", "none", 0.91, **dense, **theirs),
    ]
    assert "Torch-Pruning" not in quality_tables.against_peers(rows[:1])
    assert "| 70.00 | Torch-Pruning local, line to 0 | +10.00 |" in quality_tables.against_peers_own(rows)
    line = quality_tables.dense_networks(rows).splitlines()[4]
    assert line == "| d | m | 90.00 | 92.00 | 91.00 | SGD, one cycle | -1.00 | 1.00 short | 1 |"


def test_a_half_written_line_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    records.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b"\n')
    records.append(path, {"a": 3})
    assert [found["a"] for found in records.rows(path)] == [1, 3]


def test_the_page_is_what_the_stored_results_say() -> None:
    assert document.PAGE.read_text() == document.page(), "run benchmarks/document.py"


@pytest.mark.parametrize(
    ("name", "shape"), [("deep_cnn", (1, 28, 28)), ("resnet20", (3, 32, 32)), ("audio_cnn", (1, 40))]
)
def test_peers_count_macs_as_a_plan_does(name: str, shape: tuple[int, ...]) -> None:
    graph = build_graph(read_layers(preset_layers(name, shape, 10)), shape)
    preprocessing = Preprocessing(1.0, (0.0,) * shape[0], (1.0,) * shape[0])
    scope: dict[str, Any] = {"__name__": "plain"}
    exec(model_source(graph, ["a"] * 10, preprocessing), scope)
    assert peers.count_macs(scope["build"](), shape) == cost(graph).macs
    assert peers.widths(build_network(graph)) == peers.widths(scope["build"]())


def test_every_variant_is_a_step_that_a_job_may_have() -> None:
    setting = quality.Setting("synthetic", "deep_cnn", None, 2, 1, 0)
    for name, (structures, _) in quality.VARIANTS.items():
        for structure in structures:
            step = quality._step(setting, quality.Cell(structure, 0.5, f"espalier {name}", "own"))
            (part,) = parse_job(setting.spec([step])).optimizations
            assert part.type == "prune"


def test_ours_and_a_peer_start_from_one_network_and_a_second_run_does_not_train_it_again(
    tmp_path: Path, one_thread: int
) -> None:
    bench = quality.Bench(one_thread, "cpu", tmp_path / "cache")
    setting = quality.Setting("synthetic", "deep_cnn", 256, 1, 1, 0)
    dense = bench.dense(setting)
    ours = bench.measure(setting, dense, quality.Cell("weights", 0.5, "espalier default", "own"))
    peer = bench.measure(setting, dense, quality.Cell("weights", 0.5, "torch.prune global", quality.SCHEDULE))
    for found in (ours, peer):
        assert found["sparsity"] == pytest.approx(0.5, abs=1e-4)
        assert found["macs"] == 1.0
    again = bench.dense(setting)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in dense.tensors.items())
    assert len(list((tmp_path / "cache" / "benchmarks" / "dense").glob("*.safetensors"))) == 1


def test_every_data_set_has_a_shape_a_number_of_classes_and_models() -> None:
    assert set(data_sets.ARCHIVES) | {"fashion-mnist", "synthetic"} == set(data_sets.SHAPES) == set(data_sets.CLASSES)
    assert set(quality.MODELS) == set(data_sets.SHAPES)
    assert set(quality.AUGMENTATION) <= set(data_sets.SHAPES)
    assert len(data_sets.LETTERS) == data_sets.CLASSES["letters"]


def test_nothing_is_chosen_by_what_is_held_out() -> None:
    assert not {subject.data for subject in recipes.SUBJECTS.values()} & data_sets.HELD_OUT
    for script in ("retraining.py", "training_loop.py"):
        lines = [line for line in (FOLDER / script).read_text().splitlines() if "default" in line]
        assert not any(name in line for name in data_sets.HELD_OUT for line in lines), script


def test_a_letter_fills_its_box_and_stands_in_the_middle() -> None:
    font = ImageFont.load_default(data_sets.DRAWN_AT)
    for letter in "Aij":
        picture = data_sets.draw_letter(font, letter)
        rows, columns = (np.flatnonzero(picture.max(axis=axis)) for axis in (1, 0))
        assert (picture.shape, picture.dtype) == ((28, 28), np.uint8)
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == data_sets.LETTER_INNER_SIDE
        for places in (rows, columns):
            assert abs(int(places[0]) + int(places[-1]) - 27) <= 1
    assert not np.array_equal(data_sets.draw_letter(font, "a"), data_sets.draw_letter(font, "b"))


def test_fonts_are_trained_or_tested_on_by_family_and_no_picture_is_unclear_or_there_twice() -> None:
    def picture(value: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.full((28, 28), value, dtype=np.uint8)

    families = [f"family{number}" for number in range(200)]
    drawn = [(family, number % 10, picture(number)) for number, family in enumerate(families)]
    again, unclear = (families[0], 0, picture(0)), (families[1], 2, picture(1))
    parts = data_sets.parts_of_letters([*drawn, again, unclear])
    tested = [number for number, family in enumerate(families) if data_sets.is_tested(family) and number != 1]
    assert parts["x_test"][:, 0, 0].tolist() == tested
    assert parts["y_test"].tolist() == [number % 10 for number in tested]
    assert len(parts["x_train"]) + len(tested) == 199
    assert 20 < len(tested) < 60
