"""From a JSON document to a plan: the one path that validating and submitting share."""

from __future__ import annotations

from app.api.context import Context
from app.datasets import registry
from app.jobs import references
from app.planning.plan import JobLimits, Plan, make_plan
from app.spec.job import parse_job


def plan_job(context: Context, tenant: str, document: object) -> Plan:
    """What the job that `document` describes would be. Raises InvalidSpec with every mistake found."""
    spec = parse_job(document)
    facts = registry.read_facts(context.db, tenant, spec.data)
    known = references.resolve_sources(context.db, context.storage, tenant, spec)
    return make_plan(spec, facts, limits=JobLimits.of(context.settings), sources=known)
