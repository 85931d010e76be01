"""The job routes in one process: real rows, real files, a worker that only writes what a real one would."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.jobs import attempts
from tests.support.services.api import FILES, REPORT, SPEC, SUMMARY, Api, error_pointers, open_api


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with open_api(tmp_path_factory.mktemp("home")) as api:
        yield api


@pytest.fixture
def own(tmp_path) -> Iterator[Api]:
    """An API whose jobs are this test's alone."""
    with open_api(tmp_path) as api:
        yield api


def test_a_submitted_job_is_queued_and_says_where_it_is(api):
    answer = api.client.post("/v1/jobs", json=SPEC | {"labels": {"team": "vision"}})
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" == job["links"]["self"]
    assert (job["name"], job["labels"], job["state"], job["attempt"]) == ("small", {"team": "vision"}, "queued", 0)
    assert job["progress"]["fraction"] == 0
    assert job["progress"]["epochs"] == 2
    assert job["created_at"].endswith("Z")
    assert [job[name] for name in ("started_at", "finished_at", "error", "summary", "retry_of")] == [None] * 5
    assert job["stopped_early"] is False
    assert job["queue"] == {"position": 1, "reason": "no_worker", "workers_alive": 0}


def test_the_stored_spec_has_every_default_filled_in(api):
    spec = api.submit()["spec"]
    assert spec["training"]["optimizer"]["momentum"] == 0.9
    assert spec["exports"] == ["safetensors", "onnx", "pytorch"]
    assert spec["model"]["classes"] == 10
    assert api.client.post("/v1/jobs", json=spec).json()["spec"] == spec


def test_the_same_key_and_body_is_the_same_job_and_another_body_is_refused(api):
    headers = {"Idempotency-Key": "once"}
    first = api.client.post("/v1/jobs", json=SPEC, headers=headers)
    again = api.client.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": '"once"'})
    other = api.client.post("/v1/jobs", json=SPEC | {"name": "other"}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")


def test_a_refused_body_does_not_use_up_its_key(api):
    headers = {"Idempotency-Key": "after-a-mistake"}
    assert api.client.post("/v1/jobs", json=SPEC | {"spec_version": 9}, headers=headers).status_code == 422
    assert api.client.post("/v1/jobs", json=SPEC, headers=headers).status_code == 201


def test_twenty_submits_at_once_with_one_key_are_one_job(api):
    def submit(_: int) -> tuple[int, str]:
        answer = api.client.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": "crowd"})
        return answer.status_code, answer.json()["id"]

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(submit, range(20)))
    assert sorted(status for status, _ in answers) == [200] * 19 + [201]
    assert len({job_id for _, job_id in answers}) == 1


def test_validate_tells_costs_and_layers_and_stores_nothing(own):
    answer = own.client.post("/v1/jobs/validate", json=SPEC)
    plan = answer.json()
    assert answer.status_code == 200
    assert plan["valid"] is True
    assert [row["type"] for row in plan["layers"]][:3] == ["conv", "relu", "max_pool"]
    assert plan["given"] == plan["baseline"] == plan["planned"]
    assert set(plan["given"]) == {"params", "nonzero_params", "macs", "bytes"}
    assert own.client.get("/v1/jobs").json()["items"] == []


def test_a_mistake_is_a_problem_with_the_place_the_limit_and_the_value(api):
    broken = SPEC | {
        "model": {"input_shape": [1, 28, 28], "layers": [{"type": "conv", "out_channels": 0, "kernel_size": 3}]}
    }
    for path in ("/v1/jobs", "/v1/jobs/validate"):
        answer = api.client.post(path, json=broken)
        problem = answer.json()
        assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
        assert (problem["code"], problem["status"], problem["type"]) == (
            "invalid_spec",
            422,
            "/docs/errors#invalid_spec",
        )
        assert problem["request_id"] == answer.headers["x-request-id"]
        fault = problem["errors"][0]
        assert (fault["pointer"], fault["limit"], fault["value"]) == ("/model/layers/0/out_channels", 1, 0)


def test_an_unchanged_job_is_304_and_a_changed_one_is_not(api):
    path = f"/v1/jobs/{api.submit()['id']}"
    first = api.client.get(path)
    assert first.headers["retry-after"] == "2"
    same = api.client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", first.headers["etag"])
    api.client.post(f"{path}/cancel")
    changed = api.client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (changed.status_code, changed.json()["state"]) == (200, "cancelled")
    assert "retry-after" not in changed.headers
    assert "queue" not in changed.json()


