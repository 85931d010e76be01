"""`RequestGuard` around a toy application, on the real server: what is refused before any route sees it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from app.api import middleware, problems
from app.api.bodies import read_json
from app.errors import Unavailable
from app.settings import Settings
from tests.support.services.raw_http import RawAnswer, send_raw, serving

SPEC_LIMIT = 1000
UPLOAD_LIMIT = 200_000
HOST = b"Host: localhost\r\n"


class Answers:
    """What `RequestGuard` reported about each answer."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int]] = []

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Note one answer."""
        self.seen.append((method, route, status))


def toy(settings: Settings, answers: Answers) -> FastAPI:
    """Routes that read JSON, count an upload, tell their tenant, fail."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.post("/v1/jobs")
    async def read(request: Request) -> Response:
        return JSONResponse({"read": len(await read_json(request))})

    @app.post("/v1/datasets")
    async def count(request: Request) -> Response:
        return JSONResponse({"counted": sum([len(chunk) async for chunk in request.stream()])})

    @app.post("/v1/unread")
    @app.get("/v1/things/{thing}")
    @app.get("/jobs/{thing}")
    @app.get("/")
    @app.get("/healthz")
    def plain(request: Request, thing: str = "") -> Response:
        return JSONResponse({"tenant": getattr(request.state, "tenant", None)})

    @app.get("/v1/broken")
    def broken() -> Response:
        raise RuntimeError("secret path /home/me")

    @app.get("/v1/away")
    def away() -> Response:
        raise Unavailable()

    problems.install_handlers(app)
    app.add_middleware(middleware.RequestGuard, settings=settings, observe=answers.observe)
    return app


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, answers: Answers) -> Iterator[int]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), max_spec_bytes=SPEC_LIMIT, max_upload_bytes=UPLOAD_LIMIT)
    with serving(toy(settings, answers), settings) as port:
        yield port


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), api_key="s3cret-ü")
    with serving(toy(settings, Answers()), settings) as port:
        yield port


def get(port: int, path: str, headers: bytes = HOST, method: str = "GET") -> RawAnswer:
    return send_raw(port, f"{method} {path} HTTP/1.1\r\n".encode("latin-1") + headers + b"\r\n")


def post(port: int, path: str, headers: bytes, body: bytes = b"") -> RawAnswer:
    return send_raw(port, f"POST {path} HTTP/1.1\r\n".encode() + HOST + headers + b"\r\n" + body)


