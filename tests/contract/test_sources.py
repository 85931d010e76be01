"""Uploaded weights and finished jobs as sources, over every database and object store: found, needed, deleted."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, func, select

from app import weights
from app.database.engine import Database
from app.database.tables import JobRow, JobSourceRow, WeightsRow
from app.errors import Fault, InUse, InvalidSpec, InvalidWeights, NotFound, SourceUnavailable, Unavailable
from app.jobs import attempts, commands, queries, references
from app.settings import Settings
from app.spec.job import parse_job
from app.spec.references import Reference, Source, references_in
from app.storage import LocalStorage, Storage
from app.weights import WeightsView
from tests.support.jobs import lives
from tests.support.jobs.finished import both_networks, finished_job, network_files, submit
from tests.support.jobs.lives import TENANT
from tests.support.jobs.sources import SEEN
from tests.support.jobs.weights import good, tensors_of
from tests.support.services.datasets import sweep
from tests.support.services.uploads import put_bytes

UNKNOWN = "job_" + "0" * 26
LAYERS = [{"type": "conv", "name": "one", "out_channels": 4, "kernel_size": 3}, {"type": "linear", "out_features": 10}]


def register(db: Database, storage: Storage, folder: Path, content: bytes, *, tenant: str = TENANT) -> WeightsView:
    path = folder / "upload"
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return weights.register_weights(db, storage, tenant, path, name="mine", size_bytes=len(content), sha256=digest)


def from_job(job_id: str, **more: Any) -> dict[str, Any]:
    return {"spec_version": 1, "data": {"dataset": "mnist"}, "model": {"job": job_id, **more}}


def from_weights(weights_id: str) -> dict[str, Any]:
    return {"spec_version": 1, "data": {"dataset": "mnist"}, "model": {"layers": LAYERS, "weights": weights_id}}


def taught_by(job_id: str, artifact: str = "pruned") -> dict[str, Any]:
    distill = {"type": "distill", "teacher": job_id, "artifact": artifact}
    return {**lives.SPEC, "optimizations": [distill]}


def resolve(db: Database, storage: Storage, spec: dict[str, Any], tenant: str = TENANT) -> dict[str, Source]:
    return references.resolve_sources(db, storage, tenant, parse_job(spec))


def refused(db: Database, storage: Storage, spec: dict[str, Any], tenant: str = TENANT) -> Fault:
    with pytest.raises(InvalidSpec) as refusal:
        resolve(db, storage, spec, tenant)
    (fault,) = refusal.value.faults
    return fault


def keys(storage: Storage) -> list[str]:
    return [stored.key for stored in storage.list("weights/")]


@pytest.fixture
def statements(db: Database) -> Iterator[list[str]]:
    """Every statement that the database is sent."""
    sent: list[str] = []

    def note(_: Connection, cursor: object, statement: str, *rest: object) -> None:
        sent.append(statement)

    event.listen(db._engine, "before_cursor_execute", note)
    yield sent
    event.remove(db._engine, "before_cursor_execute", note)


def test_weights_are_kept_used_and_deleted(db: Database, storage: Storage, settings: Settings, tmp_path: Path) -> None:
    file = good(one__weight=(4, 1, 3, 3), one__bias=(4,))
    view = register(db, storage, tmp_path, file)
    assert weights.get_weights(db, TENANT, view.id) == view
    assert view.document()["tensors"] == [
        {"name": name, "shape": list(shape), "dtype": "float32"} for name, (_, shape) in tensors_of(file).items()
    ]
    assert storage.get_bytes(f"weights/{view.id}/weights.safetensors") == file

    found = resolve(db, storage, from_weights(view.id))[f"weights-{view.id}"]
    assert (found.layers, dict(found.tensors)) == (None, {"one.weight": (4, 1, 3, 3), "one.bias": (4,)})
    assert set(found.dtypes.values()) == {"F32"}

    job_id = submit(db, from_weights(view.id))
    with pytest.raises(InUse, match=job_id):
        weights.delete_weights(db, TENANT, view.id)
    commands.cancel_job(db, TENANT, job_id)
    sweep(db, storage, settings)
    assert keys(storage) == [f"weights/{view.id}/weights.safetensors"], "what has a row is no garbage"
    weights.delete_weights(db, TENANT, view.id)
    for call in (weights.get_weights, weights.delete_weights):
        with pytest.raises(NotFound):
            call(db, TENANT, view.id)
    sweep(db, storage, settings)
    assert keys(storage) == []
    fault = refused(db, storage, from_weights(view.id))
    assert (fault.pointer, fault.value) == ("/model/weights", view.id)
    assert "POST /v1/weights" in fault.message


def test_a_file_that_is_refused_leaves_nothing(db: Database, local_storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(InvalidWeights):
        register(db, local_storage, tmp_path, b"no weights")
    assert keys(local_storage) == []
    assert weights.list_weights(db, TENANT) == ([], None)


def test_bytes_whose_row_never_came_are_garbage(db: Database, local_storage: Storage, settings: Settings) -> None:
    put_bytes(local_storage, "weights/wt_orphan/weights.safetensors", b"x")
    sweep(db, local_storage, settings)
    assert keys(local_storage) == []


def test_pages_of_weights_are_newest_first_and_end(db: Database, local_storage: Storage, tmp_path: Path) -> None:
    made = [register(db, local_storage, tmp_path, good(a=(2,))).id for _ in range(5)]
    found: list[str] = []
    before = None
    for _ in range(3):
        page, before = weights.list_weights(db, TENANT, limit=2, before=before)
        found += [view.id for view in page]
        assert all(view.tensors is None for view in page)
    assert before is None
    assert found == sorted(made, reverse=True)


@pytest.mark.parametrize("junk", ["", "x", "wt_", "wt_" + "0" * 25 + "\x00", "../x", "wt_" + "\u0661" * 26, "x" * 300])
def test_an_id_of_weights_that_is_none_is_not_found(db: Database, junk: str) -> None:
    for call in (weights.get_weights, weights.delete_weights):
        with pytest.raises(NotFound):
            call(db, TENANT, junk)


def test_another_tenants_weights_and_jobs_do_not_exist(db: Database, local_storage: Storage, tmp_path: Path) -> None:
    theirs = register(db, local_storage, tmp_path, good(a=(2,)), tenant="other")
    their_job = finished_job(db, local_storage, tenant="other")
    assert weights.list_weights(db, TENANT)[0] == []
    for call in (weights.get_weights, weights.delete_weights):
        with pytest.raises(NotFound):
            call(db, TENANT, theirs.id)
    assert "there are no weights" in refused(db, local_storage, from_weights(theirs.id)).message
    assert "there is no job" in refused(db, local_storage, from_job(their_job)).message
    for spec in (from_weights(theirs.id), from_job(their_job)):
        assert resolve(db, local_storage, spec, "other")
        with pytest.raises(InvalidSpec):
            submit(db, spec)
    with pytest.raises(SourceUnavailable):
        references.locate_files(db, TENANT, references_in(parse_job(from_job(their_job))))


def test_of_a_finished_job_everything_but_the_weights_is_known(db: Database, storage: Storage) -> None:
    job_id = finished_job(db, storage)
    for stem in ("pruned", "baseline"):
        found = resolve(db, storage, from_job(job_id, artifact=stem))[f"job-{job_id}-{stem}"]
        assert found.input_shape == (1, 28, 28)
        assert found.classes == tuple("abcdefghij")
        assert found.preprocessing == SEEN
        assert found.layers is not None
        assert found.layers[0]["name"] == "first"
        assert found.tensors["head.weight"] == (10, 8)


def test_of_large_weights_the_header_alone_is_read(db: Database, tmp_path: Path) -> None:
    class Counting(LocalStorage):
        bytes_read = 0

        def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
            for chunk in super().stream(key, start, end):
                self.bytes_read += len(chunk)
                yield chunk

    storage = Counting(tmp_path / "objects")
    wide = [{"type": "flatten", "name": "flat"}, {"type": "linear", "name": "wide", "out_features": 4000}]
    files = network_files([*wide, {"type": "linear", "name": "head", "out_features": 10}])
    assert len(files["pruned.safetensors"]) > 10_000_000
    job_id = finished_job(db, storage, files)
    assert resolve(db, storage, from_job(job_id))[f"job-{job_id}-pruned"].tensors["wide.weight"] == (4000, 784)
    assert storage.bytes_read < 100_000


@pytest.mark.parametrize("state", [state for state in lives.EVERY_STATE if state != "succeeded"])
def test_a_job_that_has_not_succeeded_is_no_source(db: Database, local_storage: Storage, state: str) -> None:
    job_id = lives.job_in(db, state)
    fault = refused(db, local_storage, from_job(job_id))
    assert (fault.pointer, fault.value) == ("/model/job", job_id)
    if state in ("failed", "cancelled"):
        assert "name one that succeeded" in fault.message
    else:
        assert f"has not finished, it is {state.split()[0].replace('cancelling', 'running')}" in fault.message
    with pytest.raises(InvalidSpec):
        submit(db, from_job(job_id))


def test_every_place_that_names_an_unknown_network_is_named(db: Database, local_storage: Storage) -> None:
    prune = {"type": "prune", "budget": {"macs": 0.5}, "retrain": {"epochs": 1, "distillation": {"teacher": UNKNOWN}}}
    spec = from_job(UNKNOWN) | {"optimizations": [{"type": "distill", "teacher": UNKNOWN}, prune]}
    with pytest.raises(InvalidSpec) as refusal:
        resolve(db, local_storage, spec)
    assert [fault.pointer for fault in refusal.value.faults] == [
        "/model/job",
        "/optimizations/0/teacher",
        "/optimizations/1/retrain/distillation/teacher",
    ]


def test_files_that_are_gone_or_broken_are_called_so(
    db: Database, local_storage: Storage, settings: Settings, tmp_path: Path
) -> None:
    pruned_only = finished_job(db, local_storage, network_files())
    assert (
        "delivered no baseline.safetensors"
        in refused(db, local_storage, from_job(pruned_only, artifact="baseline")).message
    )
    for name in ("pruned.safetensors", "architecture.json"):
        emptied = finished_job(db, local_storage)
        local_storage.delete(f"jobs/{emptied}/attempts/1/artifacts/{name}")
        assert "are gone from the store" in refused(db, local_storage, from_job(emptied)).message
        broken = finished_job(db, local_storage, both_networks() | {name: b"{}"})
        assert "cannot be read any more" in refused(db, local_storage, from_job(broken)).message
    view = register(db, local_storage, tmp_path, good(a=(2,)))
    local_storage.delete(f"weights/{view.id}/weights.safetensors")
    assert "upload them again" in refused(db, local_storage, from_weights(view.id)).message


def test_a_store_that_is_away_is_no_mistake_of_the_description(db: Database, local_storage: Storage) -> None:
    class Away(LocalStorage):
        def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
            raise Unavailable

    job_id = finished_job(db, local_storage)
    with pytest.raises(Unavailable):
        resolve(db, Away(local_storage._root), from_job(job_id))  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec_of", [from_job, taught_by], ids=["starts from it", "learns from it"])
def test_a_job_whose_network_is_needed_is_in_use_until_the_other_is_over(
    db: Database, local_storage: Storage, spec_of: Callable[[str], dict[str, Any]]
) -> None:
    source = finished_job(db, local_storage)
    waiting, running, paused = (submit(db, spec_of(source)) for _ in range(3))
    commands.pause_job(db, TENANT, paused)
    claim = lives.claim(db, running)
    for left in ([waiting, running, paused], [waiting, running], [running]):
        with pytest.raises(InUse) as refusal:
            commands.delete_job(db, TENANT, source)
        assert all(job_id in str(refusal.value) for job_id in left)
        assert queries.get_job(db, TENANT, source).state == "succeeded"
        if left != [running]:
            commands.cancel_job(db, TENANT, left[-1] if left[-1] != running else waiting)
    attempts.fail(db, claim, lives.ERROR)
    commands.delete_job(db, TENANT, source)
    with db.read() as session:
        assert session.scalar(select(func.count()).select_from(JobSourceRow)) == 3, "those of the jobs that are over"
    commands.delete_job(db, TENANT, waiting)
    with db.read() as session:
        assert session.scalar(select(func.count()).select_from(JobSourceRow)) == 2


def test_a_retry_needs_the_same_networks_and_says_which_is_gone(
    db: Database, local_storage: Storage, tmp_path: Path
) -> None:
    source = finished_job(db, local_storage)
    view = register(db, local_storage, tmp_path, good(a=(2,)))
    over = [submit(db, from_job(source)), submit(db, taught_by(source)), submit(db, from_weights(view.id))]
    for job_id in over:
        commands.cancel_job(db, TENANT, job_id)
    again, _ = commands.retry_job(db, TENANT, over[0])
    with pytest.raises(InUse, match=again.id):
        commands.delete_job(db, TENANT, source)
    commands.cancel_job(db, TENANT, again.id)
    commands.delete_job(db, TENANT, source)
    weights.delete_weights(db, TENANT, view.id)
    pointers = ["/model/job", "/optimizations/0/teacher", "/model/weights"]
    for job_id, pointer in zip(over, pointers, strict=True):
        with pytest.raises(InvalidSpec) as refusal:
            commands.retry_job(db, TENANT, job_id)
        assert [fault.pointer for fault in refusal.value.faults] == [pointer]
    with db.read() as session:
        assert session.scalar(select(func.count()).select_from(JobRow).where(JobRow.state == "queued")) == 0


def test_a_submit_and_a_deletion_at_once_never_leave_a_job_without_its_source(
    db: Database, local_storage: Storage, tmp_path: Path
) -> None:
    def attempt(start: threading.Barrier, call: Callable[[], object]) -> bool:
        start.wait()
        try:
            call()
        except (InUse, InvalidSpec):
            return False
        return True

    outcomes = set()
    with ThreadPoolExecutor(2) as pool:
        for number in range(24):
            start = threading.Barrier(2)
            if number % 2:
                source = finished_job(db, local_storage, {})
                spec, delete = from_job(source), partial(commands.delete_job, db, TENANT, source)
            else:
                source = register(db, local_storage, tmp_path, good(a=(2,))).id
                spec, delete = from_weights(source), partial(weights.delete_weights, db, TENANT, source)
            made = pool.submit(attempt, start, partial(submit, db, spec))
            gone = pool.submit(attempt, start, delete)
            outcomes.add((made.result(), gone.result()))
    assert outcomes <= {(True, False), (False, True)}, "one of the two wins"


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.parametrize("what", ["job", "weights"])
def test_a_submit_waits_for_a_deletion_under_way_and_is_then_refused(
    db: Database, local_storage: Storage, tmp_path: Path, what: str
) -> None:
    source = finished_job(db, local_storage) if what == "job" else None
    uploaded = register(db, local_storage, tmp_path, good(a=(2,))).id
    spec = from_weights(uploaded) if source is None else from_job(source)
    with ThreadPoolExecutor(1) as pool:
        with db.write() as session:
            row = select(JobRow.id).where(JobRow.id == source) if source else select(WeightsRow.id)
            session.execute(row.with_for_update())
            made = pool.submit(submit, db, spec)
            with pytest.raises(TimeoutError):
                made.result(0.3)
            table = JobRow if source else WeightsRow
            session.execute(table.__table__.delete())  # type: ignore[attr-defined]
        with pytest.raises(InvalidSpec):
            made.result(5)


def test_a_description_without_references_costs_no_query(
    db: Database, local_storage: Storage, statements: list[str]
) -> None:
    assert resolve(db, local_storage, lives.SPEC) == {}
    assert statements == []
    submit(db)
    plain = len(statements)
    assert not any("job_sources" in sent or "weights" in sent for sent in statements)
    source = finished_job(db, local_storage)
    statements.clear()
    resolve(db, local_storage, from_job(source) | {"optimizations": taught_by(source, "baseline")["optimizations"]})
    assert len([sent for sent in statements if sent.startswith("SELECT jobs.id")]) == 1, "one for all jobs"
    statements.clear()
    submit(db, from_job(source))
    assert len(statements) == plain + 2


def test_the_files_of_each_network_are_found_for_the_worker(
    db: Database, local_storage: Storage, tmp_path: Path
) -> None:
    source = finished_job(db, local_storage)
    view = register(db, local_storage, tmp_path, good(a=(2,)))
    named = (
        Reference("job", source, "baseline", "/optimizations/0/teacher"),
        Reference("weights", view.id, None, "/model/weights"),
    )
    found = references.locate_files(db, TENANT, named)
    assert {key: [file.name for file in files] for key, files in found.items()} == {
        f"job-{source}-baseline": ["weights.safetensors", "architecture.json"],
        f"weights-{view.id}": ["weights.safetensors"],
    }
    for files in found.values():
        for file in files:
            content = local_storage.get_bytes(file.key)
            assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size_bytes, file.sha256)
    weights.delete_weights(db, TENANT, view.id)
    with pytest.raises(SourceUnavailable, match="there are no weights") as gone:
        references.locate_files(db, TENANT, named)
    assert (gone.value.pointer, gone.value.code) == ("/model/weights", "source_unavailable")
