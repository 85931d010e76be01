"""Write the generated documents: docs/settings.md from app/settings.py. Run: .venv/bin/python script/docs.py"""

from __future__ import annotations

from pathlib import Path

from app.settings import Settings

ROOT = Path(__file__).resolve().parent.parent


def settings_page() -> str:
    """The settings as a Markdown table."""
    rows = [
        f"| `ESPALIER_{name.upper()}` | `{field.default}` | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(
        [
            "# Settings",
            "",
            "Environment variables, read once when a process starts. This page is made by `script/docs.py`.",
            "",
            "| variable | default | what it is |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(settings_page())