def test_every_answer_carries_the_security_headers_and_its_request_id(port):
    for answer in (get(port, "/v1/things/a"), get(port, "/nowhere"), get(port, "/v1/broken")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["x-request-id"].startswith("req_")
        assert "server" not in answer.headers


def test_an_unknown_exception_is_a_500_that_tells_nothing_but_its_id(port):
    answer = get(port, "/v1/broken")
    assert answer.status == 500
    assert answer.problem["code"] == "internal"
    assert answer.problem["request_id"] == answer.headers["x-request-id"]
    assert b"secret" not in answer.body


def test_an_absent_backend_says_when_to_try_again(port):
    answer = get(port, "/v1/away")
    assert (answer.status, answer.problem["code"], answer.headers["retry-after"]) == (503, "unavailable", "2")


def test_unknown_addresses_and_methods_are_problems(port):
    assert get(port, "/nowhere").problem["code"] == "not_found"
    answer = get(port, "/v1/unread")
    assert (answer.problem["code"], answer.headers["allow"]) == ("method_not_allowed", "POST")
    for path in ("/v1/things/", "/V1/things/a", "//v1/things/a", "/v1/things/a;x=y/b", "/v1/things/a%2fb"):
        assert get(port, path).status == 404, path


@pytest.mark.parametrize("method", ["TRACE", "FOO"])
def test_strange_methods_are_refused(port, method):
    assert get(port, "/v1/things/a", method=method).status in (400, 405)


@pytest.mark.parametrize("target", ["*", "http://localhost/v1/things/a"])
def test_strange_targets_are_no_server_errors(port, target):
    assert get(port, target, method="OPTIONS").status in (400, 404, 405)


def test_head_is_get_without_a_body(port):
    whole, head = get(port, "/v1/things/a"), get(port, "/v1/things/a", HOST + b"Connection: close\r\n", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


def test_an_address_longer_than_8_kib_is_414(port):
    assert get(port, "/v1/things/" + "a" * 8200).problem["code"] == "uri_too_long"
    assert get(port, "/v1/things/a?" + "&".join(f"a{n}=1" for n in range(10_000))).status in (414, 400)
    assert get(port, "/v1/things/a?x=" + "a" * 8000).status == 200


def test_too_many_or_too_large_headers_are_431_or_a_closed_door(port):
    many = b"".join(b"X-%d: 1\r\n" % n for n in range(101))
    assert get(port, "/v1/things/a", HOST + many).problem["code"] == "headers_too_large"
    assert get(port, "/v1/things/a", HOST + b"X-Big: " + b"a" * 70_000 + b"\r\n").problem["code"] == "headers_too_large"
    assert get(port, "/v1/things/a", HOST + b"".join(b"X-%d: 1\r\n" % n for n in range(5000))).status == 431
    assert get(port, "/v1/things/a", HOST + b"X-Big: " + b"a" * 1_000_000 + b"\r\n").status in (400, 0)


@pytest.mark.parametrize("headers", [b"", HOST * 2, b"Host: a b\r\n", b"Host: \r\n", b"Host: http://localhost\r\n"])
def test_a_request_without_exactly_one_valid_host_is_400(port, headers):
    assert get(port, "/v1/things/a", headers).status == 400


@pytest.mark.parametrize("host", [b"evil.example", b"127.0.0.1.nip.io:80", b"10.0.0.1", b"localhost.evil"])
def test_a_foreign_host_is_refused_while_no_key_is_set(port, host):
    answer = get(port, "/v1/things/a", b"Host: " + host + b"\r\n")
    assert (answer.status, answer.problem["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST:8000", b"127.0.0.1:1", b"[::1]:8000"])
def test_every_name_of_this_machine_is_a_good_host(port, host):
    assert get(port, "/v1/things/a", b"Host: " + host + b"\r\n").status == 200


@pytest.mark.parametrize("value", [b"a\0b", b"a\nb", b"a\rb"])
def test_control_characters_in_a_header_are_400(port, value):
    assert get(port, "/v1/things/a", HOST + b"X-Request-ID: " + value + b"\r\n").status == 400


def test_a_request_id_of_the_client_is_not_used(port):
    answer = get(port, "/v1/things/a", HOST + b"X-Request-ID: mine\r\nX-Forwarded-Host: evil\r\n")
    assert answer.status == 200
    assert answer.headers["x-request-id"] != "mine"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Content-Type: application/json\r\n", 200),
        (b"Content-Type: application/json; charset=utf-16\r\n", 200),
        (b"Content-Type: application/json; charset*=utf-8''x\r\n", 200),
        (b"content-type: APPLICATION/JSON\r\n", 200),
        (b"Content-Type: application/merge-patch+json\r\n", 200),
        (b"", 415),
        (b"Content-Type: text/plain\r\n", 415),
        (b"Content-Type: multipart/form-data; boundary=x\r\n", 415),
        (b"Content-Type: application/x-www-form-urlencoded\r\n", 415),
        (b"Content-Type: " + b"a" * 20_000 + b"\r\n", 415),
        (b"Content-Type: application/json\r\nContent-Encoding: gzip\r\n", 415),
        (b"Content-Type: application/json\r\nContent-Encoding: br, identity\r\n", 415),
        (b"Content-Type: application/json\r\nContent-Encoding: identity\r\n", 200),
    ],
)
def test_a_json_body_is_known_by_its_content_type(port, headers, status):
    answer = post(port, "/v1/jobs", headers + b"Content-Length: 2\r\n", b"{}")
    assert answer.status == status
    if status == 415:
        assert answer.problem["code"] == "unsupported_media_type"


