"""The process that touches an upload: bounded, without credentials, and never the end of the service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from app.datasets.ingest.child import CheckInterrupted, check_in_child, read_answer
from app.datasets.ingest.limits import UploadLimits
from app.datasets.packed.packed import PACKED, read_manifest
from tests.support.services.uploads import class_folders, images, labels, npy_header, npz, zipped


def work_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_a_good_upload_is_packed_and_a_manifest_comes_back(tmp_path: Path) -> None:
    work = work_folder(tmp_path)
    upload = npz(tmp_path / "u", x_train=images(40), y_train=labels(40))
    answer = check_in_child(upload, "auto", work, UploadLimits(), name="--strange \u00e9 name")
    assert (answer.format, answer.problems) == ("npz", ())
    assert answer.manifest == read_manifest(work / PACKED)
    assert answer.manifest is not None
    assert answer.manifest.name == "--strange \u00e9 name"


def test_a_bad_upload_comes_back_as_problems(tmp_path: Path) -> None:
    (tmp_path / "u").write_bytes(b"hello")
    answer = check_in_child(tmp_path / "u", "auto", work_folder(tmp_path), UploadLimits(), name="x")
    assert answer.manifest is None
    assert [problem["file"] for problem in answer.problems] == ["upload"]


def test_a_child_that_takes_too_much_processor_time_is_stopped_with_a_sentence(tmp_path: Path) -> None:
    upload = zipped(tmp_path / "u", class_folders(20))
    answer = check_in_child(upload, "auto", work_folder(tmp_path), UploadLimits(cpu_s=0), name="x")
    assert "takes more than 0 s to check" in answer.problems[0]["message"]


def test_a_file_that_unpacks_larger_than_a_file_may_be_is_answered_in_words(tmp_path: Path) -> None:
    """A Fortran-ordered array is first written as it is; the limits of the archive are set out of the way."""
    work = work_folder(tmp_path)
    np.savez(tmp_path / "u.npz", x_train=np.asfortranarray(images(3000, (50, 50))), y_train=labels(3000))
    code = (
        "import sys, json, resource\n"
        "from app.datasets.ingest import __main__ as program\n"
        "confine_process = program.confine_process\n"
        "def smaller(limits):\n"
        "    confine_process(limits)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "program.confine_process = smaller\n"
        "sys.exit(program.main(sys.argv[1:]))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "u.npz"), "auto", str(work)], check=True)
    assert "larger file than the limit" in read_answer(work / "result.json").problems[0]["message"]


def test_memory_and_file_size_are_bounded_for_good(tmp_path: Path) -> None:
    code = (
        "import json, resource, sys\n"
        "from app.datasets.ingest.__main__ import confine_process\n"
        "from app.datasets.ingest.limits import UploadLimits\n"
        "confine_process(UploadLimits(unpacked_bytes=5 << 20, memory_bytes=2 << 30, cpu_s=7))\n"
        "print([resource.getrlimit(w) for w in (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_AS)])\n"
        "try:\n    bytearray(3 << 30)\nexcept MemoryError:\n    print('bounded')\n"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output == f"[(7, 7), ({6 << 20}, {6 << 20}), ({2 << 30}, {2 << 30})]\nbounded\n"


def test_the_child_sees_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("ESPALIER_DATABASE_URL", "postgresql://u:secret@h/d")
    spy = tmp_path / "spy"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(
        f"import os, json; json.dump(dict(os.environ), open({str(spy / 'seen')!r}, 'w'))"
    )
    monkeypatch.setenv("PYTHONPATH", str(spy))
    (tmp_path / "u").write_bytes(b"hello")
    check_in_child(tmp_path / "u", "auto", work_folder(tmp_path), UploadLimits(), name="x")
    seen = json.loads((spy / "seen").read_text())
    assert "secret" not in json.dumps(seen)
    assert seen["ESPALIER_PARENT"] == str(os.getpid())


def test_a_stop_of_the_service_ends_the_child_at_once(tmp_path: Path) -> None:
    upload = zipped(tmp_path / "u", class_folders(3000))
    stopping = threading.Event()
    threading.Timer(0.3, stopping.set).start()
    began = time.monotonic()
    with pytest.raises(CheckInterrupted):
        check_in_child(upload, "auto", work_folder(tmp_path), UploadLimits(), name="x", stopping=stopping)
    assert time.monotonic() - began < 3


def test_a_child_that_is_killed_from_outside_is_tried_again(tmp_path: Path) -> None:
    upload = zipped(tmp_path / "u", class_folders(300))
    work = work_folder(tmp_path)
    killed: list[int] = []

    def kill_once() -> None:
        until = time.monotonic() + 10
        while time.monotonic() < until and not killed:
            for child in Path("/proc/self/task").glob("*/children"):
                for pid in child.read_text().split():
                    if (work / PACKED).exists() and b"app.datasets.ingest" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(int(pid), signal.SIGKILL)
                        killed.append(int(pid))
            time.sleep(0.01)

    killer = threading.Thread(target=kill_once)
    killer.start()
    answer = check_in_child(upload, "auto", work, UploadLimits(), name="x")
    killer.join()
    assert killed
    assert answer.manifest is not None


def test_the_peak_of_memory_does_not_follow_the_size_of_the_upload(tmp_path: Path) -> None:
    count, side = 160, 1000
    header = npy_header((count, side, side)).encode()
    block = np.random.default_rng(0).integers(0, 256, side * side * 10, dtype=np.uint8).tobytes()
    with zipfile.ZipFile(tmp_path / "u", "w") as archive:
        with archive.open("x_train.npy", "w", force_zip64=True) as member:
            member.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
            for _ in range(count // 10):
                member.write(block)
        with archive.open("y_train.npy", "w") as member:
            np.save(member, labels(count))
    work = work_folder(tmp_path)
    code = (
        "import sys\nfrom app.datasets.ingest.__main__ import main\nmain(sys.argv[1:])\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "u"), "npz", str(work)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert read_answer(work / "result.json").manifest is not None
    peak_mib = int(done.stdout) / 1024
    assert peak_mib < 120, f"peak {peak_mib:.0f} MiB for 160 MB of images"
