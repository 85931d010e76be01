"""What the documents say is what the code has."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from typing import Any

import pytest

from app.network.presets import PRESETS
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
    named = re.findall(r"`([\w/]+/test_\w+\.py)::(\w+)`", (ROOT / "docs" / "invariants.md").read_text())
    assert len(named) > 46
    assert [name for path, name in named if f"def {name}(" not in (ROOT / "tests" / path).read_text()] == []


def test_every_path_that_the_readme_links_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
