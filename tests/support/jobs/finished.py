"""Finished jobs whose files are a real network's, without a training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save

from app.database.engine import Database
from app.jobs import attempts, commands
from app.jobs.artifacts import NewArtifact, artifact_key
from app.network.architecture import architecture_document
from app.spec.job import parse_job
from app.spec.references import references_in
from app.storage import Storage
from tests.support.jobs import lives
from tests.support.jobs.sources import SEEN, pooled
from tests.support.jobs.specs import graph_of
from tests.support.services.uploads import put_bytes

NAMES = tuple("abcdefghij")


def network_files(
    layers: Sequence[dict[str, Any]] | None = None,
    input_shape: tuple[int, ...] = (1, 28, 28),
    names: Sequence[str] = NAMES,
    *,
    stem: str = "pruned",
) -> dict[str, bytes]:
    """The weights and the architecture of a network with random weights, under the names that a job delivers them by."""
    graph = graph_of(pooled(len(names)) if layers is None else layers, input_shape, len(names))
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=one.shape).astype("f4") for name, one in graph.tensors().items()}
    tensors |= {name: np.abs(tensor) for name, tensor in tensors.items() if name.endswith("running_var")}
    document = json.dumps(architecture_document(graph, names, SEEN)).encode()
    prefix = "" if stem == "pruned" else f"{stem}."
    return {f"{stem}.safetensors": save(tensors), f"{prefix}architecture.json": document}


def both_networks() -> dict[str, bytes]:
    """What a job delivers of its two networks, which have the same layers."""
    return network_files() | network_files(stem="baseline")


def submit(db: Database, spec: Mapping[str, Any] = lives.SPEC, *, tenant: str = lives.TENANT) -> str:
    """The id of a new job, which needs what its spec refers to."""
    needs = references_in(parse_job(dict(spec)))
    return commands.submit_job(db, tenant=tenant, spec=dict(spec), needs=needs)[0].id


def finished_job(
    db: Database, storage: Storage, files: Mapping[str, bytes] | None = None, *, tenant: str = lives.TENANT
) -> str:
    """The id of a job that succeeded with these files; default: both networks."""
    claim = lives.claim(db, submit(db, tenant=tenant))
    rows = []
    for name, content in (both_networks() if files is None else files).items():
        key = artifact_key(claim.job_id, claim.attempt, name)
        put_bytes(storage, key, content)
        digest = hashlib.sha256(content).hexdigest()
        rows.append(NewArtifact(name, "weights", key, digest, len(content), "application/octet-stream"))
    attempts.finish(db, claim, summary={}, report={"job_id": claim.job_id}, artifacts=rows)
    return claim.job_id
