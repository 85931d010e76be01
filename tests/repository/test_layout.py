"""The shape of the code: sizes of folders, files and functions, one name for each class, words that are no names."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from tests.support.checkout import ROOT

MOST_FILES = 15  # in a folder, beside its __init__.py
MOST_LINES = 600
MOST_LINES_OF_A_FUNCTION = 80
MEDIAN_LINES, MEDIAN_LINES_OF_A_FUNCTION = 150, 8
NO_NOUNS = {"utils", "util", "helpers", "helper", "manager", "common", "misc", "base"}


def modules(*folders: str) -> list[Path]:
    """The Python files of the folders, without empty ones."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if path.read_text().strip()]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """The name and the lines of each function and method, docstring included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("side", ["app", "worker", "tests", "benchmarks"])
def test_no_folder_has_more_files_than_can_be_seen_at_once(side: str) -> None:
    count = Counter(path.parent for path in modules(side) if path.name != "__init__.py")
    assert {shown(folder): files for folder, files in count.items() if files > MOST_FILES} == {}


def test_files_and_functions_are_short() -> None:
    lines = {shown(path): len(path.read_text().splitlines()) for path in modules("app", "worker")}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    assert median(lines.values()) <= MEDIAN_LINES
    found = [(shown(path), *function) for path in modules("app", "worker") for function in functions(path)]
    assert [one for one in found if one[2] > MOST_LINES_OF_A_FUNCTION] == []
    assert median(one[2] for one in found) <= MEDIAN_LINES_OF_A_FUNCTION


def test_no_two_classes_of_app_and_worker_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in modules("app", "worker"):
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(shown(path))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_files_are_nouns_of_the_subject() -> None:
    assert [shown(path) for path in modules("app", "worker", "tests", "benchmarks") if path.stem in NO_NOUNS] == []


def test_every_folder_says_in_a_sentence_what_it_is_for() -> None:
    missing = []
    for folder in sorted({path.parent for path in modules("app", "worker")}):
        init = folder / "__init__.py"
        if not init.is_file() or not ast.get_docstring(tree(init)):
            missing.append(shown(folder))
    assert missing == []


def test_no_docstring_says_nothing() -> None:
    empty = []
    for path in modules("app", "worker"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                if text.startswith("Nothing"):
                    empty.append(f"{shown(path)}::{node.name}")
    assert empty == []


def test_the_page_of_what_tests_share_has_a_line_per_file() -> None:
    support = ROOT / "tests" / "support"
    page = (support / "README.md").read_text()
    there = sorted(path.name for path in support.rglob("*.py") if path.name != "__init__.py")
    assert sorted(line.split("`")[1] for line in page.splitlines() if line.startswith("| `")) == there
