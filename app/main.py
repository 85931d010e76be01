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
from app.api.context import Context, OpenStreams, VersionWatch
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
        StartupError: it would serve other machines without a key.
    """
    require_key(settings)
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
        closing=threading.Event(),
        versions=VersionWatch(database),
        streams=OpenStreams(),
    )
    app.state.context = context
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]
    problems.install_handlers(app)
    app.add_middleware(RequestGuard, settings=settings, observe=context.metrics.observe)
    for routes in (jobs, events, artifacts, datasets, weights, catalogue, workers, health, prometheus, openapi, pages):
        app.include_router(routes.router)
    return app


def require_key(settings: Settings) -> None:
    """Raise StartupError if the settings would let other machines in without a key."""
    if settings.api_key is None and settings.host not in LOOPBACK:
        raise StartupError(
            f"listening on {settings.host} needs a key: set ESPALIER_API_KEY, or ESPALIER_HOST=127.0.0.1"
        )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: Context = app.state.context
    loops = [asyncio.create_task(datasets.check_until_stop(context)), asyncio.create_task(_sweep_until_stop(context))]
    yield
    context.stopping.set()
    context.closing.set()
    await asyncio.gather(*loops)
    context.checks.shutdown(wait=True, cancel_futures=True)
    context.bell.close()
    context.db.close()


async def _sweep_until_stop(context: Context) -> None:
    """Sweep until the server stops, as workers do: so what a user deletes is removed where no worker is alive."""
    sweeper = Sweeper(context.db, context.storage, context.bell, context.settings)
    while not context.stopping.is_set():
        await asyncio.to_thread(sweeper.try_sweep)
        with suppress(TimeoutError):
            await asyncio.wait_for(context.stopping.wait(), context.settings.sweep_s)
