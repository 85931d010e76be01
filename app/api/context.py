"""What routes work with: one context per application, made by `create_app`, and the dependencies that routes share."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from app.access import DEFAULT_TENANT
from app.api.prometheus import RequestMetrics
from app.database.engine import Database
from app.errors import TooManyStreams
from app.jobs import queries
from app.jobs.doorbell import Doorbell
from app.settings import Settings
from app.storage import Storage

POLL_S = 1.0  # how often the version of a job that somebody waits for is read
MOST_STREAMS = 20  # of one tenant


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
    closing: threading.Event  # set when the application ends: checks are interrupted, and done by the next process
    versions: VersionWatch
    streams: OpenStreams


class VersionWatch:
    """The versions of jobs that somebody waits for: one query per second and job, however many wait."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._reads: dict[tuple[str, str], tuple[float, asyncio.Task[str]]] = {}

    async def read_version(self, tenant: str, job_id: str) -> str:
        """The job's version, at most a second old. Raises JobNotFound, Unavailable."""
        now = time.monotonic()
        began, read = self._reads.get((tenant, job_id), (0.0, None))
        if read is None or now - began > POLL_S * 0.9:
            self._reads = {key: value for key, value in self._reads.items() if now - value[0] < 10 * POLL_S}
            read = asyncio.create_task(run_in_threadpool(queries.job_version, self._db, tenant, job_id))
            self._reads[tenant, job_id] = (now, read)
        return await asyncio.shield(read)  # a client that leaves does not cancel the read of the others


class OpenStreams:
    """The open event streams of one application, counted by tenant."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def check_limit(self, tenant: str) -> None:
        """Raise TooManyStreams if the tenant has as many open as there may be."""
        if self._open[tenant] >= MOST_STREAMS:
            raise TooManyStreams(f"{MOST_STREAMS} event streams are open, the most there may be: close one, or poll")

    @contextmanager
    def count_stream(self, tenant: str) -> Iterator[None]:
        """Count one more stream of the tenant while it is open."""
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1


def context_of(request: Request) -> Context:
    """The application's context."""
    return cast(Context, request.app.state.context)


def tenant_of(request: Request) -> str:
    """The tenant whose request this is, as `RequestGuard` found out."""
    return str(getattr(request.state, "tenant", DEFAULT_TENANT))


RequestContext = Annotated[Context, Depends(context_of)]
Tenant = Annotated[str, Depends(tenant_of)]


async def wait_for_stop(stopping: asyncio.Event, seconds: float) -> bool:
    """Wait for so many seconds; True at once when the server begins to stop."""
    try:
        async with asyncio.timeout(seconds):
            await stopping.wait()
    except TimeoutError:
        return False
    return True
