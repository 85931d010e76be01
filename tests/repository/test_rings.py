"""What each ring may import, in fresh processes and by the contracts of `script/lint`, which fail when they are broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkout import ROOT

IMPORT_ALL = """
import importlib, pkgutil, sys
packages, left_out, forbidden = (set(argument.split(",")) - {""} for argument in sys.argv[1:])
for name in sorted(packages):
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        if not any(found.name == one or found.name.startswith(one + ".") for one in left_out):
            importlib.import_module(found.name)
loaded = {name for name in sys.modules if any(name == one or name.startswith(one + ".") for one in forbidden)}
print(",".join(sorted(loaded)))
"""
CREDENTIALS = "app.access,app.database,app.datasets.ingest,app.datasets.registry,app.jobs,app.storage,app.weights"
CLIENTS = "celery,kombu,obstore,psycopg,redis,sqlalchemy"


def loaded_by(packages: str, *, forbidden: str, left_out: str = "") -> str:
    """Which of `forbidden` a fresh process has loaded after it imported every module of `packages`."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALL, packages, left_out, forbidden]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def test_nothing_of_app_loads_torch_or_the_worker() -> None:
    assert loaded_by("app", forbidden="torch,onnx,onnxruntime,worker", left_out="app.datasets.ingest.__main__") == ""


def test_nothing_that_runs_in_the_trainer_loads_what_holds_credentials() -> None:
    outside = "worker.supervision,worker.__main__,worker.health"
    assert loaded_by("worker", forbidden=f"{CREDENTIALS},{CLIENTS}", left_out=outside) == ""


def test_supervision_loads_no_torch_and_nothing_that_runs_a_job() -> None:
    assert loaded_by("worker.supervision,worker.__main__,worker.health", forbidden="torch,onnx,worker.run") == ""


def test_a_module_that_is_loaded_is_found() -> None:
    assert loaded_by("app.jobs", forbidden="sqlalchemy.orm,torch").startswith("sqlalchemy.orm")


BROKEN = {
    "the rings of app": ("app/spec/data.py", "import app.jobs.events"),
    "the rings of worker": ("worker/evaluation.py", "import worker.run.state"),
    "no circle between folders": ("app/network/layers/shapes.py", "import app.network.cost"),
    "app never imports torch": ("app/pruning/zeros.py", "import torch"),
    "only app.api and the entry points know the web": ("app/jobs/events.py", "import starlette"),
    "the network is data": ("app/network/graph.py", "import app.settings"),
    "supervision never imports torch": ("worker/supervision/transfers.py", "import torch"),
    "the trainer has no credentials": ("worker/run/delivery.py", "import app.storage"),
}


@pytest.mark.parametrize("contract", BROKEN)
def test_lint_names_the_contract_that_an_import_breaks(contract: str, tmp_path: Path) -> None:
    for name in ("app", "worker"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file, line = BROKEN[contract]
    (tmp_path / file).write_text((tmp_path / file).read_text() + f"\n{line}\n")
    program = "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports_command as run; run()"
    command = [sys.executable, "-P", "-c", program, "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    broken = [line for line in done.stdout.splitlines() if " BROKEN" in line]
    assert any(line.startswith(contract) for line in broken), done.stdout
