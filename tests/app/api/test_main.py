"""The application as a process: what it imports, what it needs, how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.api.server import GuardedHttp, serve_options
from app.errors import StartupError
from app.main import create_app
from app.settings import Settings
from tests.support.services.service import Service, embedded_service

MIB = 1 << 20
IMPORTS = """
import json, os, sys, threading
before = {name: value for name, value in os.environ.items()}
import app.main
after_import = [len(threading.enumerate()), dict(os.environ) == before, os.listdir(sys.argv[1])]
from app.settings import Settings
app.main.create_app(Settings(home=sys.argv[1]))
heavy = [name for name in ("torch", "torchvision", "onnx", "onnxruntime", "worker", "boto3", "scipy") if name in sys.modules]
print(json.dumps({"heavy": heavy, "after_import": after_import}))
"""


def test_the_api_imports_neither_torch_nor_the_worker_and_importing_it_does_nothing(tmp_path):
    command = [sys.executable, "-c", IMPORTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == {"heavy": [], "after_import": [1, True, []]}


def test_without_a_key_it_does_not_listen_to_others(tmp_path):
    with pytest.raises(StartupError, match="ESPALIER_API_KEY"):
        create_app(Settings(home=tmp_path, host="0.0.0.0"))


def test_the_server_has_limits_and_speaks_for_itself(tmp_path):
    options = serve_options(Settings(home=tmp_path, port=1234))
    assert (options["host"], options["port"], options["http"]) == ("127.0.0.1", 1234, GuardedHttp)
    assert options["limit_concurrency"] == options["backlog"] == 512
    assert (options["timeout_keep_alive"], options["timeout_graceful_shutdown"]) == (5, 10)
    assert not any(options[name] for name in ("server_header", "access_log", "proxy_headers"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = {"ESPALIER_MAX_UPLOAD_BYTES": str(4096 * MIB)}
    with embedded_service(tmp_path_factory.mktemp("home"), workers=0, environment=environment) as service:
        yield service


def _memory_mib(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(field)


def test_the_api_takes_little_memory_after_ordinary_work(service):
    spec = {
        "spec_version": 1,
        "data": {"dataset": "fashion-mnist"},
        "model": {"preset": "resnet20"},
        "optimizations": [{"type": "prune", "budget": {"macs": 0.5}}],
    }
    for _ in range(20):
        job_id = service.submit(spec)
        service.get("/v1/jobs")
        service.get(f"/v1/jobs/{job_id}/events")
    assert service.client.get("/openapi.json").status_code == service.client.get("/").status_code == 200
    assert _memory_mib(service.process.pid, "VmRSS") < 150


def test_an_upload_of_hundreds_of_megabytes_never_sits_in_memory(service):
    piece = bytes(MIB)
    answer = service.client.post("/v1/datasets?name=large", content=(piece for _ in range(320)), timeout=120)
    assert (answer.status_code, answer.json()["size_bytes"]) == (201, 320 * MIB)
    assert answer.json()["state"] in ("checking", "rejected")
    assert _memory_mib(service.process.pid, "VmHWM") < 200
    assert list((service.home / "uploads").iterdir()) == []
