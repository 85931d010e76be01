"""`GET /metrics`: what Prometheus reads about this process and the queue, from one registry per application."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import structlog
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from starlette.responses import Response

from app.database.engine import Database
from app.database.tables import JobRow
from app.errors import Unavailable

log = structlog.get_logger("espalier.api")

SECONDS = (0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2, 5, 10, 60)

router = APIRouter(tags=["operation"])


class RequestMetrics:
    """The counters of one application. `count_jobs` gives the jobs by state; it is called at every scrape."""

    def __init__(self, count_jobs: Callable[[], dict[str, int]]) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("espalier_requests", "HTTP requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "espalier_request_seconds",
            "Seconds until an answer's first byte.",
            ("method", "route"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_JobCounts(count_jobs))
        ProcessCollector(registry=self.registry)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)


def count_jobs(db: Database) -> dict[str, int]:
    """How many jobs there are in each stored state."""
    with db.read() as session:
        rows = session.execute(
            select(JobRow.state, func.count()).where(JobRow.deleted_at.is_(None)).group_by(JobRow.state)
        )
        return dict(rows.all())


class _JobCounts(Collector):
    def __init__(self, count_jobs: Callable[[], dict[str, int]]) -> None:
        self._count_jobs = count_jobs

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily("espalier_jobs", "Jobs by state.", labels=("state",))
        try:
            for state, count in sorted(self._count_jobs().items()):
                gauge.add_metric((state,), count)
        except Unavailable as error:  # the counters of the process still show what is wrong
            log.warning("jobs not counted", error=error.message)
            return
        yield gauge

    def describe(self) -> Iterator[Metric]:
        """No metrics: registering must not ask the database."""
        return iter(())


@router.get("/metrics", summary="Counters for Prometheus")
def metrics(request: Request) -> Response:
    """The counters of this process and the jobs by state, in Prometheus' text format."""
    return Response(generate_latest(request.app.state.context.metrics.registry), media_type=CONTENT_TYPE_LATEST)
