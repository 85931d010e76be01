"""Built-in data sets: where their original files are found, and the check that makes every source equally good.

The four IDX files are the same everywhere once they are unpacked, whoever compressed them. So the sha256 of the
unpacked content is checked, of every file from every source.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import queue
import shutil
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from app.datasets.ingest import debian
from app.datasets.ingest.arrays import Arrays
from app.datasets.ingest.finish import finish_arrays
from app.datasets.ingest.idx import read_labels, write_images
from app.datasets.ingest.limits import UploadLimits
from app.datasets.packed.packed import ensure_packed
from app.errors import DataUnavailable
from app.settings import Settings
from app.spec.data import DataFacts

SYSTEM_FOLDER = Path("/usr/share/datasets")
MIRROR_ANSWERS_WITHIN_S = 4.0  # no network is normal: the other sources must not wait
STALLED_AFTER_S = 20.0
LARGEST_DOWNLOAD_BYTES = 64 << 20
ROLES = {
    "train-images-idx3-ubyte": ("train", "images"),
    "train-labels-idx1-ubyte": ("train", "labels"),
    "t10k-images-idx3-ubyte": ("test", "images"),
    "t10k-labels-idx1-ubyte": ("test", "labels"),
}
SMALLEST_FILE = "t10k-labels-idx1-ubyte"


@dataclass(frozen=True)
class Builtin:
    """A data set that every installation knows: its facts, the sha256 of its unpacked files, where the files are."""

    facts: DataFacts
    sha256: Mapping[str, str]
    mirrors: tuple[str, ...]
    debian_package: str | None
    folder_names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name a job uses."""
        return self.facts.name


def _facts(name: str, class_names: tuple[str, ...]) -> DataFacts:
    return DataFacts(
        name=name,
        example_shape=(28, 28),
        classes=10,
        class_names=class_names,
        train=60_000,
        test=10_000,
        dtype="uint8",
    )


FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