def test_a_held_get_answers_when_the_job_changes(api):
    path = f"/v1/jobs/{api.submit()['id']}"
    etag = api.client.get(path).headers["etag"]
    timer = threading.Timer(0.4, lambda: api.client.post(f"{path}/cancel"))
    timer.start()
    started = time.monotonic()
    answer = api.client.get(path, params={"wait_s": 20}, headers={"If-None-Match": etag})
    timer.join()
    assert answer.json()["state"] == "cancelled"
    assert 0.3 < time.monotonic() - started < 5


def test_a_held_get_answers_at_once_when_the_client_is_behind_or_the_job_is_over(api):
    path = f"/v1/jobs/{api.submit()['id']}"
    started = time.monotonic()
    assert api.client.get(path, params={"wait_s": 20}, headers={"If-None-Match": '"old"'}).status_code == 200
    over = api.client.post(f"{path}/cancel").headers["etag"]
    assert api.client.get(path, params={"wait_s": 20}).status_code == 200
    assert api.client.get(path, params={"wait_s": 20}, headers={"If-None-Match": over}).status_code == 304
    assert time.monotonic() - started < 2


def test_a_held_get_gives_up_after_its_time(api):
    path = f"/v1/jobs/{api.submit()['id']}"
    etag = api.client.get(path).headers["etag"]
    started = time.monotonic()
    answer = api.client.get(path, params={"wait_s": "1.2"}, headers={"If-None-Match": etag})
    assert answer.status_code == 304
    assert 1.1 < time.monotonic() - started < 4


def test_a_held_get_does_not_end_with_an_event_that_changes_nothing_in_the_job(own):
    job_id = own.submit()["id"]
    claim = own.claim(job_id)
    path = f"/v1/jobs/{job_id}"
    etag = own.client.get(path).headers["etag"]
    talk = threading.Timer(0.3, lambda: own.say(claim, ("warning", "nothing that the job shows")))
    end = threading.Timer(2.3, lambda: own.client.post(f"{path}/pause"))
    for timer in (talk, end):
        timer.start()
    answer = own.client.get(path, params={"wait_s": 20}, headers={"If-None-Match": etag})
    for timer in (talk, end):
        timer.join()
    assert answer.status_code == 200
    assert answer.headers["etag"] != etag


