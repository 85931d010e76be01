"""Fetching of the networks that a job refers to: whole and checked by their hashes, or a clear error."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from app import weights
from app.database.engine import Database
from app.database.tables import JobRow
from app.errors import SourceUnavailable, Unavailable
from app.spec.job import parse_job
from app.spec.references import Reference, references_in
from app.storage import LocalStorage
from tests.support.jobs import lives
from tests.support.jobs.finished import both_networks, finished_job, submit
from tests.support.jobs.weights import good
from tests.support.services.uploads import put_bytes
from worker.run.references import read_sources
from worker.supervision import transfers
from worker.supervision.transfers import Transfers


class Store(LocalStorage):
    """A folder that does not answer the first `absences` times that an object is asked for."""

    absences = 0

    def link_or_fetch(self, key: str, path: Path) -> None:
        if self.absences:
            self.absences -= 1
            raise Unavailable
        super().link_or_fetch(key, path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "objects")


@pytest.fixture
def source(db: Database, store: Store) -> str:
    return finished_job(db, store)


def spec_of(source: str, **more: Any) -> dict[str, Any]:
    distill = {"type": "distill", "teacher": source, "artifact": "baseline"}
    return {**lives.SPEC, "model": {"job": source}, "optimizations": [distill], **more}


@pytest.fixture
def carried(db: Database, store: Store, source: str) -> Iterator[tuple[Transfers, tuple[Reference, ...]]]:
    """The transfers of a job that starts from a finished one and learns from its baseline, and what they are to fetch."""
    made = Transfers(lives.claim(db, submit(db, spec_of(source))), db, store)
    yield made, references_in(parse_job(spec_of(source)))
    made.close()


def test_every_network_comes_whole_under_its_key(
    carried: tuple[Transfers, tuple[Reference, ...]], source: str, tmp_path: Path
) -> None:
    made, named = carried
    made.fetch_sources(named, tmp_path / "sources")
    files = both_networks()
    for stem, prefix in (("pruned", ""), ("baseline", "baseline.")):
        folder = tmp_path / "sources" / f"job-{source}-{stem}"
        assert (folder / "weights.safetensors").read_bytes() == files[f"{stem}.safetensors"]
        assert (folder / "architecture.json").read_bytes() == files[f"{prefix}architecture.json"]
    found = read_sources(parse_job(spec_of(source)), tmp_path / "sources")
    assert found[f"job-{source}-pruned"].classes == tuple("abcdefghij")


def test_uploaded_weights_come_alone(db: Database, store: Store, tmp_path: Path) -> None:
    file = good(a__weight=(2, 3))
    (tmp_path / "upload").write_bytes(file)
    digest = hashlib.sha256(file).hexdigest()
    view = weights.register_weights(
        db, store, lives.TENANT, tmp_path / "upload", name="w", size_bytes=len(file), sha256=digest
    )
    spec = {**lives.SPEC, "model": {"preset": "simple_cnn", "weights": view.id}}
    made = Transfers(lives.claim(db, submit(db, spec)), db, store)
    made.fetch_sources(references_in(parse_job(spec)), tmp_path / "sources")
    made.close()
    folder = tmp_path / "sources" / f"weights-{view.id}"
    assert [path.name for path in folder.iterdir()] == ["weights.safetensors"]
    assert (folder / "weights.safetensors").read_bytes() == file


def test_a_store_that_comes_back_is_waited_for(
    carried: tuple[Transfers, tuple[Reference, ...]], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, named = carried
    store.absences = 2
    waited: list[float] = []
    monkeypatch.setattr(made._closed, "wait", waited.append)
    made.fetch_sources(named, tmp_path / "sources")
    assert len(waited) == 2
    assert store.absences == 0


def test_a_store_that_stays_away_is_no_end_of_the_job(
    carried: tuple[Transfers, tuple[Reference, ...]], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, named = carried
    store.absences = 1
    monkeypatch.setattr(transfers, "RETRY_FOR_S", 0.0)
    with pytest.raises(Unavailable):
        made.fetch_sources(named, tmp_path / "sources")


@pytest.mark.parametrize("name", ["pruned.safetensors", "architecture.json"])
@pytest.mark.parametrize("how", ["gone", "changed"])
def test_bytes_that_are_gone_or_changed_end_the_job_with_advice(
    carried: tuple[Transfers, tuple[Reference, ...]], store: Store, source: str, tmp_path: Path, name: str, how: str
) -> None:
    made, named = carried
    key = f"jobs/{source}/attempts/1/artifacts/{name}"
    if how == "gone":
        store.delete(key)
    else:
        put_bytes(store, key, store.get_bytes(key)[:-1] + b"\x01")
    with pytest.raises(SourceUnavailable, match="is gone from" if how == "gone" else "are not those that were") as end:
        made.fetch_sources(named, tmp_path / "sources")
    assert (end.value.code, end.value.pointer) == ("source_unavailable", "/model/job")
    assert end.value.advice


def test_a_source_whose_row_is_gone_ends_the_job_with_advice(
    carried: tuple[Transfers, tuple[Reference, ...]], db: Database, source: str, tmp_path: Path
) -> None:
    made, named = carried
    with db.write() as session:
        session.execute(delete(JobRow).where(JobRow.id == source))  # as no route would do it
    with pytest.raises(SourceUnavailable, match=f"there is no job {source}"):
        made.fetch_sources(named, tmp_path / "sources")
