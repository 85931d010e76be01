"""The data sets of the benchmarks, packed as a job's are: clothes, emoji pictures, 1-D signals, or drawn from a seed.

    folder = packed("emoji", cache)          # a packed data set, made once
    path = archive("emoji", cache)           # the same as an .npz, to be uploaded

Nothing of them is in the repository: they are fetched or generated at the first use.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.datasets.ingest.builtin import ensure_builtin
from app.datasets.ingest.limits import UploadLimits
from app.datasets.ingest.pack import pack_upload
from app.datasets.ingest.synthetic import ensure_synthetic
from app.datasets.packed.packed import ensure_packed
from app.settings import load_settings
from app.spec.data import Synthetic

SHAPES: dict[str, tuple[int, ...]] = {
    "fashion-mnist": (1, 28, 28),
    "emoji": (3, 32, 32),
    "emoji-choice": (3, 32, 32),
    "mnist1d": (1, 40),
    "synthetic": (1, 28, 28),
}
EMOJI_VERSION = "16.0.0"
EMOJI_SIDE = 32
SYNTHETIC = {"classes": 10, "train": 600, "test": 200, "seed": 0}

Images = npt.NDArray[np.generic]


def packed(name: str, cache: Path) -> Path:
    """The packed folder of a data set, below `cache`.

    Raises DataUnavailable (clothes), CalledProcessError (emoji: npm fails) or ImportError (signals: no mnist1d) where it
    cannot be had on this machine.
    """
    if name == "fashion-mnist":
        return ensure_builtin(name, load_settings(home=cache.parent))
    if name == "synthetic":
        return ensure_synthetic(Synthetic.model_validate(SYNTHETIC), SHAPES[name], cache)

    def build(partial: Path) -> None:
        pack_upload(archive(name, cache), "npz", partial, UploadLimits(), name=name)

    return ensure_packed(cache / "benchmarks" / name, build)


def archive(name: str, cache: Path) -> Path:
    """`emoji` or `mnist1d` as an .npz file in the form of an upload."""
    path = cache / "benchmarks" / f"{name}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **ARCHIVES[name]())
        partial.rename(path)
    return path


def emoji() -> dict[str, Images]:
    """1,906 pictures in 9 classes, 32 x 32 x 3 on white: Google's drawings to train on, Twitter's to be tested on.

    From the npm packages emoji-datasource-google and -twitter; the pictures that both have, without skin tones.
    """
    drawings, entries = {}, []
    for vendor in ("google", "twitter"):
        files, entries = _emoji_package(vendor)
        drawings[vendor] = files
    chosen = [
        entry
        for entry in entries
        if entry["category"] != "Component" and all(entry["image"] in files for files in drawings.values())
    ]
    classes = sorted({entry["category"] for entry in chosen})
    labels = np.array([classes.index(entry["category"]) for entry in chosen], dtype=np.int64)
    images = {v: np.stack([_on_white(files[entry["image"]]) for entry in chosen]) for v, files in drawings.items()}
    train, test = images["google"], images["twitter"]
    return {"x_train": train, "y_train": labels, "x_test": test, "y_test": labels, "classes": np.array(classes)}


def emoji_choice() -> dict[str, Images]:
    """3,700 pictures like `emoji`'s, Google's and Apple's to train on, Facebook's to choose by: Twitter's stay unseen."""
    return _emoji_of(("google", "apple"), "facebook")


def _emoji_of(train: Sequence[str], test: str) -> dict[str, Images]:
    """The pictures that all vendors have: those of `train` one vendor after the other, and those of `test`."""
    packages = {vendor: _emoji_package(vendor) for vendor in (*train, test)}
    entries = packages[train[0]][1]
    chosen = [
        entry
        for entry in entries
        if entry["category"] != "Component" and all(entry["image"] in files for files, _ in packages.values())
    ]
    classes = sorted({entry["category"] for entry in chosen})
    labels = np.array([classes.index(entry["category"]) for entry in chosen], dtype=np.int64)
    images = {
        vendor: np.stack([_on_white(files[entry["image"]]) for entry in chosen])
        for vendor, (files, _) in packages.items()
    }
    return {
        "x_train": np.concatenate([images[vendor] for vendor in train]),
        "y_train": np.concatenate([labels] * len(train)),
        "x_test": images[test],
        "y_test": labels,
        "classes": np.array(classes),
    }


def _emoji_package(vendor: str) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    """File name -> PNG of one vendor's pictures, and what is said about them."""
    with tempfile.TemporaryDirectory(prefix="emoji-") as folder:
        name = f"emoji-datasource-{vendor}@{EMOJI_VERSION}"
        subprocess.run(["npm", "pack", "--silent", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*.tgz")
        files: dict[str, bytes] = {}
        entries: list[dict[str, str]] = []
        with tarfile.open(path) as package:
            for member in package:
                if member.name == "package/emoji.json":
                    entries = json.loads(_content(package, member))
                elif member.name.startswith(f"package/img/{vendor}/64/"):
                    files[Path(member.name).name] = _content(package, member)
    return files, entries


def _content(package: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = package.extractfile(member)
    assert stream is not None, member.name
    return stream.read()


def _on_white(png: bytes) -> npt.NDArray[np.uint8]:
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB").resize((EMOJI_SIDE, EMOJI_SIDE), Image.Resampling.LANCZOS))


def mnist1d() -> dict[str, Images]:
    """4,000 + 1,000 signals of 40 values in 10 classes (Greydanus, arXiv 2011.14439), drawn by the package mnist1d."""
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    parts = {"x_train": made["x"], "x_test": made["x_test"]}
    labels = {"y_train": made["y"], "y_test": made["y_test"]}
    return {name: values.astype(np.float32) for name, values in parts.items()} | {
        name: np.asarray(values, dtype=np.int64) for name, values in labels.items()
    }


ARCHIVES: dict[str, Callable[[], dict[str, Images]]] = {
    "emoji": emoji,
    "emoji-choice": emoji_choice,
    "mnist1d": mnist1d,
}
