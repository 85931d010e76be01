"""What tests of every folder ask for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.database.engine import Database


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """An empty SQLite database with every table."""
    database = Database(f"sqlite:///{tmp_path / 'espalier.sqlite'}")
    database.upgrade()
    yield database
    database.close()
