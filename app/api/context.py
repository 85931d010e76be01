"""What routes work with: one per application, made by `create_app`."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from app.access import DEFAULT_TENANT
from app.api.prometheus import RequestMetrics
from app.database.engine import Database
from app.jobs import queries
from app.jobs.doorbell import Doorbell
from app.settings import Settings
from app.storage import Storage

LOOK_S = 1.0


@dataclass(frozen=True)
class Context:
    """The connections and the settings of one application."""

    settings: Settings
    db: Database
    storage: Storage
    bell: Doorbell
    metrics: RequestMetrics
    checks: ThreadPoolExecutor  # each thread waits for one child process that checks an upload
    checking: set[str]  # the data sets whose check runs or waits here
    stopping: asyncio.Event  # set when the server begins to stop: streams and held requests end
    leaving: threading.Event  # set when the application ends: checks are interrupted and taken up by the next process
    watch: VersionWatch


class VersionWatch:
    """The versions of jobs that somebody waits on: one query a second and job, however many wait."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._looks: dict[tuple[str, str], tuple[float, asyncio.Task[str]]] = {}

    async def version(self, tenant: str, job_id: str) -> str:
        """The job's version, at most a second old. Raises JobNotFound, Unavailable."""
        now = time.monotonic()
        began, look = self._looks.get((tenant, job_id), (0.0, None))
        if look is None or now - began > LOOK_S * 0.9:
            self._looks = {key: value for key, value in self._looks.items() if now - value[0] < 10 * LOOK_S}
            look = asyncio.create_task(run_in_threadpool(queries.job_version, self._db, tenant, job_id))
            self._looks[tenant, job_id] = (now, look)
        return await asyncio.shield(look)  # one waiter that leaves does not end the look of the others


def context_of(request: Request) -> Context:
    """The application's backends."""
    return cast(Context, request.app.state.context)


def tenant(request: Request) -> str:
    """Whose request this is, as the edge found out."""
    return str(getattr(request.state, "tenant", DEFAULT_TENANT))


async def pause(stopping: asyncio.Event, seconds: float) -> bool:
    """Wait; True at once when the server begins to stop."""
    try:
        async with asyncio.timeout(seconds):
            await stopping.wait()
    except TimeoutError:
        return False
    return True
