"""Bring the database to this release's schema: `python -m app.migrate`. Safe to run again."""

from __future__ import annotations

import sys

from app.database.engine import Database
from app.errors import StartupError
from app.settings import load_settings


def main() -> int:
    """Upgrade to the newest revision; returns the exit code."""
    try:
        database = Database(load_settings().database)
        try:
            database.upgrade()
        finally:
            database.close()
    except StartupError as error:
        print(f"espalier migrate: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
