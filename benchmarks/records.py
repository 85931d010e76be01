"""What the benchmarks write: dated results that say on what and with what they were measured."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "onnxruntime", "numpy", "torch-pruning")


def about() -> dict[str, Any]:
    """Date, processor and versions."""
    return {
        "date": today(),
        "revision": _revision(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def today() -> str:
    """The date in UTC as YYYY-MM-DD."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"


def dated(name: str, suffix: str = ".json") -> Path:
    """Where today's result of a benchmark stands."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    return RESULTS / f"{today()}-{name}{suffix}"


def latest(name: str, suffix: str = ".json") -> Path | None:
    """The newest result of a benchmark; None if there is none."""
    return max(RESULTS.glob(f"????-??-??-{name}{suffix}"), default=None)


def unfinished(name: str) -> Path:
    """Where a benchmark that takes hours gathers its lines until they are stored."""
    path = ROOT / "var" / "benchmarks" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def store(name: str, path: Path) -> Path:
    """Copy gathered lines to today's result; the file."""
    target = dated(name, ".jsonl")
    target.write_text("".join(json.dumps(row) + "\n" for row in rows(path)))
    return target


def write(name: str, document: dict[str, Any]) -> Path:
    """Store today's result, with what it was measured on; the file."""
    path = dated(name)
    path.write_text(json.dumps(about() | document, indent=1) + "\n")
    return path


def add_gathering_options(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark that gathers lines and may be resumed."""
    parser.add_argument("--results", type=Path, help="where lines are gathered; default: var/benchmarks/<script>.jsonl")
    parser.add_argument("--resume", action="store_true", help="go on with the results that are there")
    parser.add_argument("--write", action="store_true", help="store what was gathered in benchmarks/results")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there and end")


def gather(
    name: str,
    options: argparse.Namespace,
    run: Callable[[argparse.Namespace, Path], None],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Run a benchmark that gathers lines as its options say, print its tables, and store the lines if asked to."""
    path = options.results or unfinished(name)
    if options.table and not path.exists():
        path = latest(name, ".jsonl") or sys.exit("no results yet")
    if not options.table:
        if path.exists() and not options.resume:
            sys.exit(f"{path.name} is there already: --resume goes on with it, --results takes another file")
        run(options, path)
    print(table(list(rows(path))))
    if options.write:
        print(f"\n{store(name, path).name}")


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of such a file; one that a killed process left half written is passed over."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """`mean ± standard deviation`; the mean alone of a single value."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def conditions(result: dict[str, Any]) -> str:
    """One sentence: when, on what, with what."""
    machine, versions = result["machine"], result["versions"]
    listed = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    place = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    return f"{result['date']}, {place} ({machine['cores']} cores, {machine['capability']}), {listed}."


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _revision() -> str | None:
    """The commit that is measured; None outside a working copy of git."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