@pytest.mark.parametrize("length", [b"-1", b"abc", b"+5", b"5, 6", b"0x5", b"5\r\nContent-Length: 6"])
def test_a_malformed_content_length_is_400(port, length):
    answer = post(port, "/v1/jobs", b"Content-Type: application/json\r\nContent-Length: " + length + b"\r\n", b"{}   ")
    assert answer.status == 400


@pytest.mark.parametrize("length", [b"1001", b"100000000000000000000", b"9" * 400])
def test_a_body_over_the_limit_is_413_by_its_length_before_it_is_read(port, length):
    started = time.monotonic()
    answer = post(port, "/v1/jobs", b"Content-Type: application/json\r\nContent-Length: " + length + b"\r\n", b"{")
    assert answer.status in (413, 400)
    if answer.status == 413:
        assert answer.problem["code"] == "too_large"
        assert "1000 bytes" in answer.problem["detail"]
    assert time.monotonic() - started < 5


def test_a_body_one_byte_over_the_limit_is_413_and_one_at_the_limit_is_read(port):
    json_type = b"Content-Type: application/json\r\n"
    at = post(port, "/v1/jobs", json_type + b"Content-Length: 1000\r\n", b" " * 1000)
    over = post(port, "/v1/jobs", json_type + b"Content-Length: 1001\r\n", b" " * 1001)
    assert (at.status, over.status) == (200, 413)