def test_jobs_are_listed_newest_first_in_pages_bound_to_their_filters(own):
    ids = [own.submit(name=f"job {n}", labels={"parity": "even" if n % 2 == 0 else "odd"})["id"] for n in range(5)]
    first = own.client.get("/v1/jobs", params={"limit": 2}).json()
    second = own.client.get("/v1/jobs", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    last = own.client.get("/v1/jobs", params={"limit": 2, "cursor": second["next_cursor"]}).json()
    assert [job["id"] for page in (first, second, last) for job in page["items"]] == ids[::-1]
    assert last["next_cursor"] is None
    even = own.client.get("/v1/jobs", params={"label": "parity:even"}).json()["items"]
    assert [job["name"] for job in even] == ["job 4", "job 2", "job 0"]
    other = own.client.get("/v1/jobs", params={"state": "queued", "cursor": first["next_cursor"]})
    assert (other.status_code, other.json()["code"]) == (422, "invalid_cursor")


def test_jobs_are_listed_by_the_state_that_users_see(own):
    waiting, running, cancelling = (own.submit()["id"] for _ in range(3))
    own.claim(running)
    own.claim(cancelling)
    assert own.client.post(f"/v1/jobs/{cancelling}/cancel").json()["state"] == "cancelling"
    for state, job_id in (("queued", waiting), ("running", running), ("cancelling", cancelling)):
        assert [job["id"] for job in own.client.get("/v1/jobs", params={"state": state}).json()["items"]] == [job_id]


def test_verbs_move_a_waiting_job_and_are_202(api):
    path = f"/v1/jobs/{api.submit()['id']}"
    paused = api.client.post(f"{path}/pause")
    resumed = api.client.post(f"{path}/resume")
    cancelled = api.client.post(f"{path}/cancel")
    assert [answer.status_code for answer in (paused, resumed, cancelled)] == [202] * 3
    assert [answer.json()["state"] for answer in (paused, resumed, cancelled)] == ["paused", "queued", "cancelled"]


@pytest.mark.parametrize("verb", ["cancel", "stop", "pause", "resume"])
def test_a_verb_that_the_state_forbids_is_409_with_the_state_and_what_is_allowed(api, verb):
    job_id = api.delivered()
    answer = api.client.post(f"/v1/jobs/{job_id}/{verb}")
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (409, "illegal_transition")
    assert (problem["state"], problem["allowed"]) == ("succeeded", ["retry", "delete"])
    assert "succeeded" in problem["detail"]


def test_a_running_job_hears_wishes_and_a_second_cancel_is_202_too(api):
    job_id = api.submit()["id"]
    claim = api.claim(job_id)
    assert api.client.post(f"/v1/jobs/{job_id}/pause").status_code == 202
    assert api.say(claim) == "pause"
    assert api.client.post(f"/v1/jobs/{job_id}/resume").json()["state"] == "running"
    assert api.say(claim) is None
    assert [api.client.post(f"/v1/jobs/{job_id}/cancel").status_code for _ in range(2)] == [202, 202]
    assert api.client.get(f"/v1/jobs/{job_id}").json()["state"] == "cancelling"
    assert api.client.post(f"/v1/jobs/{job_id}/pause").status_code == 409


def test_if_match_guards_verbs_and_deletion(api):
    path = f"/v1/jobs/{api.submit()['id']}"
    etag = api.client.get(path).headers["etag"]
    stale = {"If-Match": '"stale"'}
    assert api.client.post(f"{path}/pause", headers=stale).json()["code"] == "precondition_failed"
    assert api.client.delete(path, headers=stale).status_code == 412
    assert api.client.post(f"{path}/pause", headers={"If-Match": etag}).status_code == 202
    assert api.client.delete(path, headers={"If-Match": "*"}).status_code == 204


def test_a_retry_is_a_new_job_with_the_same_spec(api):
    job_id = api.submit(labels={"team": "vision"})["id"]
    early = api.client.post(f"/v1/jobs/{job_id}/retry")
    assert (early.status_code, early.json()["code"]) == (409, "illegal_transition")
    old = api.client.post(f"/v1/jobs/{job_id}/cancel").json()
    answer = api.client.post(f"/v1/jobs/{job_id}/retry", headers={"Idempotency-Key": "again"})
    new = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/jobs/{new['id']}"
    assert (new["retry_of"], new["state"]) == (job_id, "queued")
    assert [new[name] for name in ("spec", "name", "labels")] == [old[name] for name in ("spec", "name", "labels")]
    twin = api.client.post(f"/v1/jobs/{job_id}/retry", headers={"Idempotency-Key": "again"})
    assert (twin.status_code, twin.json()["id"]) == (200, new["id"])


def test_a_deleted_job_is_gone_everywhere(api):
    job_id = api.delivered()
    assert api.client.delete(f"/v1/jobs/{job_id}").status_code == 204
    for part in ("", "/events", "/report", "/artifacts", "/artifacts/model.py", "/metrics", "/logs", "/checkpoints"):
        assert api.client.get(f"/v1/jobs/{job_id}{part}").json()["code"] == "not_found", part
    assert api.client.delete(f"/v1/jobs/{job_id}").status_code == 404


def test_a_running_job_that_is_deleted_is_hidden_at_once_and_told_to_cancel(api):
    job_id = api.submit()["id"]
    claim = api.claim(job_id)
    assert api.client.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert api.client.get(f"/v1/jobs/{job_id}").status_code == 404
    assert api.say(claim) == "cancel"


def test_progress_is_what_the_worker_last_said_and_whole_after_success(api):
    job_id = api.submit()["id"]
    claim = api.claim(job_id)
    api.say(claim, progress={"phase": "training", "epoch": 1, "epochs": 2, "step": 3, "steps": 8, "fraction": 0.4})
    job = api.client.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["attempt"], job["progress"]["fraction"]) == ("running", 1, 0.4)
    assert job["progress"]["eta_s"] is None
    api.deliver(claim, early=True)
    job = api.client.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["progress"]["fraction"], job["stopped_early"]) == ("succeeded", 1.0, True)
    assert job["summary"] == SUMMARY


def test_a_failed_job_has_its_error_and_no_report(api):
    job_id = api.submit()["id"]
    error = {"code": "diverged", "message": "the loss is no longer a number", "pointer": None, "hint": "lower the rate"}
    attempts.fail(api.db, api.claim(job_id), error)
    assert api.client.get(f"/v1/jobs/{job_id}").json()["error"] == error
    report = api.client.get(f"/v1/jobs/{job_id}/report")
    assert (report.status_code, report.json()["code"]) == (404, "not_found")