BUILTIN: Mapping[str, Builtin] = {
    builtin.name: builtin
    for builtin in (
        # 28 x 28 grey pictures of clothes (Zalando, MIT licence)
        Builtin(
            facts=_facts("fashion-mnist", FASHION_CLASSES),
            sha256={
                "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            },
            mirrors=(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
            ),
            debian_package="dataset-fashion-mnist",
            folder_names=("fashion-mnist", "FashionMNIST/raw"),
        ),
        # 28 x 28 grey pictures of handwritten digits
        Builtin(
            facts=_facts("mnist", tuple(str(digit) for digit in range(10))),
            sha256={
                "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            },
            mirrors=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
            debian_package=None,
            folder_names=("mnist", "MNIST/raw"),
        ),
    )
}


def ensure_builtin(name: str, settings: Settings, *, system_folder: Path = SYSTEM_FOLDER) -> Path:
    """Make the packed folder of a built-in data set in the cache from the first source that has the true files.

    Returns its path. Sources: ESPALIER_DATA_PATH, the system's folder, the download, the Debian package. A packed
    folder that is in the cache already was checked when it was made, so it comes before all of them.

    Raises DataUnavailable, which says what to do, where no source has the files.
    """
    builtin = BUILTIN[name]
    folder = settings.cache / "builtin" / name
    return ensure_packed(folder, lambda partial: build_packed(builtin, partial, settings, system_folder))


def build_packed(builtin: Builtin, partial: Path, settings: Settings, system_folder: Path) -> None:
    """Fill the empty folder `partial` from the first source that works; the folder `sources` in it is temporary.

    Raises DataUnavailable where none does.
    """
    scratch = partial / "sources"
    scratch.mkdir()
    tried: list[str] = []
    try:
        for source in list_sources(builtin, settings, system_folder, scratch):
            try:
                files = source()
                if files is not None:
                    pack_files(builtin, files, partial)
                    return
            except SourceFailed as failure:
                tried.append(str(failure))
    finally:
        shutil.rmtree(scratch)
    raise DataUnavailable(
        f"the data set {builtin.name} cannot be obtained on this machine"
        + (f" ({'; '.join(tried)})" if tried else "")
        + f": put {', '.join(f'{file}.gz' for file in ROLES)} into a folder and set ESPALIER_DATA_PATH to it",
        hint="set ESPALIER_DATA_PATH to a folder with the original files, then retry the job",
    )


class SourceFailed(Exception):
    """A source does not have the true files; the text says which and why."""


Files = Mapping[str, Path]


def list_sources(
    builtin: Builtin, settings: Settings, system_folder: Path, scratch: Path
) -> list[Callable[[], Files | None]]:
    """The sources in order. Each returns the path of every file, or None where it has none; or raises SourceFailed."""
    sources: list[Callable[[], Files | None]] = []
    if settings.data_path is not None:
        data_path = settings.data_path
        sources.append(lambda: from_data_path(builtin, data_path))
    sources.append(lambda: find_files(system_folder / builtin.name))
    if not settings.data_offline:
        sources.append(lambda: download_files(builtin, scratch))
        if builtin.debian_package is not None:
            package = builtin.debian_package
            sources.append(lambda: from_debian(package, scratch))
    return sources


def from_data_path(builtin: Builtin, data_path: Path) -> Files:
    """The files in the user's folder, or in its sub-folder of the data set's name.

    Raises SourceFailed where they are not all there.
    """
    for name in (*builtin.folder_names, ""):
        if (files := find_files(data_path / name)) is not None:
            return files
    raise SourceFailed(f"ESPALIER_DATA_PATH {data_path} does not hold the four files of {builtin.name}")


def find_files(folder: Path) -> Files | None:
    """The four files of a folder, each plain or `.gz`; None where one is missing."""
    found: dict[str, Path] = {}
    for name in ROLES:
        candidates = [folder / name, folder / f"{name}.gz", folder / name.replace("-idx", ".idx")]
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is None:
            return None
        found[name] = path
    return found


def pack_files(builtin: Builtin, files: Files, partial: Path) -> None:
    """Check every file's content and pack it.

    Raises SourceFailed where a file is not the published one.
    """
    for name, path in files.items():
        if content_sha256(path) != builtin.sha256[name]:
            raise SourceFailed(f"{path} is not the published {name} of {builtin.name}")
    limits = UploadLimits()
    arrays = Arrays(class_names=builtin.facts.class_names)
    for name, path in files.items():
        split, kind = ROLES[name]
        arrays.names[f"{split}.{kind}"] = name
        with open_maybe_gzip(path) as stream:
            if kind == "images":
                arrays.images[split] = write_images(stream, name, partial / f"{split}.images.npy", limits)
            else:
                arrays.labels[split] = read_labels(stream, name, limits)
    finish_arrays(arrays, partial, name=builtin.name)


def content_sha256(path: Path) -> str | None:
    """The sha256 of a file's content, unpacked if it is gzip; None where it cannot be unpacked or read."""
    try:
        with open_maybe_gzip(path) as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except (OSError, EOFError, zlib.error):
        return None


def open_maybe_gzip(path: Path) -> gzip.GzipFile:
    """The content of a file that may or may not be compressed."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[return-value]


def download_files(builtin: Builtin, scratch: Path) -> Files:
    """Fetch the four files from the first mirror that answers.

    Raises SourceFailed where none answers within seconds, or the connection breaks.
    """
    mirror = first_mirror(builtin.mirrors)
    if mirror is None:
        raise SourceFailed(f"no mirror answers within {MIRROR_ANSWERS_WITHIN_S:.0f} s")
    files: dict[str, Path] = {}
    for name in ROLES:
        files[name] = scratch / f"{name}.gz"
        try:
            fetch_url(f"{mirror}{name}.gz", files[name])
        except (OSError, http.client.HTTPException) as error:
            raise SourceFailed(f"{mirror}{name}.gz: {error}") from error
    return files


def first_mirror(mirrors: tuple[str, ...]) -> str | None:
    """The first mirror that serves the smallest file, asked all at once; None after MIRROR_ANSWERS_WITHIN_S.

    Each is asked in its own thread, because a name look-up has no time limit of its own.
    """
    answers: queue.Queue[str | None] = queue.Queue()

    def ask(mirror: str) -> None:
        try:
            with urllib.request.urlopen(f"{mirror}{SMALLEST_FILE}.gz", timeout=MIRROR_ANSWERS_WITHIN_S) as answer:
                answers.put(mirror if answer.read(2) == b"\x1f\x8b" else None)
        except (OSError, http.client.HTTPException):
            answers.put(None)

    for mirror in mirrors:
        threading.Thread(target=ask, args=(mirror,), name="mirror", daemon=True).start()
    for _ in mirrors:
        try:
            answer = answers.get(timeout=MIRROR_ANSWERS_WITHIN_S)
        except queue.Empty:
            return None
        if answer is not None:
            return answer
    return None


def fetch_url(url: str, path: Path) -> None:
    """Write what the URL serves to a file. Raises OSError if it stalls, breaks, or is larger than any of our files."""
    with urllib.request.urlopen(url, timeout=STALLED_AFTER_S) as answer, path.open("wb") as file:
        total = 0
        while block := answer.read(1 << 20):
            total += len(block)
            if total > LARGEST_DOWNLOAD_BYTES:
                raise OSError(f"more than {LARGEST_DOWNLOAD_BYTES} bytes")
            file.write(block)


def from_debian(package: str, scratch: Path) -> Files | None:
    """The files of the distribution's package, unpacked into `scratch` without root; None where there is no apt.

    Raises SourceFailed where apt has or gets no such package.
    """
    try:
        unpacked = debian.unpack_package(package, scratch)
    except debian.PackageFailed as failure:
        raise SourceFailed(str(failure)) from failure
    if unpacked is None:
        return None
    for name in sorted(unpacked.glob("usr/share/datasets/*")):
        if (files := find_files(name)) is not None:
            return files
    raise SourceFailed(f"the package {package} holds no such files")
