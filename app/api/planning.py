"""From a JSON document to a plan: the one path that validating and submitting share."""

from __future__ import annotations

from app import datasets
from app.api.backends import Backends
from app.spec.job import parse_job
from app.spec.plan import JobLimits, Plan, make_plan


def plan_job(given: Backends, tenant: str, document: object) -> Plan:
    """What the job that `document` describes would be. Raises InvalidSpec with every mistake found."""
    spec = parse_job(document)
    return make_plan(spec, datasets.facts(given.db, tenant, spec.data), limits=JobLimits.of(given.settings))
