"""The API as an application: `create_app(settings)`. Importing this module does nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

from fastapi import Depends, FastAPI

from app.api import parameters, problems, prometheus
from app.api.context import Context, VersionWatch
from app.api.middleware import LOOPBACK, RequestGuard
from app.api.routes import artifacts, catalogue, datasets, events, health, jobs, openapi, pages, weights, workers
from app.database.engine import Database
from app.errors import StartupError
from app.jobs.doorbell import open_bell
from app.jobs.recovery import Sweeper
from app.settings import Settings
from app.storage import Storage

CHECKS = 2  # uploads that are checked side by side


def create_app(settings: Settings) -> FastAPI:
    """The application, connected to database, object store and doorbell; its lifespan's end disconnects it.

    Raises:
        StartupError: it would listen to others than this machine without a key.
    """
    if settings.api_key is None and settings.host not in LOOPBACK:
        raise StartupError(
            f"listening on {settings.host} needs a key: set ESPALIER_API_KEY, or ESPALIER_HOST=127.0.0.1"
        )
    app = FastAPI(
        title="Espalier",
        version=version("espalier"),
        description="Trains and prunes convolutional networks, and proves what it delivers.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        dependencies=[Depends(parameters.refuse_unknown_query)],
        responses=openapi.EVERY_ROUTE,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    database = Database(settings.database)
    context = Context(
        settings=settings,
        db=database,
        storage=Storage.open(settings.storage),
        bell=open_bell(settings),
        metrics=prometheus.RequestMetrics(lambda: prometheus.count_jobs(database)),
        checks=ThreadPoolExecutor(CHECKS, thread_name_prefix="check"),
        checking=set(),
        stopping=asyncio.Event(),
        leaving=threading.Event(),
        watch=VersionWatch(database),
    )
    app.state.context = context
    app.state.metrics = context.metrics
    app.state.stopping = context.stopping
    app.state.streams = events.Streams()
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]
    problems.install(app)
    app.add_middleware(RequestGuard, settings=settings, observe=context.metrics.observe)
    for routes in (jobs, events, artifacts, datasets, weights, catalogue, workers, health, prometheus, openapi, pages):
        app.include_router(routes.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: Context = app.state.context
    keepers = [asyncio.create_task(datasets.keep_checking(context)), asyncio.create_task(_keep_sweeping(context))]
    yield
    context.stopping.set()
    context.leaving.set()
    await asyncio.gather(*keepers)
    context.checks.shutdown(wait=True, cancel_futures=True)
    context.bell.close()
    context.db.close()


async def _keep_sweeping(context: Context) -> None:
    """Sweep as workers do: what a user deletes is gone also where no worker is alive."""
    sweeper = Sweeper(context.db, context.storage, context.bell, context.settings)
    while not context.stopping.is_set():
        await asyncio.to_thread(sweeper.try_sweep)
        with suppress(TimeoutError):
            await asyncio.wait_for(context.stopping.wait(), context.settings.sweep_s)
