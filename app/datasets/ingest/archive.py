"""Archives as strangers send them: members are read one by one, counted, and never written under their own names."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from app.datasets.ingest.limits import MIB, UploadLimits, rejection

READ_BYTES = 1 * MIB
LONGEST_PATH = 1024
LONGEST_PART = 255
ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError)
JUNK_PARTS = frozenset({"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"})
DRIVE = re.compile(r"^[A-Za-z]:")
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class ArchiveMember:
    """One regular file of an archive: its cleaned path and the size it declares, bytes."""

    name: str
    size: int

    @property
    def parts(self) -> tuple[str, ...]:
        """The path's folders and its file name."""
        return tuple(self.name.split("/"))


class Stream(Protocol):
    """What a member is read through."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end."""


class Archive(Protocol):
    """An archive whose entries have been listed and checked."""

    entries: tuple[ArchiveMember, ...]

    def members(self) -> Iterator[tuple[ArchiveMember, Stream]]:
        """Every entry with its bytes, in the archive's order; a stream can be read until the next entry comes."""


class ByteCounter:
    """Counts the bytes that were unpacked from an archive, and refuses it beyond the limits."""

    def __init__(self, limits: UploadLimits, archive: str) -> None:
        self._limits = limits
        self._archive = archive
        self.total = 0

    def add(self, size: int) -> None:
        """Count `size` more bytes.

        Raises Rejected beyond the limit of all members together.
        """
        self.total += size
        if self.total > self._limits.unpacked_bytes:
            raise rejection(self._archive, f"unpacks to more than {self._limits.unpacked_bytes} bytes")

    def check_ratio(self, name: str, unpacked: int, compressed: int) -> None:
        """Raise Rejected if `unpacked` bytes came from suspiciously few."""
        if unpacked > self._limits.ratio_from_bytes and unpacked > self._limits.ratio * max(1, compressed):
            raise rejection(
                name, f"unpacks to more than {self._limits.ratio} times its size: this looks like an archive bomb"
            )


def clean_name(raw: str) -> str:
    """The path of an entry in NFC, without `.` parts.

    Raises Rejected for names that point outside, cannot be encoded, or are too long.
    """
    shown = ascii(raw[:80])
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in raw):
        raise rejection(shown, "its name has control characters or is not UTF-8")
    if raw.startswith("/") or DRIVE.match(raw):
        raise rejection(shown, "its name is an absolute path: names must be relative to the archive")
    if "\\" in raw:
        raise rejection(shown, "its name has a backslash: pack again with a tool that writes '/' between folders")
    parts = [part for part in unicodedata.normalize("NFC", raw).split("/") if part not in ("", ".")]
    if ".." in parts:
        raise rejection(shown, "its name points outside the archive ('..')")
    name = "/".join(parts)
    if len(name.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_PART for part in parts):
        raise rejection(shown, f"its name is longer than {LONGEST_PART} bytes in one part or {LONGEST_PATH} in all")
    return name


class Listing:
    """Collects the entries of an archive, and refuses too many and those of equal names."""

    def __init__(self, limits: UploadLimits, archive: str) -> None:
        self._limits = limits
        self._archive = archive
        self._seen: set[str] = set()
        self.entries: list[ArchiveMember] = []

    def add(self, name: str, size: int) -> None:
        """Add one regular file, `name` cleaned.

        Raises Rejected for a second file of that name (letter case ignored) and for too many files.
        """
        folded = name.casefold()
        if folded in self._seen:
            raise rejection(name, "is in the archive twice (names that differ only in case count as the same)")
        self._seen.add(folded)
        if len(self._seen) > self._limits.entries:
            raise rejection(self._archive, f"holds more than {self._limits.entries} files")
        if not is_junk(name):
            self.entries.append(ArchiveMember(name, size))


def is_junk(name: str) -> bool:
    """Whether a file is one that operating systems add: hidden, or a thumbnail index."""
    parts = name.split("/")
    return not JUNK_PARTS.isdisjoint(parts) or parts[-1].startswith(".") or not name


