"""Built-in data sets: every source in its order, each file checked by the content's sha256, fast without a network."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.datasets.ingest.builtin import BUILTIN, SYSTEM_FOLDER, Builtin, build_packed, ensure_builtin, first_mirror
from app.datasets.packed.packed import read_manifest
from app.errors import DataUnavailable
from app.settings import Settings
from tests.support.services.uploads import images, labels, mnist_files

FILES = mnist_files(20, 10, 6, zipped_members=False)
NOWHERE = Path("/nonexistent")


def small(*mirrors: str, package: str | None = None) -> Builtin:
    """A built-in data set of 30 images."""
    original = BUILTIN["fashion-mnist"]
    return dataclasses.replace(
        original,
        facts=dataclasses.replace(original.facts, example_shape=(6, 6), train=20, test=10),
        sha256={name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()},
        mirrors=mirrors,
        debian_package=package,
    )


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return Settings(home=tmp_path / "home", **changes)


def attempt(tmp_path: Path, builtin: Builtin, chosen: Settings, system: Path = NOWHERE) -> Path:
    partial = tmp_path / "partial"
    partial.mkdir()
    build_packed(builtin, partial, chosen, system)
    assert not (partial / "sources").exists(), "what was downloaded is not kept beside the packed files"
    np.testing.assert_array_equal(np.load(partial / "train.images.npy"), images(20, (6, 6)))
    np.testing.assert_array_equal(np.load(partial / "test.labels.npy"), labels(10))
    return partial


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """A mirror that serves the four files of `small()`."""
    folder = write(tmp_path / "mirror", mnist_files(20, 10, 6))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: Any) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("sub_folder", ["", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped_members", [False, True])
def test_the_users_folder_comes_first(tmp_path: Path, sub_folder: str, zipped_members: bool) -> None:
    folder = write(tmp_path / "data" / sub_folder, mnist_files(20, 10, 6, zipped_members=zipped_members))
    attempt(tmp_path, small("http://127.0.0.1:9/"), settings(tmp_path, data_path=tmp_path / "data"))
    assert folder.exists()


def test_the_systems_folder_is_next(tmp_path: Path) -> None:
    write(tmp_path / "system/fashion-mnist", mnist_files(20, 10, 6))
    attempt(tmp_path, small(), settings(tmp_path, data_offline=True), tmp_path / "system")


def test_the_download_is_next_and_a_dead_mirror_does_not_matter(tmp_path: Path, mirror: str) -> None:
    attempt(tmp_path, small("http://127.0.0.1:9/", mirror), settings(tmp_path))


def test_a_file_with_other_content_is_refused_and_the_next_source_is_taken(tmp_path: Path, mirror: str) -> None:
    changed = {**FILES, "train-labels-idx1-ubyte": FILES["train-labels-idx1-ubyte"][:-1] + b"\x05"}
    data_path = write(tmp_path / "data", changed)
    attempt(tmp_path, small(mirror), settings(tmp_path, data_path=data_path))


def test_a_mirror_with_other_content_is_refused(tmp_path: Path, mirror: str) -> None:
    (tmp_path / "mirror/train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(DataUnavailable, match="is not the published train-images-idx3-ubyte"):
        attempt(tmp_path, small(mirror), settings(tmp_path))


def test_a_mirror_that_breaks_half_way_is_not_the_end(tmp_path: Path, mirror: str) -> None:
    (tmp_path / "mirror/t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataUnavailable, match="404"):
        attempt(tmp_path, small(mirror), settings(tmp_path))


def test_without_any_source_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable) as failure:
        attempt(tmp_path, small(), settings(tmp_path, data_offline=True, data_path=tmp_path))
    assert "the data set fashion-mnist cannot be obtained on this machine" in failure.value.message
    assert f"ESPALIER_DATA_PATH {tmp_path} does not hold the four files" in failure.value.message
    assert "set ESPALIER_DATA_PATH to it" in failure.value.message


def test_an_offline_machine_asks_no_mirror_and_no_package_manager(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_apt(tmp_path, monkeypatch, known_without_update=True)
    with pytest.raises(DataUnavailable):
        attempt(tmp_path, small(mirror, package="some-data"), settings(tmp_path, data_offline=True))
    assert not (tmp_path / "calls").exists()


def test_mirrors_that_never_answer_cost_seconds_not_minutes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        assert first_mirror((f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/")) is None
        assert time.monotonic() - began < 9


def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, known_without_update: bool) -> None:
    """An `apt-get` that knows the package at once or after an update into lists of its own, and a `dpkg-deb`."""
    write(tmp_path / "package/usr/share/datasets/fashion-mnist", mnist_files(20, 10, 6))
    tools = tmp_path / "tools"
    tools.mkdir()
    ready = "true" if known_without_update else 'grep -q Dir::State::lists <<< "$*" && [ -e "$PWD/lists/updated" ]'
    (tools / "apt-get").write_text(
        f"""#!/bin/bash
echo "apt-get $*" >> {tmp_path}/calls
case "$*" in
  *update) touch lists/updated; exit 100;;
  *download*) if {ready}; then touch "${{!#}}_1.0_all.deb"; else exit 100; fi;;
esac
"""
    )
    (tools / "dpkg-deb").write_text(
        f"""#!/bin/bash
echo "dpkg-deb $*" >> {tmp_path}/calls
[ "$1" = -x ] && [ -e "$2" ] && cp -r {tmp_path}/package "$3"
"""
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")


@pytest.mark.parametrize("known_without_update", [True, False])
def test_the_distributions_package_is_the_last_source_also_without_package_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_without_update: bool
) -> None:
    fake_apt(tmp_path, monkeypatch, known_without_update=known_without_update)
    attempt(tmp_path, small("http://127.0.0.1:9/", package="some-data"), settings(tmp_path))
    calls = (tmp_path / "calls").read_text()
    assert ("update" in calls) is not known_without_update
    assert "download some-data" in calls


def test_a_package_that_does_not_exist_ends_in_the_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apt(tmp_path, monkeypatch, known_without_update=True)
    (tmp_path / "tools/apt-get").write_text("#!/bin/sh\nexit 100\n")
    with pytest.raises(DataUnavailable, match="apt-get download some-data fails"):
        attempt(tmp_path, small(package="some-data"), settings(tmp_path))


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_the_facts_known_in_advance_are_those_of_the_data(name: str, tmp_path: Path) -> None:
    facts = BUILTIN[name].facts
    assert (facts.default_input_shape(), len(facts.class_names)) == ((1, 28, 28), 10)
    assert set(BUILTIN[name].sha256) == set(FILES)
    if not (SYSTEM_FOLDER / name).exists():
        return
    folder = ensure_builtin(name, settings(tmp_path, data_offline=True))
    assert read_manifest(folder).facts() == facts


def test_a_packed_folder_in_the_cache_is_used_as_it_is(tmp_path: Path) -> None:
    chosen = settings(tmp_path, data_offline=True)
    partial = attempt(tmp_path, small(), settings(tmp_path, data_path=write(tmp_path / "data", FILES)))
    cached = chosen.cache / "builtin/fashion-mnist"
    cached.parent.mkdir(parents=True)
    shutil.move(partial, cached)
    assert ensure_builtin("fashion-mnist", chosen, system_folder=NOWHERE) == cached
