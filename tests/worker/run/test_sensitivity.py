"""Tables of sensitivities: every cell is what really pruning that group gives; budgets can be shared out by them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.network.cost import cost
from app.pruning.budget import Curve
from app.schemas.report import ReportSchema
from tests.support.jobs.tiny import SYNTHETIC, resume_folder, task_of, tiny_data, tiny_spec
from worker.evaluation import score
from worker.journal import MemoryJournal, Progress, Wish
from worker.pipeline import Delivered, Paused, run
from worker.run.job import Job
from worker.run.preparation import prepare
from worker.run.stages import run_stages
from worker.verification.verification import compute_logits

KEPT = [0.75, 0.5, 0.25]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


def table_spec(**options: Any) -> dict[str, Any]:
    return tiny_spec(kind="sensitivity", sensitivity={"kept": KEPT, **options})


def report_of(spec: dict[str, Any], data: Path, scratch: Path) -> dict[str, Any]:
    outcome = run(task_of(spec, data, scratch), MemoryJournal())
    assert isinstance(outcome, Delivered)
    return outcome.report


@pytest.fixture(scope="module")
def report(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a table over all groups."""
    return report_of(table_spec(), data, tmp_path_factory.mktemp("job"))


def test_every_group_has_a_row_and_every_part_a_cell(report: dict[str, Any]) -> None:
    table = report["sensitivity"]
    assert [row["layers"] for row in table["groups"]] == [["conv1"], ["conv2"]]
    assert table["whole"] == [{"name": "linear1", "reason": "network output"}]
    assert table["measured_on"] == "validation"
    assert table["examples"] == 12  # a tenth of 120
    for row in table["groups"]:
        assert row["channels"] == 8
        assert [point["channels"] for point in row["points"]] == [6, 4, 2]
        macs = [point["macs"] for point in row["points"]]
        assert report["baseline"]["macs"] > macs[0] > macs[1] > macs[2]


def test_the_report_is_as_the_api_describes_it(report: dict[str, Any]) -> None:
    described = ReportSchema.model_validate_json(json.dumps(report, allow_nan=False), strict=True)
    assert described.sensitivity is not None
    assert [len(row.points) for row in described.sensitivity.groups] == [3, 3]
    assert described.model_extra is not None
    assert described.sensitivity.model_extra == described.sensitivity.groups[0].points[0].model_extra == {}


def prepared(spec: dict[str, Any], data: Path, scratch: Path) -> Job:
    job = prepare(task_of(spec, data, scratch), MemoryJournal())
    run_stages(job)
    job.close()
    return job


@pytest.mark.parametrize("limits", [{}, {"validation": 0}], ids=["validation", "training"])
@pytest.mark.parametrize(("layer", "others"), [("conv1", ["conv2"]), ("conv2", ["conv1"])])
def test_a_cell_is_what_really_pruning_that_group_gives(
    data: Path, tmp_path: Path, layer: str, others: list[str], limits: dict[str, Any]
) -> None:
    parts = {"data": {"synthetic": SYNTHETIC, **limits}}
    table = prepared(table_spec() | parts, data, tmp_path)
    (row,) = [row for row in table.reached.record.sensitivity if row["layers"] == [layer]]
    step = {"type": "prune", "structure": "channels", "sparsity": 0.5, "round_to": 1, "exclude": others}
    step["reconstruct"] = False
    pruned = prepared(tiny_spec(step | {"retrain": {"policy": "none"}}) | parts, data, tmp_path)
    network, part = pruned.reached.network, pruned.splits.validation if not limits else pruned.splits.train
    cell = row["points"][KEPT.index(0.5)]
    assert (cost(network.graph).macs, cost(network.graph).params) == (cell["macs"], cell["params"])
    found = score(compute_logits(network, part.images, pruned.preprocessing), part.labels)
    assert found.accuracy == cell["after_recalibration"]
    assert cell["after_cut"] < 1