class ZipArchive:
    """A zip file, read through its central directory; overlapping and encrypted members are refused."""

    def __init__(self, file: BinaryIO, limits: UploadLimits, archive: str) -> None:
        try:
            self._zip = zipfile.ZipFile(file)
        except UnicodeDecodeError as error:
            raise rejection(archive, "holds a file whose name is not UTF-8 though it says so") from error
        self._limits = limits
        self._archive = archive
        listing = Listing(limits, archive)
        self._infos: list[tuple[ArchiveMember, zipfile.ZipInfo]] = []
        if len(self._zip.infolist()) > limits.entries:
            raise rejection(archive, f"holds more than {limits.entries} files")
        self._refuse_overlaps()
        for info in self._zip.infolist():
            name = clean_name(info.orig_filename)
            if info.is_dir():
                continue
            if info.flag_bits & 0x1:
                raise rejection(name, "is encrypted: pack it without a password")
            if info.compress_type not in ZIP_METHODS:
                raise rejection(
                    name, "is compressed in a way that is not supported: use deflate (the usual zip) or store"
                )
            if (info.external_attr >> 16) & 0o170000 not in (0, 0o100000):
                raise rejection(name, "is not a regular file (a link or a device)")
            before = len(listing.entries)
            listing.add(name, info.file_size)
            if len(listing.entries) > before:
                self._infos.append((listing.entries[-1], info))
        self.entries = tuple(listing.entries)

    def _refuse_overlaps(self) -> None:
        end = 0
        for info in sorted(self._zip.infolist(), key=lambda info: info.header_offset):
            if info.header_offset < end:
                raise rejection(
                    ascii(info.filename[:80]), "shares its bytes with another member: this looks like an archive bomb"
                )
            end = info.header_offset + 30 + info.compress_size

    def members(self) -> Iterator[tuple[ArchiveMember, Stream]]:
        """Every entry with its bytes, in the order of the central directory."""
        counter = ByteCounter(self._limits, self._archive)
        for entry, info in self._infos:
            with self._zip.open(info) as stream:
                yield entry, _ZipStream(stream, counter, entry.name, info.compress_size)


class _ZipStream:
    """One member of a zip file, counted."""

    def __init__(self, stream: Stream, counter: ByteCounter, name: str, compressed: int) -> None:
        self._stream = stream
        self._counter = counter
        self._name = name
        self._compressed = compressed
        self._read = 0

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._read += len(data)
        self._counter.add(len(data))
        self._counter.check_ratio(self._name, self._read, self._compressed)
        return data


class TarArchive:
    """A tar file, plain or compressed, read from beginning to end: once for the listing, once for every pass."""

    def __init__(self, path: Path, limits: UploadLimits, archive: str) -> None:
        self._path = path
        self._limits = limits
        self._archive = archive
        listing = Listing(limits, archive)
        for info, _ in self._read_members():
            name = clean_name(info.name)
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                raise rejection(name, "is not a regular file (a link, a device or a sparse file)")
            if info.size < 0:
                raise rejection(name, f"declares {info.size} bytes")
            listing.add(name, info.size)
        self.entries = tuple(listing.entries)

    def members(self) -> Iterator[tuple[ArchiveMember, Stream]]:
        """Every entry with its bytes, in the archive's order."""
        wanted = iter(self.entries)
        entry = next(wanted, None)
        for info, stream in self._read_members():
            if entry is not None and info.isreg() and clean_name(info.name) == entry.name:
                yield entry, _TarMember(stream, info.size, entry.name)
                entry = next(wanted, None)

    def _read_members(self) -> Iterator[tuple[tarfile.TarInfo, _ForwardStream]]:
        with self._path.open("rb") as file:
            stream = _ForwardStream(
                file, self._path.stat().st_size, ByteCounter(self._limits, self._archive), self._archive
            )
            with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r:") as tar:
                remembered: list[Any] = vars(tar)["members"]
                while (info := tar.next()) is not None:
                    remembered.clear()  # tarfile remembers every member: 1 GB for a million
                    yield info, stream
            if stream.last_read.count(0) != tarfile.BLOCKSIZE:  # tarfile mistakes a damaged header for the end
                raise rejection(self._archive, "is cut off or damaged: its end mark is missing")
            while stream.read(READ_BYTES):  # the checksum of the compression is at the end
                pass


