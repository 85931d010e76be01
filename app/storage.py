"""The object store: a local folder, or S3, GCS and Azure through obstore, by URL.

Keys are made of our own ids and names only. An object is there whole or not at all. In a local folder we write the
files ourselves: obstore's LocalStore never calls fsync, so its objects survive a kill but not a power cut, and it
follows symbolic links out of its folder.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions
from obstore.store import from_url

from app.errors import ObjectNotFound, StartupError, StorageDenied, StorageFull, Unavailable

KEY = re.compile(r"(?!.*//)[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*", re.ASCII)
MOST_KEY_BYTES = 1024
CHUNK_BYTES = 1 << 20
TEMPORARY = ".part-"  # no key's segment begins with a dot
TEMPORARY_AGE_S = 24 * 3600.0  # a frozen process may still be writing
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LINK_REFUSED = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP}
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}

CLIENT: dict[str, Any] = {
    "timeout": timedelta(minutes=10),  # one request with its whole body; obstore's 30 s cut large downloads
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=30),
    "allow_http": True,  # the endpoint's own URL says which
}
RETRY: dict[str, Any] = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing shows it."""

    key: str
    size_bytes: int
    modified_at: datetime


class Storage(ABC):
    """A store of objects: bytes under keys.

    Every method may raise Unavailable (no answer, full, access denied); a malformed key is a ValueError.
    """

    @classmethod
    def open(cls, url: str) -> Storage:
        """The store of the URL: `file:///folder`, `s3://bucket/prefix`, `gs://...`, `az://...`.

        Endpoint and credentials come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...). Raises
        StartupError.
        """
        parts = urlsplit(url)
        if parts.scheme == "file":
            return LocalStorage(Path(unquote(parts.path)))
        try:
            return RemoteStorage(url)
        except (ValueError, exceptions.BaseError) as error:
            reason = str(error).splitlines()[0]
            raise StartupError(f"ESPALIER_STORAGE_URL={url} cannot be used: {reason}") from error

    @abstractmethod
    def check(self) -> None:
        """Raise Unavailable if the store cannot be used now."""

    @abstractmethod
    def put_file(self, key: str, path: Path) -> None:
        """Store the file's bytes, streamed; replaces the object that is there."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of the object. Raises ObjectNotFound."""

    @abstractmethod
    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` up to, not with, `end` (default: the object's end), in chunks.

        `start` must lie inside the object, unless both are left out. Raises ObjectNotFound before the first chunk.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object, if it is there."""

    @abstractmethod
    def list(self, prefix: str) -> list[StoredObject]:
        """All objects whose keys begin with the prefix, which may end inside a name; sorted by key."""

    def get_bytes(self, key: str) -> bytes:
        """The whole object. Raises ObjectNotFound."""
        return b"".join(self.stream(key))

    def fetch(self, key: str, path: Path) -> None:
        """Write the object to the file, which appears whole or not at all. Raises ObjectNotFound."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with _translate_disk_errors(), _write_whole(path) as file:
            for chunk in self.stream(key):
                file.write(chunk)

    def link_or_fetch(self, key: str, path: Path) -> None:
        """Make the object a file that is only read: a hard link on the same disk, else a copy as by `fetch`.

        Raises ObjectNotFound.
        """
        self.fetch(key, path)

    def delete_prefix(self, prefix: str) -> int:
        """Remove all objects whose keys begin with the prefix; returns how many. Raises ValueError if it is empty."""
        if not prefix:
            raise ValueError("an empty prefix would delete everything")
        found = self.list(prefix)
        for stored in found:
            self.delete(stored.key)
        return len(found)

    def local_path(self, key: str) -> Path | None:
        """The path of the object on this machine's disk; None for a remote store. Raises ObjectNotFound."""
        return None

    def sweep_temporaries(self, older_than_s: float = TEMPORARY_AGE_S) -> int:
        """Remove the partial files of killed writers; returns how many. Remote stores have their own rules for that."""
        return 0


class LocalStorage(Storage):
    """A folder; safe against kill -9 and power cuts."""

    def __init__(self, root: Path) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(
                f"cannot make the folder of objects {root}: {error.strerror}; set ESPALIER_HOME"
            ) from error
        self._root = root.resolve()

    def check(self) -> None:
        if not os.access(self._root, os.R_OK | os.W_OK | os.X_OK):
            raise StorageDenied(f"the folder of objects {self._root} cannot be written to")

    def put_file(self, key: str, path: Path) -> None:
        with _translate_disk_errors(), path.open("rb") as source, self._write_object(key) as file:
            shutil.copyfileobj(source, file, CHUNK_BYTES)

    def size(self, key: str) -> int:
        with self._translate_missing():
            return self._existing(key).stat().st_size

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        with self._translate_missing():
            file = self._existing(key).open("rb")
        return _chunks(file, start, end)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _translate_disk_errors():
            path.unlink(missing_ok=True)
            for folder in path.parents:  # folders that are empty now
                if folder == self._root:
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break

    def list(self, prefix: str) -> list[StoredObject]:
        found = []
        with _translate_disk_errors():
            for path in self._files(prefix.rpartition("/")[0]):
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix) and KEY.fullmatch(key):  # else partly written, or a file that is not ours
                    try:
                        stat = path.stat()
                    except FileNotFoundError:
                        continue  # deleted meanwhile
                    found.append(StoredObject(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC)))
        return sorted(found, key=lambda stored: stored.key)

    def link_or_fetch(self, key: str, path: Path) -> None:
        with self._translate_missing():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if _link_file(self._existing(key), path):
                return
        self.fetch(key, path)

    def local_path(self, key: str) -> Path | None:
        return self._existing(key)

    def sweep_temporaries(self, older_than_s: float = TEMPORARY_AGE_S) -> int:
        swept = 0
        with _translate_disk_errors():
            for path in self._files(""):
                if path.name.startswith(TEMPORARY) and _age_s(path) >= older_than_s:
                    path.unlink(missing_ok=True)
                    swept += 1
        return swept

    def _files(self, folder: str) -> Iterator[Path]:
        start = self._root / _check_key(folder) if folder else self._root
        for parent, _, names in os.walk(start, followlinks=False):
            for name in names:
                path = Path(parent, name)
                if not path.is_symlink():
                    yield path

    def _path(self, key: str) -> Path:
        """The key's file. Raises ValueError if a symbolic link leads out of the folder."""
        path = self._root / _check_key(key)
        if not path.resolve().is_relative_to(self._root):
            raise ValueError(f"{key!r} leads out of the store")
        return path

    def _existing(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise ObjectNotFound
        return path

    @contextmanager
    def _translate_missing(self) -> Iterator[None]:
        try:
            with _translate_disk_errors():
                yield
        except FileNotFoundError as error:  # deleted after it was found
            raise ObjectNotFound from error

    @contextmanager
    def _write_object(self, key: str) -> Iterator[BinaryIO]:
        path = self._path(key)
        for _ in range(3):
            self._make_folder(path.parent)
            try:
                with _write_whole(path) as file:
                    yield file
                return
            except _FolderRemoved:
                continue  # a deletion removed the empty folder
        raise Unavailable

    def _make_folder(self, folder: Path) -> None:
        """Make the folder and its parents; the entry of each new one is synced to the disk."""
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            _sync_folder(new.parent)


class RemoteStorage(Storage):
    """A bucket, or a prefix in one."""

    def __init__(self, url: str) -> None:
        self._store = from_url(url, client_options=CLIENT, retry_config=RETRY)  # type: ignore[call-overload]

    def check(self) -> None:
        with _translate_store_errors(reads=False):
            next(iter(obstore.list(self._store, "readiness", chunk_size=1)), None)

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as file, _translate_store_errors(reads=False):
            obstore.put(self._store, _check_key(key), file, max_concurrency=4)

    def size(self, key: str) -> int:
        with _translate_store_errors():
            return obstore.head(self._store, _check_key(key))["size"]

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        options: Any = None
        if end is not None:
            options = {"range": (start, end)}
        elif start > 0:
            options = {"range": {"offset": start}}
        with _translate_store_errors():
            result = obstore.get(self._store, _check_key(key), options=options)
        return self._chunks(result)

    def delete(self, key: str) -> None:
        with _translate_store_errors():
            try:
                obstore.delete(self._store, _check_key(key))
            except FileNotFoundError:
                return

    def list(self, prefix: str) -> list[StoredObject]:
        folder = prefix.rpartition("/")[0]  # obstore's prefixes are whole folders
        with _translate_store_errors(reads=False):
            found = [
                StoredObject(entry["path"], entry["size"], entry["last_modified"])
                for chunk in obstore.list(self._store, folder or None, chunk_size=1000)
                for entry in chunk
                if entry["path"].startswith(prefix)
            ]
        return sorted(found, key=lambda stored: stored.key)

    def _chunks(self, result: obstore.GetResult) -> Iterator[bytes]:
        with _translate_store_errors():
            for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)


def _check_key(key: str) -> str:
    if len(key.encode()) > MOST_KEY_BYTES or KEY.fullmatch(key) is None:
        raise ValueError(f"{key!r} is no key: segments of letters, digits, `.`, `_`, `-`, none beginning with a dot")
    return key


def _age_s(path: Path) -> float:
    """Seconds since the file was written; below zero for one that was removed."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return -1.0


def _chunks(file: BinaryIO, start: int, end: int | None) -> Iterator[bytes]:
    with file, _translate_disk_errors():
        file.seek(start)
        left = None if end is None else end - start
        while left is None or left > 0:
            chunk = file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
            if not chunk:
                return
            if left is not None:
                left -= len(chunk)
            yield chunk


def _link_file(source: Path, path: Path) -> bool:
    """Make `path` a second name of the file, which never changes, as objects are replaced; False where links fail."""
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in LINK_REFUSED:
            raise
        return False
    return True


class _FolderRemoved(Exception):
    """The folder was removed before the first byte was written."""


@contextmanager
def _write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets the name `path` once all of it is on the disk; nothing remains if anything raises."""
    temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
    try:
        file = temporary.open("xb")
    except FileNotFoundError as error:
        raise _FolderRemoved from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translate_disk_errors() -> Iterator[None]:
    """Translate errors of the disk to ours; a file that is not there is left to the caller."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull from error
        if error.errno in DENIED:
            raise StorageDenied(f"no access to {error.filename}") from error
        raise Unavailable(f"the disk does not work: {error.strerror}") from error


@contextmanager
def _translate_store_errors(*, reads: bool = True) -> Iterator[None]:
    """Translate errors of the store to ours. What is missing in a read is the object, else the bucket."""
    try:
        yield
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise StorageDenied from error
    except FileNotFoundError as error:  # the builtin, not obstore's NotFoundError
        if reads:
            raise ObjectNotFound from error
        raise StorageDenied("the object store's bucket does not exist") from error
    except exceptions.BaseError as error:
        raise Unavailable("the object store does not answer: try again") from error
