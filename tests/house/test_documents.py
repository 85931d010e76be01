"""What the documents say is what the code has."""

from __future__ import annotations

from pathlib import Path

from app.settings import Settings

ROOT = Path(__file__).parents[2]


def test_every_setting_is_documented_with_its_description() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    for name, setting in Settings.model_fields.items():
        assert f"`ESPALIER_{name.upper()}`" in text, f"docs/settings.md lacks {name}: run script/docs.py"
        assert setting.description is not None
        assert setting.description in text


def test_every_path_that_the_readme_links_exists() -> None:
    import re

    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
