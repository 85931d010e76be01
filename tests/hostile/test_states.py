"""Every verb in every state, alone and in a crowd: what is allowed is 202, the rest 409 with the state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.jobs import lives
from tests.support.services.api import Api, open_api

VERBS = ("cancel", "stop", "pause", "resume", "retry")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with open_api(tmp_path_factory.mktemp("home")) as api:
        yield api


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", lives.EVERY_STATE)
def test_a_verb_does_what_the_job_says_is_allowed(api, state, verb):
    path = f"/v1/jobs/{lives.job_in(api.db, state)}"
    before = api.client.get(path).json()
    answer = api.client.post(f"{path}/{verb}")
    if verb in before["allowed"]:
        assert answer.status_code == (201 if verb == "retry" else 202)
    else:
        assert (answer.status_code, answer.json()["code"]) == (409, "illegal_transition")
        assert (answer.json()["state"], answer.json()["allowed"]) == (before["state"], before["allowed"])
        assert api.client.get(path).json()["state"] == before["state"]


@pytest.mark.parametrize("state", lives.EVERY_STATE)
def test_the_parts_of_a_job_are_there_in_every_state(api, state):
    path = f"/v1/jobs/{lives.job_in(api.db, state)}"
    for part in ("", "/events", "/metrics", "/logs", "/artifacts", "/checkpoints"):
        assert api.client.get(path + part).status_code == 200, part
    report = api.client.get(f"{path}/report")
    expected = {"succeeded": 200, "failed": 404, "cancelled": 404}.get(state, 409)
    assert report.status_code == expected
    if expected == 409:
        assert report.json()["code"] == "not_finished"
    assert api.client.get(path.replace("/v1", "")).status_code == 200


@pytest.mark.parametrize("state", lives.EVERY_STATE)
def test_a_job_can_be_deleted_in_every_state(api, state):
    path = f"/v1/jobs/{lives.job_in(api.db, state)}"
    assert api.client.delete(path).status_code == 204
    assert api.client.get(path).status_code == 404
    assert api.client.delete(path).status_code == 404


def _crowd(api: Api, requests: list[tuple[str, str]]) -> Counter[int]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return Counter(pool.map(lambda request: api.client.request(*request).status_code, requests))


def test_twenty_cancels_at_once_cancel_once(api):
    path = f"/v1/jobs/{lives.job_in(api.db, 'queued')}"
    assert _crowd(api, [("POST", f"{path}/cancel")] * 20) == {202: 1, 409: 19}
    types = [event["type"] for event in api.client.get(f"{path}/events").json()["items"]]
    assert types == ["job.submitted", "job.cancelled"]


def test_twenty_deletions_at_once_delete_once(api):
    path = f"/v1/jobs/{lives.job_in(api.db, 'succeeded')}"
    assert _crowd(api, [("DELETE", path)] * 20) == {204: 1, 404: 19}


def test_a_crowd_of_different_verbs_leaves_a_history_without_gaps(api):
    path = f"/v1/jobs/{lives.job_in(api.db, 'queued')}"
    answered = _crowd(
        api, [("POST", f"{path}/{verb}") for verb in ("pause", "resume", "pause", "resume", "cancel")] * 4
    )
    assert set(answered) <= {202, 409}
    events = api.client.get(f"{path}/events").json()["items"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert len(events) == 1 + answered[202]
    assert events[-1]["type"] == "job.cancelled"
