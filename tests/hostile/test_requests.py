"""Addresses, queries and headers that attackers and mistakes send, over both databases: never a server error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.services import servers
from tests.support.services.api import SPEC, Api, served_api
from tests.support.services.raw_http import RawAnswer, send_raw

HOST = b"Host: localhost\r\nConnection: close\r\n"
UNKNOWN = "job_" + "0" * 26


class Served:
    """The API on a real port, with a job that waits and one that succeeded."""

    def __init__(self, api: Api, port: int) -> None:
        self.api = api
        self.port = port
        self.waiting: str = api.submit(name="waiting")["id"]
        self.done = api.delivered(name="done")

    def send(self, target: str | bytes, headers: bytes = b"", method: str = "GET", body: bytes = b"") -> RawAnswer:
        """The answer to a request whose target is sent as it is."""
        raw = target if isinstance(target, bytes) else target.encode("latin-1")
        return send_raw(self.port, method.encode() + b" " + raw + b" HTTP/1.1\r\n" + HOST + headers + b"\r\n" + body)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("home")
    if request.param == "sqlite":
        with served_api(home) as (api, port):
            yield Served(api, port)
    else:
        with (
            servers.postgres() as server,
            server.database() as url,
            served_api(home, database_url=url) as (api, port),
        ):
            yield Served(api, port)


BAD_IDS = [
    "x" * 300, "%00", "a%00b", "%ff", "%ed%a0%80", "..", "%2e%2e", "job_%D9%A1", "1_0", "9223372036854775808", "-1",
    UNKNOWN.upper(), UNKNOWN + "0", UNKNOWN + "%0a", UNKNOWN + "%20", "%F0%9F%8C%B3", "null", "*", "job_", "'--",
]  # fmt: skip


@pytest.mark.parametrize("part", ["", "/events", "/report", "/artifacts", "/artifacts/model.py", "/metrics", "/logs"])
def test_an_id_that_cannot_be_is_answered_like_one_that_is_not_there(served, part):
    expected = served.send(f"/v1/jobs/{UNKNOWN}{part}").problem
    for bad in BAD_IDS:
        problem = served.send(f"/v1/jobs/{bad}{part}").problem
        assert problem | {"request_id": ""} == expected | {"request_id": ""}, bad
    assert (expected["status"], expected["code"]) == (404, "not_found")


@pytest.mark.parametrize("verb", ["cancel", "stop", "pause", "resume", "retry"])
def test_a_verb_on_an_id_that_cannot_be_is_404(served, verb):
    for bad in (UNKNOWN, *BAD_IDS):
        assert served.send(f"/v1/jobs/{bad}/{verb}", method="POST").problem["code"] == "not_found", bad
    for bad in (UNKNOWN, *BAD_IDS):
        assert served.send(f"/v1/jobs/{bad}", method="DELETE").status == 404, bad
        assert served.send(f"/v1/datasets/{bad}", method="DELETE").status == 404, bad
        assert served.send(f"/v1/datasets/{bad}").status == 404, bad
        assert served.send(f"/v1/weights/{bad}", method="DELETE").status == 404, bad
        assert served.send(f"/v1/weights/{bad}").status == 404, bad


BAD_NAMES = [
    "../x", "..%2fx", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "//etc/passwd", "%5c", "%00", "a" * 300, "%ff",
    "model.py%00", ".hidden", "model.py/", "MODEL.PY", "%252e%252e", "..%5cx", "con", "model.py%0a",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_artifact_is_a_listed_name_and_nothing_else(served, name):
    for base in ("/v1/jobs", "/jobs"):
        answer = served.send(f"{base}/{served.done}/artifacts/{name}")
        assert (answer.status, answer.problem["code"]) == (404, "not_found")
    assert served.send(f"/assets/{name}").status == 404


BAD_QUERIES = [
    "limit=0", "limit=-1", "limit=9223372036854775808", "limit=1e2", "limit=1_0", "limit=%201", "limit=+1", "limit=1.0",
    "limit=", "limit=1&limit=2", "limit=NaN", "limit=%D9%A1", "limit=" + "9" * 5000, "limit=1%00", "limit[]=1",
    "state=done", "state=", "state=queued&state=queued", "state=Queued", "state=%00", "label=x", "label=:v", "label=",
    "label=a%00:b", "label=" + "k" * 201 + ":v", "label=%ff:x", "label=%ed%a0%80:x", "label=a:%", "label=%zz:1",
    "unknown=1", "a", "=", "&&", "limit=1;state=queued", "%00=1", "__proto__=1", "cursor", "LIMIT=1",
]  # fmt: skip


@pytest.mark.parametrize("query", BAD_QUERIES)
def test_a_query_that_a_list_does_not_know_is_422(served, query):
    answer = served.send(f"/v1/jobs?{query}")
    assert answer.status == 422, answer
    assert answer.problem["code"] in ("invalid_parameter", "invalid_cursor")


@pytest.mark.parametrize(
    "query", ["limit=201", "limit=1", "limit=2147483647", "label=a:", "label=a:b:c", "state=queued", ""]
)
def test_a_query_at_its_limits_is_answered(served, query):
    answer = served.send(f"/v1/jobs?{query}")
    assert answer.status == 200
    assert len(json.loads(answer.body)["items"]) <= 200


def test_a_query_in_raw_bytes_that_are_no_utf8_is_refused(served):
    assert served.send(b"/v1/jobs?label=\xff:x").status in (400, 422)


@pytest.mark.parametrize(
    "cursor", ["junk", "%00", "AAAA", "=" * 100, "a" * 7000, "%F0%9F%8C%B3", "-1", "W10", "bnVsbA", "_-_-", "%ff"]
)
def test_a_cursor_that_was_not_given_out_is_refused(served, cursor):
    answer = served.send(f"/v1/jobs?cursor={cursor}")
    assert answer.status == 422
    assert answer.problem["code"] in ("invalid_cursor", "invalid_parameter")
    assert served.send(f"/v1/datasets?cursor={cursor}").status == 422
    assert served.send(f"/v1/weights?cursor={cursor}").status == 422
    assert served.send(f"/?cursor={cursor}").status == 422


def test_an_edited_cursor_or_one_of_other_filters_is_refused(served):
    cursor = json.loads(served.send("/v1/jobs?limit=1").body)["next_cursor"]
    assert served.send(f"/v1/jobs?limit=1&cursor={cursor}").status == 200
    for wrong in (
        f"cursor={cursor[:-2]}AA",
        f"cursor={cursor}A",
        f"cursor={cursor}&state=queued",
        f"cursor={cursor[1:]}",
    ):
        assert served.send(f"/v1/jobs?{wrong}").problem["code"] == "invalid_cursor", wrong


@pytest.mark.parametrize(
    "query",
    ["wait_s=-1", "wait_s=61", "wait_s=NaN", "wait_s=inf", "wait_s=1e1", "wait_s=", "wait_s=0x1", "after=1", "wait=1"],
)
def test_a_wait_is_0_to_60_seconds(served, query):
    answer = served.send(f"/v1/jobs/{served.done}?{query}")
    assert (answer.status, answer.problem["code"]) == (422, "invalid_parameter")


@pytest.mark.parametrize(
    "query", ["after=-1", "after=9223372036854775808", "after=x", "after=1&after=1", "limit=0", "x=1"]
)
def test_events_are_asked_for_with_sane_numbers(served, query):
    answer = served.send(f"/v1/jobs/{served.done}/events?{query}")
    assert (answer.status, answer.problem["code"]) == (422, "invalid_parameter")


@pytest.mark.parametrize(
    "path", ["", "/report", "/artifacts", "/metrics", "/logs", "/checkpoints", "/artifacts/model.py"]
)
def test_a_query_where_none_is_taken_is_refused(served, path):
    assert served.send(f"/v1/jobs/{served.done}{path}?x=1").problem["code"] == "invalid_parameter"
    assert served.send(f"/v1/jobs/{served.waiting}/stop?force=1", method="POST").problem["code"] == "invalid_parameter"


def test_the_largest_numbers_are_answered(served):
    answer = served.send(f"/v1/jobs/{served.done}/events?after=999999999999999999&limit=2147483647")
    assert json.loads(answer.body) == {"items": [], "next_after": 999999999999999999}


GETS = ["/v1/jobs", "/v1/jobs/{done}", "/v1/jobs/{done}/events", "/v1/jobs/{done}/metrics", "/v1/jobs/{done}/logs"]
GETS += ["/v1/jobs/{done}/report", "/v1/jobs/{done}/artifacts", "/v1/jobs/{done}/artifacts/model.py", "/v1/datasets"]
GETS += ["/v1/jobs/{done}/checkpoints", "/v1/presets", "/v1/optimizations", "/v1/workers", "/healthz", "/readyz"]
GETS += ["/v1/weights"]
GETS += ["/metrics", "/openapi.json", "/docs", "/docs/jobs", "/docs/errors", "/", "/jobs/{done}", "/assets/page.js"]


@pytest.mark.parametrize("path", GETS)
def test_head_is_every_get_without_a_body_and_other_spellings_are_unknown(served, path):
    path = path.format(done=served.done)
    whole, head = served.send(path), served.send(path, method="HEAD")
    assert (whole.status, head.status, head.body) == (200, 200, b"")
    if path not in ("/metrics", "/readyz"):
        assert head.headers["content-length"] == whole.headers["content-length"] == str(len(whole.body))
    assert head.headers["content-type"] == whole.headers["content-type"]
    if path != "/":
        for other in (path + "/", path.upper(), path + ";x=y", "/" + path):
            answer = served.send(other)
            assert answer.status == 404, other
            assert "location" not in answer.headers


@pytest.mark.parametrize("path", GETS)
@pytest.mark.parametrize("accept", [b"Accept: image/png", b"Accept: \xff", b"Accept: */*;q=2,,"])
def test_what_we_cannot_serve_is_served_as_it_is(served, path, accept):
    assert served.send(path.format(done=served.done), accept + b"\r\n").status == 200


@pytest.mark.parametrize(
    ("tags", "status"), [("junk", 200), ('"a", "b"', 200), ("*", 304), ('W/"x",' * 3000, 200), ("\xff", 200), ("", 200)]
)
def test_conditions_are_compared_and_never_parsed_into_an_error(served, tags, status):
    for path in (f"/v1/jobs/{served.done}", f"/v1/jobs/{served.done}/artifacts/model.py"):
        answer = served.send(path, b"If-None-Match: " + tags.encode("latin-1") + b"\r\n")
        assert answer.status == status


@pytest.mark.parametrize("method", ["PUT", "PATCH", "POST", "OPTIONS", "TRACE", "DELETE"])
@pytest.mark.parametrize("path", ["/healthz", "/v1/presets", "/v1/jobs/{done}/report", "/v1/workers"])
def test_a_method_that_an_address_does_not_take_is_405(served, method, path):
    answer = served.send(path.format(done=served.done), method=method)
    assert (answer.status, answer.problem["code"], answer.headers["allow"]) == (405, "method_not_allowed", "GET")


@pytest.mark.parametrize(
    "value", ["5-2", "-", "a-b", "1-1-1", "0-1,3-4", "9" * 5000 + "-", "²-3", ",".join(["0-1"] * 2000), ""]
)
def test_a_range_that_is_none_is_the_whole_file(served, value):
    for unit in ("bytes=", "items=", ""):
        headers = f"Range: {unit}{value}\r\n".encode("latin-1", "replace")
        answer = served.send(f"/v1/jobs/{served.done}/artifacts/pruned.safetensors", headers)
        assert (answer.status, len(answer.body)) == (200, 100)


@pytest.mark.parametrize("value", ["100-", "100-200", "-0", "999999999999999999-"])
def test_a_range_behind_the_end_is_416(served, value):
    answer = served.send(f"/v1/jobs/{served.done}/artifacts/pruned.safetensors", f"Range: bytes={value}\r\n".encode())
    assert (answer.status, answer.problem["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */100"


def test_a_range_past_the_end_is_clipped_and_one_of_another_version_ignored(served):
    path = f"/v1/jobs/{served.done}/artifacts/pruned.safetensors"
    clipped = served.send(path, b"Range: bytes=95-500\r\n")
    assert (clipped.status, clipped.headers["content-range"]) == (206, "bytes 95-99/100")
    assert served.send(path, b'Range: bytes=5-9\r\nIf-Range: "old"\r\n').status == 200


@pytest.mark.parametrize(
    "headers",
    [
        b"Idempotency-Key: \r\n",
        b"Idempotency-Key: " + b"k" * 256 + b"\r\n",
        b"Idempotency-Key: \xe4\r\n",
        b"Idempotency-Key: a b\r\n",
    ],
)
def test_a_malformed_idempotency_key_is_422_on_every_route_that_takes_one(served, headers):
    length = b"Content-Type: application/json\r\nContent-Length: 2\r\n"
    submit = served.send("/v1/jobs", headers + length, "POST", b"{}")
    retry = served.send(f"/v1/jobs/{served.done}/retry", headers, "POST")
    assert submit.problem["code"] == retry.problem["code"] == "invalid_idempotency_key"


def test_two_idempotency_keys_or_one_with_nul_are_400(served):
    length = b"Content-Type: application/json\r\nContent-Length: 2\r\n"
    for headers in (b"Idempotency-Key: a\r\nIdempotency-Key: b\r\n", b"Idempotency-Key: a\0b\r\n"):
        assert served.send("/v1/jobs", headers + length, "POST", b"{}").status == 400


def test_a_key_belongs_to_its_route(served):
    body = json.dumps(SPEC).encode()
    headers = b"Idempotency-Key: shared\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
    submitted = json.loads(served.send("/v1/jobs", headers, "POST", body).body)
    retried = json.loads(served.send(f"/v1/jobs/{served.done}/retry", b"Idempotency-Key: shared\r\n", "POST").body)
    assert submitted["id"] != retried["id"]
    assert retried["retry_of"] == served.done


@pytest.mark.parametrize(
    "query", ["name=", "name=" + "n" * 201, "name=a%00b", "name=%E2%80%AEx", "format=zip", "format=", "x=1"]
)
def test_an_upload_has_a_sane_name_and_a_known_format(served, query):
    for path in ("/v1/datasets", "/v1/weights"):
        answer = served.send(f"{path}?{query}", b"Content-Length: 1\r\n", "POST", b"x")
        assert (answer.status, answer.problem["code"]) == (422, "invalid_parameter")


def test_an_empty_or_a_compressed_upload_is_refused(served):
    empty = served.send("/v1/datasets", b"Content-Length: 0\r\n", "POST")
    assert (empty.status, empty.problem["code"]) == (422, "invalid_parameter")
    packed = served.send("/v1/datasets", b"Content-Encoding: gzip\r\nContent-Length: 1\r\n", "POST", b"x")
    assert packed.problem["code"] == "unsupported_media_type"


def test_errors_never_echo_what_was_sent(served):
    marker = "zq7marker"
    requests: list[tuple[Any, ...]] = [
        (f"/v1/jobs/{marker}",),
        (f"/v1/jobs?label={marker}",),
        (f"/v1/jobs?state={marker}",),
        (f"/v1/jobs?{marker}=1",),
        (f"/v1/jobs?limit={marker}",),
        (f"/{marker}",),
        ("/v1/jobs", f"X: {marker}\r\nContent-Length: 11\r\n".encode(), "POST", b'{"zq7marker'),
        (f"/v1/jobs/{UNKNOWN}/events", f"Last-Event-ID: {marker}\r\n".encode()),
    ]
    for request in requests:
        answer = served.send(*request)
        assert 400 <= answer.status < 500
        assert marker.encode() not in answer.body, request
