"""docs/map.md is the code: every folder and module of app and worker is in it, with what the folder imports."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import grimp
import pytest

from tests.support.checkout import ROOT

TEXT = (ROOT / "docs" / "map.md").read_text()
ROW = re.compile(r"^\| `((?:app|worker)[\w/]*)/` \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
ROWS = {folder: (about, files, imports) for folder, about, files, imports in ROW.findall(TEXT)}
FOLDERS = sorted(
    str(path.parent.relative_to(ROOT)) for side in ("app", "worker") for path in (ROOT / side).rglob("__init__.py")
)
EVERYWHERE = {"app/errors", "app/failpoints"}
GLOSSARY = (
    "slot class group pin block stage phase part step wish beat claim lease attempt home place doorbell journal surgery"
)


def folder_of(module: str) -> str:
    """The folder of a module, or the file itself where it lies directly in app or worker."""
    path = Path(*module.split("."))
    if (ROOT / path).is_dir() or len(path.parts) == 2:
        return str(path)
    return str(path.parent)


@cache
def imports() -> dict[str, set[str]]:
    """What each folder imports of other folders, and of files that lie directly in app or worker."""
    graph = grimp.build_graph("app", "worker", include_external_packages=False, cache_dir=None)
    found: dict[str, set[str]] = {}
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            found.setdefault(folder_of(importer), set()).add(folder_of(imported))
    return {folder: others - {folder} - EVERYWHERE for folder, others in found.items()}


def test_every_folder_is_in_the_map_and_no_other() -> None:
    assert sorted(ROWS) == FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_map_names_every_module_of_a_folder(folder: str) -> None:
    _, files, _ = ROWS[folder]
    there = sorted(path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")
    assert re.findall(r"`(\w+)`", files) == there


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if "/" in folder])
def test_the_map_says_what_a_folder_imports(folder: str) -> None:
    side = folder.split("/")[0]
    _, _, written = ROWS[folder]
    names = [] if written == "nothing of ours" else written.split(", ")
    named = {name if name.startswith("app/") else f"{side}/{name}" for name in names}
    assert named == imports().get(folder, set())


def test_every_path_of_the_map_exists() -> None:
    paths = re.findall(r"`((?:app|worker|tests|script|docs|migrations|benchmarks)/[\w./]*)`", TEXT)
    assert len(paths) > 60
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_glossary_has_every_word_of_our_own() -> None:
    explained = set(re.findall(r"^\| (\w+) \| \w", TEXT, re.MULTILINE))
    assert set(GLOSSARY.split()) - explained == set()


def test_it_says_where_to_add_what_is_added_most() -> None:
    _, _, where = TEXT.partition("## Where to add")
    for what in ("a layer", "a criterion", "an optimization that", "an endpoint", "a preset", "a setting"):
        assert f"\n| {what}" in where