def test_a_chunked_body_over_the_limit_is_413_while_it_comes(port):
    chunks = b"".join(b"64\r\n" + b" " * 100 + b"\r\n" for _ in range(11)) + b"0\r\n\r\n"
    answer = post(port, "/v1/jobs", b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n", chunks)
    assert answer.problem["code"] == "too_large"


def test_an_upload_has_a_limit_of_its_own(port):
    at = post(port, "/v1/datasets", b"Content-Length: 200000\r\n", b"x" * UPLOAD_LIMIT)
    assert json.loads(at.body) == {"counted": UPLOAD_LIMIT}
    over = b"".join(b"c350\r\n" + b" " * 50_000 + b"\r\n" for _ in range(5)) + b"0\r\n\r\n"
    assert post(port, "/v1/datasets", b"Transfer-Encoding: chunked\r\n", over).problem["code"] == "too_large"


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
    ],
)
def test_broken_framing_is_400_or_an_error_of_the_body(port, framing):
    answer = send_raw(port, b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n" + framing)
    assert answer.status in (400, 408, 413)


def test_a_chunk_that_claims_a_quintillion_bytes_does_not_hang(port, monkeypatch):
    monkeypatch.setattr(middleware, "BODY_S", 0.5)
    request = (
        b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    answer = send_raw(port, request + b"1000000000000000\r\n{}")
    assert answer.status in (400, 408, 413)


def test_a_body_that_does_not_come_is_408(port, monkeypatch):
    monkeypatch.setattr(middleware, "BODY_S", 0.3)
    answer = post(port, "/v1/jobs", b"Content-Type: application/json\r\nContent-Length: 10\r\n", b"{")
    assert (answer.problem["code"], answer.headers["connection"]) == ("request_timeout", "close")


def test_an_upload_that_falls_silent_is_408_and_a_steady_one_is_not(port, monkeypatch):
    monkeypatch.setattr(middleware, "UPLOAD_SILENCE_S", 0.4)
    answer = post(port, "/v1/datasets", b"Content-Length: 10\r\n", b"12345")
    assert answer.problem["code"] == "request_timeout"
    steady = send_raw(
        port,
        b"POST /v1/datasets HTTP/1.1\r\n" + HOST + b"Content-Length: 100000\r\n\r\n" + b"x" * 60_000,
        pause=lambda: time.sleep(0.3),
        then=b"x" * 40_000,
    )
    assert json.loads(steady.body) == {"counted": 100_000}


def test_an_upload_slower_than_64_kib_a_second_is_408(port, monkeypatch):
    monkeypatch.setattr(middleware, "UPLOAD_SILENCE_S", 0.4)
    answer = send_raw(
        port,
        b"POST /v1/datasets HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\n\r\n1",
        pause=lambda: time.sleep(0.3),
        then=b"2",
    )
    assert answer.problem["code"] == "request_timeout"


def test_a_small_body_that_no_route_reads_keeps_its_connection(port):
    answer = post(port, "/v1/unread", b"Content-Length: 2\r\n", b"{}")
    assert answer.status == 200
    assert "connection" not in answer.headers


def test_expect_100_continue_is_answered_and_a_refusal_comes_without_it(port):
    json_type = b"Content-Type: application/json\r\nExpect: 100-continue\r\n"
    request = b"POST /v1/jobs HTTP/1.1\r\n" + HOST + json_type + b"Content-Length: 2\r\n\r\n"
    good = send_raw(port, request, pause=lambda: time.sleep(0.1), then=b"{}")
    assert json.loads(good.body) == {"read": 2}
    refused = send_raw(port, b"POST /v1/jobs HTTP/1.1\r\n" + HOST + json_type + b"Content-Length: 5000\r\n\r\n")
    assert refused.problem["code"] == "too_large"


def test_the_edge_reports_route_templates_and_never_addresses(port, answers):
    answers.seen.clear()
    get(port, "/v1/things/somebody")
    get(port, "/secret-path")
    get(port, "/v1/things/a", HOST + b"Connection: close\r\n", method="HEAD")
    post(port, "/v1/jobs", b"Content-Length: 5000\r\n")
    until = time.monotonic() + 5
    while len(answers.seen) < 4 and time.monotonic() < until:  # a refusal is counted when its connection is over
        time.sleep(0.01)
    assert answers.seen == [
        ("GET", "/v1/things/{thing}", 200),
        ("GET", "other", 404),
        ("HEAD", "/v1/things/{thing}", 200),
        ("POST", "other", 413),
    ]


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Authorization: Bearer\r\n",
        b"Authorization: Bearer wrong\r\n",
        b"Authorization: \xff\xfe\r\n",
        b"Authorization: Bearer s3cret-\xfc\r\n",
        b"Authorization: Basic " + base64.b64encode("x:s3cret-ü".encode()) + b"\r\n",
        ("Authorization: Bearer s3cret-ü\r\n" * 2).encode(),
    ],
)
def test_without_its_key_v1_is_401(keyed, header):
    answer = get(keyed, "/v1/things/a", b"Host: espalier.example\r\n" + header)
    assert (answer.status, answer.problem["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_with_its_key_v1_answers_for_the_tenant_under_any_host(keyed):
    header = "Host: espalier.example\r\nAuthorization: bearer s3cret-ü\r\n".encode()
    assert json.loads(get(keyed, "/v1/things/a", header).body) == {"tenant": "default"}


def test_pages_take_the_key_as_a_password_and_health_takes_none(keyed):
    assert get(keyed, "/healthz").status == 200
    for path in ("/", "/jobs/a"):
        refused = get(keyed, path)
        assert (refused.status, refused.headers["www-authenticate"]) == (401, 'Basic realm="espalier"')
        basic = b"Authorization: Basic " + base64.b64encode("me:s3cret-ü".encode()) + b"\r\n"
        assert get(keyed, path, HOST + basic).status == 200
        assert get(keyed, path, HOST + b"Authorization: Basic %%%\r\n").status == 401


def test_nothing_sent_or_a_head_in_drips_ends_the_connection(port, monkeypatch):
    from app.api import server

    monkeypatch.setattr(server, "HEAD_S", 0.3)
    started = time.monotonic()
    assert send_raw(port, b"").status == 0
    assert send_raw(port, b"GET / HTTP/1.1\r\nHost: loc").status == 0
    assert time.monotonic() - started < 5


def test_a_log_line_has_no_body_no_header_and_no_query(port, capfd):
    get(port, "/v1/things/whoami?token=hush", HOST + b"X-Secret: hush\r\n")
    written = "".join(capfd.readouterr())
    assert "hush" not in written
    assert "whoami" not in written
    assert Path(__file__).name not in written
