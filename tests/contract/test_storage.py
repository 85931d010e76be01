"""The object store: a local folder and an S3 server keep the same promises."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.errors import ObjectNotFound, StartupError, StorageDenied, StorageFull, Unavailable
from app.storage import CHUNK_BYTES, TEMPORARY, Storage
from tests.support.services import servers
from tests.support.services.uploads import put_bytes

BYTES = bytes(range(256)) * 10


def source(folder: Path) -> str:
    """The path of a file of 5,000 bytes."""
    path = folder / "source"
    path.write_bytes(b"x" * 5000)
    return str(path)


def test_what_was_put_comes_back_whole_and_in_parts(storage: Storage) -> None:
    put_bytes(storage, "jobs/a/b.bin", BYTES)
    assert storage.get_bytes("jobs/a/b.bin") == BYTES
    assert storage.size("jobs/a/b.bin") == len(BYTES)
    for start, end in ((0, 1), (5, 10), (2559, 2560), (2000, None), (0, None), (0, 2560), (100, 10_000)):
        assert b"".join(storage.stream("jobs/a/b.bin", start, end)) == BYTES[start:end], (start, end)
    put_bytes(storage, "jobs/a/empty", b"")
    assert storage.get_bytes("jobs/a/empty") == b""
    assert storage.size("jobs/a/empty") == 0


def test_a_put_replaces_the_object(storage: Storage) -> None:
    put_bytes(storage, "k", b"one")
    put_bytes(storage, "k", b"two")
    assert storage.get_bytes("k") == b"two"


def test_large_files_go_in_and_out_by_pieces(storage: Storage, tmp_path: Path) -> None:
    source, back = tmp_path / "source.bin", tmp_path / "deep" / "back.bin"
    source.write_bytes(os.urandom(12 * CHUNK_BYTES + 17))
    storage.put_file("big", source)
    chunks = list(storage.stream("big"))
    assert len(chunks) > 4
    assert max(map(len, chunks)) < 11 * CHUNK_BYTES
    storage.fetch("big", back)
    assert hashlib.sha256(back.read_bytes()).digest() == hashlib.sha256(source.read_bytes()).digest()
    assert [path.name for path in back.parent.iterdir()] == ["back.bin"]


def test_a_missing_object_is_not_found_and_its_deletion_is_fine(storage: Storage, tmp_path: Path) -> None:
    for look in (storage.get_bytes, storage.size, storage.stream):
        with pytest.raises(ObjectNotFound):
            look("no/such")
    with pytest.raises(ObjectNotFound):
        storage.fetch("no/such", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    storage.delete("no/such")
    assert storage.delete_prefix("no/") == 0
    assert storage.list("no/") == []


def test_a_missing_file_is_the_callers_mistake(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.put_file("k", tmp_path / "no-such")
    assert storage.list("") == []


def test_a_list_is_sorted_and_takes_prefixes_that_end_inside_a_name(storage: Storage) -> None:
    before = datetime.now(UTC)
    keys = ["a/2/x", "a/1/x.json", "a/1/x.safetensors", "a/10/x", "ab/1", "b"]
    for key in keys:
        put_bytes(storage, key, key.encode())
    assert [stored.key for stored in storage.list("")] == sorted(keys)
    assert [stored.key for stored in storage.list("a/")] == sorted(key for key in keys if key.startswith("a/"))
    assert [stored.key for stored in storage.list("a/1")] == ["a/1/x.json", "a/1/x.safetensors", "a/10/x"]
    assert [stored.key for stored in storage.list("a/1/x.")] == ["a/1/x.json", "a/1/x.safetensors"]
    assert [stored.size_bytes for stored in storage.list("b")] == [1]
    assert all(abs(stored.modified_at - before) < timedelta(seconds=30) for stored in storage.list(""))


def test_a_prefix_is_deleted_and_nothing_beside_it(storage: Storage) -> None:
    for key in ("jobs/1/a", "jobs/1/b/c", "jobs/12/a", "jobs/2/a"):
        put_bytes(storage, key, b"x")
    assert storage.delete_prefix("jobs/1/") == 2
    assert [stored.key for stored in storage.list("jobs/")] == ["jobs/12/a", "jobs/2/a"]
    with pytest.raises(ValueError, match="everything"):
        storage.delete_prefix("")
    storage.delete("jobs/2/a")
    put_bytes(storage, "jobs/2/a", b"again")
    assert storage.get_bytes("jobs/2/a") == b"again"


@pytest.mark.parametrize(
    "key",
    [
        *("", "/abs", "a//b", "a/", "..", "a/../b", "a/./b", ".hidden", "a/.part-1", "a\\b", "a b", "a\0b"),
        "é",
        "a\n",
        "a" * 1025,
    ],
)
def test_names_that_could_escape_or_differ_between_stores_are_refused(
    storage: Storage, key: str, tmp_path: Path
) -> None:
    for touch in (storage.get_bytes, storage.size, storage.delete, storage.stream):
        with pytest.raises(ValueError, match="is no key"):
            touch(key)
    with pytest.raises(ValueError, match="is no key"):
        put_bytes(storage, key, b"x")
    assert not any(tmp_path.glob("abs*"))


def test_a_store_that_can_be_used_says_nothing(storage: Storage) -> None:
    storage.check()


def test_a_symbolic_link_out_of_the_folder_is_not_followed(local_storage: Storage, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (tmp_path / "objects" / "link").symlink_to(outside)
    (tmp_path / "objects" / "file").symlink_to(outside / "secret")
    for key in ("link/secret", "file"):
        with pytest.raises(ValueError, match="leads out"):
            local_storage.get_bytes(key)
        with pytest.raises(ValueError, match="leads out"):
            put_bytes(local_storage, key, b"x")
    assert local_storage.list("") == []
    assert (outside / "secret").read_bytes() == b"secret"


def test_files_that_are_no_objects_are_neither_listed_nor_deleted(local_storage: Storage, tmp_path: Path) -> None:
    put_bytes(local_storage, "jobs/a/1", b"x")
    here = local_storage.local_path("jobs/a/1")
    assert here is not None
    foreign = [here.with_name(".DS_Store"), here.with_name("copy of 1")]
    for path in foreign:
        path.touch()
    assert [stored.key for stored in local_storage.list("jobs/")] == ["jobs/a/1"]
    assert local_storage.delete_prefix("jobs/a/") == 1
    assert all(path.exists() for path in foreign)


def test_a_local_object_has_a_path_and_a_remote_one_has_none(
    local_storage: Storage, s3_server: servers.S3, tmp_path: Path
) -> None:
    put_bytes(local_storage, "a/b", b"x")
    assert local_storage.local_path("a/b") == tmp_path / "objects" / "a" / "b"
    with pytest.raises(ObjectNotFound):
        local_storage.local_path("a/c")
    assert Storage.open("s3://espalier/x").local_path("a/b") is None


WRITER = """
import os, sys
from pathlib import Path
from app.storage import Storage
real, synced = os.fsync, []
os.fsync = lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1]
Storage.open(sys.argv[1]).put_file("new/folder/object", Path(sys.argv[2]))
print("\\n".join(synced))
"""


def test_a_local_write_syncs_the_file_and_every_folder_it_made_before_it_returns(tmp_path: Path) -> None:
    root = tmp_path / "objects"
    root.mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", WRITER, root.as_uri(), source(tmp_path)], capture_output=True, text=True, check=True
    )
    synced = ran.stdout.splitlines()
    assert synced[:2] == [str(root), str(root / "new")], "the entries of the new folders"
    assert synced[2].startswith(str(root / "new" / "folder" / TEMPORARY)), "the bytes, before they have a name"
    assert synced[3:] == [str(root / "new" / "folder")], "the name"


KILLED = """
import os, signal, sys
from pathlib import Path
from app.storage import Storage
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
Storage.open(sys.argv[1]).put_file("object", Path(sys.argv[2]))
"""


def test_a_killed_writer_leaves_no_object_and_its_remains_are_swept_when_they_are_old(
    local_storage: Storage, tmp_path: Path
) -> None:
    ran = subprocess.run([sys.executable, "-c", KILLED, (tmp_path / "objects").as_uri(), source(tmp_path)], check=False)
    assert ran.returncode == -9
    [left] = (tmp_path / "objects").iterdir()
    assert left.name.startswith(TEMPORARY)
    assert local_storage.list("") == []
    assert local_storage.sweep_temporaries() == 0
    os.utime(left, (time.time() - 90_000,) * 2)
    put_bytes(local_storage, "object", b"whole")
    assert local_storage.sweep_temporaries() == 1
    assert [path.name for path in (tmp_path / "objects").iterdir()] == ["object"]


def test_a_full_disk_is_called_so_and_leaves_nothing(tmp_path: Path) -> None:
    full = """