def test_no_test_image_has_a_say_in_a_table(report: dict[str, Any], data: Path, tmp_path: Path) -> None:
    blind = tmp_path / "blind"
    shutil.copytree(data, blind)
    images = np.load(blind / "test.images.npy")
    np.save(blind / "test.images.npy", np.zeros_like(images))
    found = report_of(table_spec(), blind, tmp_path)
    assert found["baseline"]["accuracy"] < report["baseline"]["accuracy"]
    assert found["sensitivity"] == report["sensitivity"]


def test_without_a_validation_part_training_images_are_used_and_a_note_says_so(data: Path, tmp_path: Path) -> None:
    report = report_of(table_spec() | {"data": {"synthetic": SYNTHETIC, "validation": 0}}, data, tmp_path)
    table = report["sensitivity"]
    assert (table["measured_on"], table["examples"]) == ("training", 120)
    assert any(note.startswith("the table is measured on training images") for note in report["notes"])


def test_the_network_itself_is_delivered_as_it_was_trained(report: dict[str, Any]) -> None:
    assert report["final"]["macs"] == report["baseline"]["macs"]
    assert report["final"]["accuracy"] == report["baseline"]["accuracy"]


def test_a_part_of_the_images_can_do(data: Path, tmp_path: Path) -> None:
    spec = table_spec(images=10, exclude=["conv1"], kept=[0.99, 0.5])  # 0.99 of 8 channels are all of them
    table = report_of(spec, data, tmp_path)["sensitivity"]
    assert table["examples"] == 10
    assert table["accuracy"] == table["groups"][0]["points"][0]["after_cut"]
    assert [row["layers"] for row in table["groups"]] == [["conv2"]]
    assert {"name": "conv1", "reason": "excluded"} in table["whole"]
    assert all(point["after_cut"] * 10 == round(point["after_cut"] * 10) for point in table["groups"][0]["points"])


def test_a_paused_table_goes_on_where_it_was_and_ends_the_same(
    report: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    journal = MemoryJournal()

    def after_the_first_row(progress: Progress | None) -> Wish | None:
        return "pause" if journal.of_type("sensitivity.measured") else None

    journal.wishes = after_the_first_row
    spec = table_spec()
    assert isinstance(run(task_of(spec, data, tmp_path), journal), Paused)
    again = MemoryJournal()
    resumed = task_of(spec, data, tmp_path, resume=resume_folder(journal.checkpoints[-1], tmp_path / "resume"))
    outcome = run(resumed, again)
    assert isinstance(outcome, Delivered)
    assert outcome.report["sensitivity"] == report["sensitivity"]
    assert len(again.of_type("sensitivity.measured")) == 1


def test_a_stopped_table_keeps_its_rows(data: Path, tmp_path: Path) -> None:
    journal = MemoryJournal()
    journal.wishes = lambda progress: "stop" if journal.of_type("sensitivity.measured") else None
    outcome = run(task_of(table_spec(), data, tmp_path), journal)
    assert isinstance(outcome, Delivered)
    assert outcome.stopped_early
    assert len(outcome.report["sensitivity"]["groups"]) == 1


def test_a_budget_is_shared_out_by_measured_losses(data: Path, tmp_path: Path) -> None:
    step = {
        "type": "prune",
        "budget": {"macs": 0.5},
        "scope": "sensitivity",
        "round_to": 1,
        "retrain": {"policy": "none"},
    }
    report = report_of(tiny_spec(step), data, tmp_path)
    assert report["final"]["macs"] <= 0.5 * report["baseline"]["macs"]
    assert report["final"]["macs"] > 0.4 * report["baseline"]["macs"]


def test_a_curve_is_read_by_lines_and_never_falls_where_more_leaves() -> None:
    curve = Curve(((0.5, 0.2), (0.25, 0.1), (0.125, 0.6)))
    found = curve.at(np.array([1.0, 0.75, 0.5, 0.25, 0.125, 0.05]))
    assert found.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.2, 0.6, 0.6])
