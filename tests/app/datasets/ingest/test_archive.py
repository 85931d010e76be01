"""Archives from strangers: nothing is extracted, everything is counted, each refusal says why."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from app.datasets.ingest.archive import clean_name, open_archive
from app.datasets.ingest.limits import Rejected, UploadLimits
from tests.support.services.uploads import tarred, zipped

Pack = Callable[[Path, dict[str, bytes]], Path]
SMALL = UploadLimits(unpacked_bytes=100_000, entries=50, ratio_from_bytes=10_000)


def contents(path: Path, limits: UploadLimits = SMALL) -> dict[str, bytes]:
    found = {}
    with open_archive(path, limits) as archive:
        for entry, stream in archive.members():
            data = b""
            while piece := stream.read(1000):
                data += piece
            assert len(data) == entry.size
            found[entry.name] = data
    return found


def refusal(path: Path, limits: UploadLimits = SMALL) -> str:
    with pytest.raises(Rejected) as refused:
        contents(path, limits)
    return str(refused.value)


MEMBERS = {"a/one.txt": b"1" * 2000, "b/two.bin": bytes(range(256)) * 4, "empty": b""}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_gives_the_bytes_of_every_member_whatever_its_compression(tmp_path: Path, mode: str) -> None:
    assert contents(tarred(tmp_path / "x", MEMBERS, mode=mode)) == MEMBERS


@pytest.mark.parametrize("deflate", [False, True])
def test_a_zip_gives_the_bytes_of_every_member(tmp_path: Path, deflate: bool) -> None:
    assert contents(zipped(tmp_path / "x", MEMBERS, deflate=deflate)) == MEMBERS


def test_members_may_be_skipped(tmp_path: Path) -> None:
    with open_archive(tarred(tmp_path / "x", MEMBERS, mode="w:gz"), SMALL) as archive:
        assert [entry.name for entry, _ in archive.members()] == list(MEMBERS)
        assert [entry.name for entry, _ in archive.members()] == list(MEMBERS), "a second pass starts again"


def test_files_that_systems_leave_behind_are_not_listed(tmp_path: Path) -> None:
    names = ["__MACOSX/a/._one.png", "a/.DS_Store", "a/Thumbs.db", ".hidden"]
    path = zipped(tmp_path / "x", {**dict.fromkeys(names, b"x"), "a/one": b"1"})
    assert contents(path) == {"a/one": b"1"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil", "points outside"),
        ("a/../../evil", "points outside"),
        ("/etc/passwd", "absolute"),
        ("C:/evil", "absolute"),
        ("a\\evil", "backslash"),
        ("a\x01b", "control"),
        ("x" * 256, "longer than 255"),
        ("/".join(["x" * 200] * 6), "or 1024 in all"),
    ],
)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_name_that_could_do_harm_is_refused_and_nothing_is_written(
    tmp_path: Path, pack: Pack, name: str, reason: str
) -> None:
    path = pack(tmp_path / "x", {"fine": b"1", name: b"2"})
    assert reason in refusal(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_with_nul_is_refused_though_zipfile_cuts_it(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x", {"goodxbad": b"1"})
    path.write_bytes(path.read_bytes().replace(b"goodxbad", b"good\x00bad"))
    assert "control" in refusal(path)


def test_names_are_brought_to_one_form() -> None:
    assert clean_name("./a//e\u0301.png") == "a/\u00e9.png"


@pytest.mark.parametrize("twin", ["A/One", "./a/one", "a//one"])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_two_members_of_one_name_are_refused_also_when_only_the_case_differs(
    tmp_path: Path, pack: Pack, twin: str
) -> None:
    assert "twice" in refusal(pack(tmp_path / "x", {"a/one": b"1", twin: b"2"}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "x"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a/link")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    assert "not a regular file" in refusal(path)


def test_a_sparse_terabyte_in_a_tar_is_refused_at_once(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge")
    info.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410], block[483:495] = b"0" * 12, b"0" * 12, b"%011o\0" % 2**32
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:512]))
    (tmp_path / "x").write_bytes(bytes(block) + bytes(1024))
    assert "not a regular file" in refusal(tmp_path / "x")


def test_a_symbolic_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert "not a regular file" in refusal(tmp_path / "x")


@pytest.mark.parametrize("mode", ["zip", "w:gz", "w:xz"])
def test_a_bomb_of_zeros_ends_at_the_ratio(tmp_path: Path, mode: str) -> None:
    bomb = {"zeros": bytes(90_000)}
    path = zipped(tmp_path / "x", bomb, deflate=True) if mode == "zip" else tarred(tmp_path / "x", bomb, mode=mode)
    assert "archive bomb" in refusal(path)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_members_that_are_too_much_together_are_refused(tmp_path: Path, pack: Pack) -> None:
    path = pack(tmp_path / "x", {str(number): bytes(30_000) for number in range(4)})
    assert "unpacks to more than 100000 bytes" in refusal(path)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_more_files_than_the_limit_are_refused(tmp_path: Path, pack: Pack) -> None:
    path = pack(tmp_path / "x", {str(number): b"" for number in range(51)})
    assert "more than 50 files" in refusal(path)


def test_a_zip_that_lies_about_a_size_is_damaged(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x", {"a": b"x" * 5000}, deflate=True)
    data = path.read_bytes()
    at = data.rindex(b"PK\x01\x02")
    path.write_bytes(data[: at + 24] + struct.pack("<I", 100) + data[at + 28 :])
    assert "damaged" in refusal(path)


def test_a_zip_whose_members_share_bytes_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x", {"a": b"x" * 500, "b": b"y" * 500})
    data = bytearray(path.read_bytes())
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = struct.pack("<I", 10)
    path.write_bytes(data)
    assert "shares its bytes" in refusal(path)


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x", {"a": b"x"})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert "encrypted" in refusal(path)


def test_a_zip_in_a_method_that_hides_memory_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"x" * 100)
    assert "use deflate" in refusal(tmp_path / "x")


def test_a_zip_of_a_version_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x", {"a": b"1" * 100})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 6] = 99  # the version needed to read the member: 9.9
    path.write_bytes(data)
    assert "cannot be read: zip file version 9.9" in refusal(path)


@pytest.mark.parametrize("pack", ["zip", "tar", "tar.gz"])
def test_an_archive_that_is_cut_off_anywhere_is_refused(tmp_path: Path, pack: str) -> None:
    path = tmp_path / "x"
    members = {f"a/{number}": bytes([number]) * 700 for number in range(8)}
    if pack == "zip":
        zipped(path, members)
    else:
        tarred(path, members, mode="w:gz" if pack == "tar.gz" else "w")
    data = path.read_bytes()
    end = len(data) if pack != "tar" else len(members) * 1536  # after that a tar has only padding
    for kept in range(1, end, max(1, end // 40)):
        path.write_bytes(data[:kept])
        refusal(path)


def test_a_tar_with_a_damaged_header_in_the_middle_is_refused_not_shortened(tmp_path: Path) -> None:
    path = tarred(tmp_path / "x", {"a": b"1" * 512, "b": b"2" * 512, "c": b"3" * 512})
    data = bytearray(path.read_bytes())
    data[1024] ^= 0xFF
    path.write_bytes(data)
    assert "end mark" in refusal(path)


def test_a_tar_that_declares_a_giant_header_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**40
    (tmp_path / "x").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert "declares a header" in refusal(tmp_path / "x")


def test_a_tar_member_of_negative_size_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.pax_headers = {"size": "-1536"}
    (tmp_path / "x").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(2048))
    assert "negative size" in refusal(tmp_path / "x") or "declares" in refusal(tmp_path / "x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"hello, this is text", "neither a zip nor a tar"),
        (b'--x1\r\nContent-Disposition: form-data; name="file"\r\n\r\nPK', "--data-binary"),
        (gzip.compress(b"no tar inside", mtime=0), "damaged"),
    ],
)
def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "x").write_bytes(data)
    assert reason in refusal(tmp_path / "x")


def test_an_archive_in_an_archive_stays_packed(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("../x", b"1")
    assert list(contents(zipped(tmp_path / "x", {"inner.zip": inner.getvalue()}))) == ["inner.zip"]
