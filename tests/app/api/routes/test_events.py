"""Events as JSON and as a stream, over the real server: order, resumption, ends."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.api import context
from app.api.routes import events
from app.jobs import commands, queries
from tests.support.services.api import Api, served_api

STREAM = {"Accept": "text/event-stream"}


@contextmanager
def _served(home: Path) -> Iterator[tuple[Api, httpx2.Client]]:
    with (
        httpx2.Client(timeout=20) as client,
        served_api(home) as (api, port),
    ):
        client.base_url = f"http://127.0.0.1:{port}"
        yield api, client


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, httpx2.Client]]:
    with pytest.MonkeyPatch.context() as patch, _served(tmp_path_factory.mktemp("home")) as both:
        patch.setattr(events, "POLL_S", 0.1)
        patch.setattr(context, "POLL_S", 0.1)
        yield both


def _follow(client: httpx2.Client, job_id: str, headers: dict[str, str] | None = None, **params: Any) -> list[Any]:
    """Every event until the stream ends by itself."""
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM | (headers or {}), params=params) as answer:
        assert answer.status_code == 200
        return [event for event in httpx2.EventSource(answer) if event.data]


def test_events_are_listed_in_order_with_a_number_to_go_on_from(served):
    api, client = served
    job_id = api.submit()["id"]
    claim = api.claim(job_id)
    api.say(claim, ("phase.started", "training begins"), ("epoch.finished", "epoch 1"))
    whole = client.get(f"/v1/jobs/{job_id}/events").json()
    assert [event["type"] for event in whole["items"]] == [
        "job.submitted",
        "job.claimed",
        "phase.started",
        "epoch.finished",
    ]
    assert [event["seq"] for event in whole["items"]] == [1, 2, 3, 4]
    assert set(whole["items"][0]) == {"seq", "at", "type", "level", "message", "data"}
    page = client.get(f"/v1/jobs/{job_id}/events", params={"after": 1, "limit": 2}).json()
    assert ([event["seq"] for event in page["items"]], page["next_after"]) == ([2, 3], 3)
    end = client.get(f"/v1/jobs/{job_id}/events", params={"after": 4}).json()
    assert end == {"items": [], "next_after": 4}


def test_more_than_a_thousand_events_are_cut_to_a_thousand(served):
    api, client = served
    job_id = api.submit()["id"]
    api.say(api.claim(job_id), *[("warning", f"number {n}") for n in range(1100)])
    page = client.get(f"/v1/jobs/{job_id}/events", params={"limit": 5000}).json()
    assert (len(page["items"]), page["next_after"]) == (1000, 1000)
    assert len(client.get(f"/v1/jobs/{job_id}/events").json()["items"]) == 200


def test_a_stream_tells_what_was_and_what_comes_and_ends_with_the_job(served):
    api, client = served
    job_id = api.submit()["id"]
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.extend(_follow(client, job_id)))
    reader.start()
    claim = api.claim(job_id)
    for epoch in range(3):
        time.sleep(0.15)
        api.say(claim, ("epoch.finished", f"epoch {epoch}"))
    api.deliver(claim)
    reader.join(10)
    assert not reader.is_alive()
    assert [int(event.id) for event in seen] == [1, 2, 3, 4, 5, 6]
    assert [event.event for event in seen][-2:] == ["epoch.finished", "job.succeeded"]
    listed = client.get(f"/v1/jobs/{job_id}/events").json()["items"]
    assert [json.loads(event.data) for event in seen] == listed


def test_the_first_line_tells_when_to_reconnect_and_nothing_is_cached(served):
    api, client = served
    job_id = api.delivered()
    answer = client.get(f"/v1/jobs/{job_id}/events", headers=STREAM)
    assert answer.text.startswith("retry: 3000\n\nid: 1\nevent: job.submitted\ndata: {")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"


def test_a_stream_resumes_behind_last_event_id_which_wins_over_after(served):
    api, client = served
    job_id = api.submit()["id"]
    claim = api.claim(job_id)
    api.say(claim, *[("epoch.finished", f"epoch {n}") for n in range(4)])
    api.deliver(claim)
    assert [int(event.id) for event in _follow(client, job_id, {"Last-Event-ID": "5"})] == [6, 7]
    assert [int(event.id) for event in _follow(client, job_id, {"Last-Event-ID": "6"}, after=1)] == [7]
    assert [int(event.id) for event in _follow(client, job_id, after=6)] == [7]
    assert _follow(client, job_id, {"Last-Event-ID": "999999"}) == []


def test_a_stream_behind_the_end_waits_and_still_ends_with_the_job(served):
    api, client = served
    job_id = api.submit()["id"]
    claim = api.claim(job_id)
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.extend(_follow(client, job_id, {"Last-Event-ID": "10"})))
    reader.start()
    time.sleep(0.4)
    assert reader.is_alive()
    api.deliver(claim)
    reader.join(10)
    assert not reader.is_alive()
    assert seen == []


@pytest.mark.parametrize("value", ["junk", "-1", "9" * 5000, "1.0", "", "٣"])
def test_a_last_event_id_that_is_no_number_is_400(served, value):
    api, client = served
    path = f"/v1/jobs/{api.submit()['id']}/events"
    for headers in ({}, STREAM):
        answer = client.get(path, headers=headers | {"Last-Event-ID": value.encode()})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_parameter")


def test_an_unknown_job_has_no_stream(served):
    _, client = served
    answer = client.get(f"/v1/jobs/job_{'0' * 26}/events", headers=STREAM)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_head_of_a_stream_is_answered_and_over(served):
    api, client = served
    answer = client.head(f"/v1/jobs/{api.submit()['id']}/events", headers=STREAM)
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_silent_stream_sends_comments(served, monkeypatch):
    api, client = served
    monkeypatch.setattr(events, "KEEP_ALIVE_S", 0.2)
    job_id = api.submit()["id"]
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as answer:
        lines = answer.iter_lines()
        assert any(line == ": keep-alive" for line in lines)


def test_a_stream_ends_after_its_time_and_the_client_goes_on(served, monkeypatch):
    api, client = served
    monkeypatch.setattr(events, "LONGEST_STREAM_S", 0.3)
    job_id = api.submit()["id"]
    assert [int(event.id) for event in _follow(client, job_id)] == [1]


def test_the_stream_of_a_job_that_is_deleted_ends(served):
    api, client = served
    job_id = api.submit()["id"]
    timer = threading.Timer(0.3, lambda: commands.delete_job(api.db, "default", job_id))
    timer.start()
    assert [int(event.id) for event in _follow(client, job_id)] == [1]
    timer.join()


def test_one_stream_too_many_is_429_and_a_closed_one_makes_room(served, monkeypatch):
    api, client = served
    monkeypatch.setattr(context, "MOST_STREAMS", 2)
    path = f"/v1/jobs/{api.submit()['id']}/events"
    with client.stream("GET", path, headers=STREAM) as first, client.stream("GET", path, headers=STREAM) as second:
        lines = first.iter_lines(), second.iter_lines()  # a client closes a stream whose iterator is dropped
        assert [next(each) for each in lines] == ["retry: 3000"] * 2
        refused = client.get(path, headers=STREAM)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        assert refused.headers["retry-after"] == "5"
    until = time.monotonic() + 5
    while client.head(path, headers=STREAM).status_code == 429 and time.monotonic() < until:
        time.sleep(0.05)
    assert client.head(path, headers=STREAM).status_code == 200


def test_many_readers_of_one_job_ask_the_database_once_a_look(served, monkeypatch):
    api, client = served
    job_id = api.submit()["id"]
    asked: list[str] = []
    version = queries.job_version

    def counting(db: Any, tenant: str, job: str) -> str:
        asked.append(job)
        return version(db, tenant, job)

    monkeypatch.setattr(queries, "job_version", counting)
    streams = [client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) for _ in range(10)]
    answers = [stream.__enter__() for stream in streams]
    time.sleep(1.0)
    for answer, stream in zip(answers, streams, strict=True):
        answer.close()
        stream.__exit__(None, None, None)
    assert 3 <= len(asked) <= 25, len(asked)


def test_streams_end_and_the_server_leaves_at_once_when_it_is_told_to(tmp_path):
    with _served(tmp_path) as (api, client):
        job_id = api.submit()["id"]
        seen: list[Any] = []
        readers = [threading.Thread(target=lambda: seen.extend(_follow(client, job_id))) for _ in range(3)]
        for reader in readers:
            reader.start()
        time.sleep(0.5)
        held = threading.Thread(target=lambda: client.get(f"/v1/jobs/{job_id}", params={"wait_s": 30}))
        held.start()
        time.sleep(0.2)
        started = time.monotonic()
    assert time.monotonic() - started < 4
    for thread in (*readers, held):
        thread.join(5)
        assert not thread.is_alive()
    assert len(seen) == 3


def test_the_server_says_where_it_listens(tmp_path, capfd):
    with _served(tmp_path) as (_, client):
        port = client.base_url.port
    assert f"listening on http://127.0.0.1:{port}\n" in capfd.readouterr().out
