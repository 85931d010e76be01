"""What the documents say is what the code has."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.network.presets.registry import PRESETS
from app.settings import Settings
from tests.support.checkout import ROOT

SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "script" / "docs.py"))


@pytest.mark.parametrize("name", SCRIPT["PAGES"])
def test_every_generated_page_is_what_the_script_writes_today(name: str) -> None:
    pages: dict[str, Callable[[], str]] = SCRIPT["PAGES"]
    assert (ROOT / "docs" / name).read_text() == pages[name](), f"docs/{name} is old: run script/docs.py"


def test_the_zoo_shows_every_preset_and_its_published_figures() -> None:
    text = (ROOT / "docs" / "zoo.md").read_text()
    for name in PRESETS:
        assert text.count(f"`{name}`") >= 2


def test_every_setting_is_documented_with_its_description() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    for name, setting in Settings.model_fields.items():
        assert f"`ESPALIER_{name.upper()}`" in text, f"docs/settings.md lacks {name}: run script/docs.py"
        assert setting.description is not None
        assert setting.description in text


def test_every_test_that_the_properties_name_exists() -> None:
    named = re.findall(r"`tests/([\w/]+/test_\w+\.py)::(\w+)`", (ROOT / "docs" / "invariants.md").read_text())
    assert len(named) > 46
    assert [name for path, name in named if f"def {name}(" not in (ROOT / "tests" / path).read_text()] == []


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PATH = re.compile(r"`((?:app|worker|tests|script|docs|benchmarks|migrations)/[\w./-]*\w/?)(?:::\w+)?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_links_or_names_exists(page: Path) -> None:
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text)]
    named = [ROOT / path for path in PATH.findall(text)]
    assert [str(path) for path in [*links, *named] if not path.exists()] == []


def test_the_readme_has_two_screens_before_its_line() -> None:
    before, _, _ = (ROOT / "README.md").read_text().partition("\n---\n")
    assert len(before.splitlines()) <= 70