class _ForwardStream:
    """The file that tarfile reads: only forward, decompressed and counted."""

    def __init__(self, file: BinaryIO, size: int, counter: ByteCounter, archive: str) -> None:
        magic = file.read(6)
        file.seek(0)
        self._compressed = True
        self._file: Stream
        if magic.startswith(b"\x1f\x8b"):
            self._file = gzip.GzipFile(fileobj=file)
        elif magic.startswith(b"BZh"):
            self._file = bz2.BZ2File(file)
        elif magic.startswith(b"\xfd7zXZ\x00"):
            self._file = lzma.LZMAFile(file)  # noqa: SIM115  (the caller closes `file`, nothing else is open)
        else:
            self._file = file
            self._compressed = False
        self._size = size
        self._counter = counter
        self._archive = archive
        self._position = 0
        self.last_read = b""

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end."""
        if not 0 <= size <= 64 * MIB:
            raise rejection(self._archive, f"declares a header of {size} bytes")
        pieces: list[bytes] = []
        missing = size
        while missing and (piece := self._file.read(min(missing, READ_BYTES))):
            pieces.append(piece)
            missing -= len(piece)
            self._position += len(piece)
            self._counter.add(len(piece))
            if self._compressed:
                self._counter.check_ratio(self._archive, self._position, self._size)
        self.last_read = b"".join(pieces)
        return self.last_read

    def tell(self) -> int:
        """How many bytes were read or skipped."""
        return self._position

    def seek(self, position: int) -> int:
        """Skip forward to `position`."""
        if position < self._position:
            raise rejection(self._archive, "is damaged: a member declares a negative size")
        while self._position < position and self.read(min(READ_BYTES, position - self._position)):
            pass
        return self._position


class _TarMember:
    """The bytes of one tar member."""

    def __init__(self, stream: _ForwardStream, size: int, name: str) -> None:
        self._stream = stream
        self._missing = size
        self._name = name

    def read(self, size: int, /) -> bytes:
        wanted = min(size, self._missing, READ_BYTES)
        data = self._stream.read(wanted)
        self._missing -= len(data)
        if len(data) < wanted:
            raise rejection(self._name, "is cut off")
        return data


@contextmanager
def open_archive(path: Path, limits: UploadLimits, archive: str = "upload") -> Iterator[Archive]:
    """The zip or tar file at `path`, its entries listed and checked; `archive` is what problems call it.

    Raises Rejected where it is neither, damaged, or breaks a limit, also while members are read in the `with` block.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(512)
            file.seek(0)
            if not magic:
                raise rejection(archive, "is empty")
            if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                yield ZipArchive(file, limits, archive)
            elif magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")) or _is_tar_header(magic):
                yield TarArchive(path, limits, archive)
            elif magic.startswith(b"--") and b"Content-Disposition" in magic:
                raise rejection(
                    archive,
                    "is a multipart form: send the file itself as the body, with curl --data-binary @FILE",
                )
            else:
                raise rejection(
                    archive,
                    "is neither a zip nor a tar archive (tar.gz, tar.bz2 and tar.xz are read too) nor an .npz file",
                )
    except ARCHIVE_ERRORS as error:
        raise rejection(archive, f"is cut off or damaged: {error}") from error
    except NotImplementedError as error:  # zipfile: versions and methods it does not know
        raise rejection(archive, f"cannot be read: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise rejection(archive, f"is cut off or damaged: {error}") from error  # bz2: "Invalid data stream"


def _is_tar_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def read_exactly(stream: Stream, size: int, name: str) -> bytes:
    """The next `size` bytes of a member.

    Raises Rejected where there are fewer.
    """
    pieces = io.BytesIO()
    while size and (piece := stream.read(min(size, READ_BYTES))):
        pieces.write(piece)
        size -= len(piece)
    if size:
        raise rejection(name, "is cut off")
    return pieces.getvalue()


def refuse_rest(stream: Stream, name: str) -> None:
    """Raise Rejected if the member has more bytes; reading to the end also checks a zip member's checksum."""
    if stream.read(1):
        raise rejection(name, "has bytes after its end")