import resource, signal, sys
from pathlib import Path
from app.errors import StorageFull
from app.storage import Storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    Storage.open(sys.argv[1]).put_file("a/object", Path(sys.argv[2]))
except StorageFull:
    print("full")
"""
    ran = subprocess.run(
        [sys.executable, "-c", full, (tmp_path / "objects").as_uri(), source(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "full\n"
    assert list((tmp_path / "objects" / "a").iterdir()) == []
    assert issubclass(StorageFull, Unavailable)


def test_a_store_that_does_not_answer_says_try_again_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{servers.free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    away = Storage.open("s3://espalier/x")
    began = time.monotonic()
    for touch in (lambda: away.get_bytes("k"), lambda: put_bytes(away, "k", b"x"), away.check):
        with pytest.raises(Unavailable, match="does not answer"):
            touch()
    assert time.monotonic() - began < 20


def test_a_bucket_that_does_not_exist_is_no_missing_object(s3_server: servers.S3) -> None:
    nowhere = Storage.open("s3://no-such-bucket/x")
    with pytest.raises(StorageDenied, match="bucket"):
        put_bytes(nowhere, "k", b"x")
    with pytest.raises(Unavailable):
        nowhere.check()


@pytest.mark.parametrize("url", ["ftp://host/x", "no-url", "s3://"])
def test_a_url_that_names_no_store_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(StartupError, match="ESPALIER_STORAGE_URL"):
        Storage.open(url)


def test_a_folder_that_cannot_be_made_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StartupError, match="ESPALIER_HOME"):
        Storage.open((tmp_path / "file" / "objects").as_uri())


def test_an_object_is_brought_as_a_file_that_outlives_it(storage: Storage, tmp_path: Path) -> None:
    put_bytes(storage, "a/b", b"first")
    path = tmp_path / "deep" / "file"
    storage.link_or_fetch("a/b", path)
    put_bytes(storage, "a/b", b"second")
    assert path.read_bytes() == b"first"
    storage.link_or_fetch("a/b", path)
    storage.delete("a/b")
    assert path.read_bytes() == b"second"
    with pytest.raises(ObjectNotFound):
        storage.link_or_fetch("a/b", path)


def test_where_links_are_refused_an_object_is_copied(
    local_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    put_bytes(local_storage, "a/b", b"content")
    monkeypatch.setattr(os, "link", refuse)
    local_storage.link_or_fetch("a/b", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"content"