def test_the_report_is_409_before_the_end_and_the_report_after(api):
    job_id = api.submit()["id"]
    early = api.client.get(f"/v1/jobs/{job_id}/report")
    assert (early.status_code, early.json()["code"]) == (409, "not_finished")
    api.deliver(api.claim(job_id))
    assert api.client.get(f"/v1/jobs/{job_id}/report").json() == {"job_id": job_id, **REPORT}


def test_metrics_logs_and_checkpoints_are_what_the_worker_wrote(api):
    job_id = api.submit()["id"]
    claim = api.claim(job_id)
    api.say(
        claim, metrics=[("train.loss", 1, 2.5), ("train.loss", 2, 2.0), ("val.accuracy", 2, 0.5)], log="epoch 1\nü\n"
    )
    attempts.record_checkpoint(
        api.db,
        claim,
        step=2,
        epoch=1,
        phase="training",
        key=f"jobs/{job_id}/attempts/1/checkpoints/{2:012d}.safetensors",
        size_bytes=10,
        sha256="0" * 64,
        metrics={"val.accuracy": 0.5},
    )
    series = api.client.get(f"/v1/jobs/{job_id}/metrics").json()["series"]
    assert series == {"train.loss": [[1, 2.5], [2, 2.0]], "val.accuracy": [[2, 0.5]]}
    log = api.client.get(f"/v1/jobs/{job_id}/logs")
    assert (log.text, log.headers["content-type"]) == ("epoch 1\nü\n", "text/plain; charset=utf-8")
    kept = api.client.get(f"/v1/jobs/{job_id}/checkpoints").json()["items"]
    assert [(row["step"], row["epoch"], row["phase"], row["metrics"]) for row in kept] == [
        (2, 1, "training", {"val.accuracy": 0.5})
    ]


def test_artifacts_are_listed_and_downloaded_whole_and_in_parts(api):
    job_id = api.delivered()
    files = api.client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]
    assert [file["name"] for file in files] == sorted(FILES)
    for file in files:
        whole = api.client.get(file["href"])
        assert whole.content == FILES[file["name"]]
        assert (whole.headers["etag"], len(whole.content)) == (f'"{file["sha256"]}"', file["size_bytes"])
    href = next(file["href"] for file in files if file["name"] == "pruned.safetensors")
    part = api.client.get(href, headers={"Range": "bytes=10-19", "If-Range": api.client.get(href).headers["etag"]})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"0123456789", "bytes 10-19/100")
    head = api.client.head(href)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "100")
    beyond = api.client.get(href, headers={"Range": "bytes=100-"})
    assert (beyond.status_code, beyond.json()["code"]) == (416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == "bytes */100"


def test_a_job_that_runs_has_no_artifacts_yet(api):
    job_id = api.submit()["id"]
    assert api.client.get(f"/v1/jobs/{job_id}/artifacts").json() == {"items": []}
    assert api.client.get(f"/v1/jobs/{job_id}/artifacts/model.py").status_code == 404


def test_an_artifact_whose_bytes_are_gone_is_404_and_not_half_an_answer(api):
    job_id = api.delivered()
    api.context.storage.delete_prefix(f"jobs/{job_id}/")
    assert api.client.get(f"/v1/jobs/{job_id}/artifacts/model.py").json()["code"] == "not_found"


@pytest.mark.parametrize(
    ("key", "status"), [("", 422), ("a" * 256, 422), ("ü", 422), ("a b", 422), ('""', 201), ("a" * 255, 201)]
)
def test_an_idempotency_key_is_visible_ascii(api, key, status):
    answer = api.client.post("/v1/jobs", json=SPEC, headers={b"Idempotency-Key": key.encode("latin-1")})
    assert answer.status_code == status
    if status == 422:
        assert answer.json()["code"] == "invalid_idempotency_key"


def test_two_idempotency_keys_are_400(api):
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    assert api.client.post("/v1/jobs", json=SPEC, headers=headers).status_code == 400


def test_faults_name_every_mistake_at_once(api):
    problem = api.client.post("/v1/jobs", json={"spec_version": 1, "nme": "x"}).json()
    assert set(error_pointers(problem)) == {"/nme", "/data", "/model"}


def test_an_unknown_state_is_pointed_at(api):
    problem = api.client.get("/v1/jobs?state=done").json()
    assert error_pointers(problem) == ["/query/state"]
    assert "queued, running" in problem["errors"][0]["message"]
