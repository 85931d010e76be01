"""From a JSON document to a plan: the one path that validating and submitting share."""

from __future__ import annotations

from app import datasets, sources
from app.api.backends import Backends
from app.spec.job import parse_job
from app.spec.plan import JobLimits, Plan, make_plan


def plan_job(given: Backends, tenant: str, document: object) -> Plan:
    """What the job that `document` describes would be. Raises InvalidSpec with every mistake found."""
    spec = parse_job(document)
    facts = datasets.facts(given.db, tenant, spec.data)
    known = sources.resolve(given.db, given.storage, tenant, spec)
    return make_plan(spec, facts, limits=JobLimits.of(given.settings), sources=known)
