"""Whether a worker of this host is alive: `python -m worker.health` exits with 0 if so, for container health checks."""

from __future__ import annotations

import platform
import sys

from app.database.engine import Database
from app.errors import Unavailable
from app.jobs import workers
from app.settings import load_settings


def main() -> int:
    """0 if a worker of this host reported in the last 30 s, else 1 and a sentence."""
    database = Database(load_settings().database, pool_size=1)
    try:
        alive = [worker for worker in workers.list_workers(database) if worker.alive and worker.host == platform.node()]
    except Unavailable as error:
        print(f"the database does not answer: {error}", file=sys.stderr)
        return 1
    finally:
        database.close()
    if not alive:
        print("no worker of this host reported in the last 30 s", file=sys.stderr)
    return 0 if alive else 1


if __name__ == "__main__":
    sys.exit(main())
