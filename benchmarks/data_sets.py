"""The data sets of the benchmarks, packed as a job's are: clothes, emoji pictures, letters, 1-D signals, or drawn.

    folder = packed("emoji", cache)          # a packed data set, made once
    path = archive("emoji", cache)           # the same as an .npz, to be uploaded

Nothing of them is in the repository: they are fetched or generated at the first use.

`letters` is held out: no recipe, default or threshold may be chosen by it. It is there to see whether what was chosen
by the others holds on data that nobody looked at. Its one training before that: `deep_cnn`, 12 epochs, batch 128,
random crop, all else default, 0.882. `emoji` is what older results were measured on.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from app.datasets.ingest.builtin import ensure_builtin
from app.datasets.ingest.debian import PackageFailed, unpack_package
from app.datasets.ingest.limits import UploadLimits
from app.datasets.ingest.pack import pack_upload
from app.datasets.ingest.synthetic import ensure_synthetic
from app.datasets.packed.packed import ensure_packed
from app.settings import load_settings
from app.spec.data import Synthetic

if TYPE_CHECKING:
    from PIL import ImageFont

SHAPES: dict[str, tuple[int, ...]] = {
    "fashion-mnist": (1, 28, 28),
    "emoji": (3, 32, 32),
    "emoji-choice": (3, 32, 32),
    "emoji-vendors": (3, 32, 32),
    "letters": (1, 28, 28),
    "mnist1d": (1, 40),
    "clothes-choice": (1, 28, 28),
    "mnist1d-choice": (1, 40),
    "synthetic": (1, 28, 28),
}
CLASSES = dict.fromkeys(SHAPES, 10) | {"emoji": 9, "emoji-choice": 9, "emoji-vendors": 9}
EMOJI_VERSION = "16.0.0"
EMOJI_SIDE = 32
FONTS_PACKAGE = "fonts-aenigma"
FONTS = 465
LETTERS = "ABCDEFGHIJ"
LETTER_SIDE = 28
LETTER_INNER_SIDE = 24  # of the box that a letter fills
DRAWN_AT = 96  # pixels of an em, before a letter is shrunk
ONE_FAMILY_TESTED_IN = 5
SYNTHETIC = {"classes": 10, "train": 600, "test": 200, "seed": 0}

Images = npt.NDArray[np.generic]


def packed(name: str, cache: Path) -> Path:
    """The packed folder of a data set, below `cache`.

    Raises DataUnavailable (clothes), CalledProcessError (emoji: npm fails), PackageFailed (letters: apt fails) or
    ImportError (signals: no mnist1d) where it cannot be had on this machine.
    """
    if name == "fashion-mnist":
        return ensure_builtin(name, load_settings(home=cache.parent))
    if name == "synthetic":
        return ensure_synthetic(Synthetic.model_validate(SYNTHETIC), SHAPES[name], cache)

    def build(partial: Path) -> None:
        pack_upload(archive(name, cache), "npz", partial, UploadLimits(), name=name)

    return ensure_packed(cache / "benchmarks" / name, build)


def archive(name: str, cache: Path) -> Path:
    """A data set of `ARCHIVES` as an .npz file in the form of an upload."""
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
    return _emoji_of(["google"], "twitter")


def emoji_vendors() -> dict[str, Images]:
    """5,556 pictures in 9 classes, 32 x 32 x 3 on white: Google's, Apple's and Facebook's drawings to train on.

    Twitter's 1,852 are to be tested on. From the npm packages emoji-datasource-*; the pictures that all four
    have, without skin tones.
    """
    return _emoji_of(["google", "apple", "facebook"], "twitter")


def emoji_choice() -> dict[str, Images]:
    """3,704 pictures like `emoji_vendors`', Google's and Apple's to train on, Facebook's to choose recipes by."""
    return _emoji_of(["google", "apple"], "facebook")


def _emoji_of(trained_on: Sequence[str], tested_on: str) -> dict[str, Images]:
    drawings, entries = {}, []
    for vendor in (*trained_on, tested_on):
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
    return {
        "x_train": np.concatenate([images[vendor] for vendor in trained_on]),
        "y_train": np.tile(labels, len(trained_on)),
        "x_test": images[tested_on],
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


def letters() -> dict[str, Images]:
    """The letters A to J, large and small in one class, of 465 display fonts: 7,077 + 1,692 images, 28 x 28 grey.

    From the Debian package fonts-aenigma (Brian Kent's fonts, 1995 to 2008), in the manner of notMNIST (Bulatov 2011).
    Train and test share no font family: the first word of a font's name says to which part it belongs. A picture that
    stands for two letters is left out, one that comes twice is there once.

    Raises PackageFailed where apt cannot fetch the package.
    """
    with tempfile.TemporaryDirectory(prefix="letters-") as folder:
        unpacked = unpack_package(FONTS_PACKAGE, Path(folder))
        if unpacked is None:
            raise PackageFailed(f"{FONTS_PACKAGE} comes from Debian, and there is no apt here")
        paths = sorted(unpacked.rglob("*.ttf"))
        if len(paths) != FONTS:
            raise PackageFailed(f"{FONTS_PACKAGE} has {len(paths)} fonts, not {FONTS}: it is another version")
        return parts_of_letters(letter for path in paths for letter in _letters_of(path))


def parts_of_letters(drawn: Iterable[tuple[str, int, npt.NDArray[np.uint8]]]) -> dict[str, Images]:
    """The train and test arrays of (family, class, picture); pictures that are unclear or come again are left out."""
    found: dict[bytes, list[tuple[str, int]]] = {}
    for family, label, picture in drawn:
        found.setdefault(picture.tobytes(), []).append((family, label))
    clear = [(key, *uses[0]) for key, uses in found.items() if len({label for _, label in uses}) == 1]
    shape = (len(clear), LETTER_SIDE, LETTER_SIDE)
    pictures = np.frombuffer(b"".join(key for key, _, _ in clear), dtype=np.uint8).reshape(shape)
    labels = np.array([label for _, _, label in clear], dtype=np.int64)
    tested = np.array([is_tested(family) for _, family, _ in clear])
    return {
        "x_train": pictures[~tested],
        "y_train": labels[~tested],
        "x_test": pictures[tested],
        "y_test": labels[tested],
        "classes": np.array(list(LETTERS)),
    }


def is_tested(family: str) -> bool:
    """Whether a font family belongs to the test part, by a digest of its name."""
    return int.from_bytes(hashlib.sha256(family.encode()).digest()) % ONE_FAMILY_TESTED_IN == 0


def _letters_of(path: Path) -> Iterator[tuple[str, int, npt.NDArray[np.uint8]]]:
    """(family, class, picture) of every letter of a font."""
    from PIL import ImageFont

    font = ImageFont.truetype(str(path), DRAWN_AT, layout_engine=ImageFont.Layout.BASIC)
    family = str(font.getname()[0]).split()[0].lower()
    for label, letter in enumerate(LETTERS):
        for character in (letter, letter.lower()):
            yield family, label, draw_letter(font, character)


def draw_letter(font: ImageFont.FreeTypeFont, character: str) -> npt.NDArray[np.uint8]:
    """The character in the middle of a black square, white, as large as its box allows."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character)
    drawn = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(drawn).text((-left, -top), character, font=font, fill=255)
    drawn = drawn.crop(drawn.getbbox())
    scale = LETTER_INNER_SIDE / max(drawn.size)
    width, height = (max(1, round(side * scale)) for side in drawn.size)
    picture = Image.new("L", (LETTER_SIDE, LETTER_SIDE))
    corner = ((LETTER_SIDE - width) // 2, (LETTER_SIDE - height) // 2)
    picture.paste(drawn.resize((width, height), Image.Resampling.LANCZOS), corner)
    return np.asarray(picture)


def mnist1d() -> dict[str, Images]:
    """4,000 + 1,000 signals of 40 values in 10 classes (Greydanus, arXiv 2011.14439), drawn by the package mnist1d."""
    from mnist1d.data import get_dataset_args, make_dataset

    return _signals(make_dataset(get_dataset_args()))


def _signals(made: dict[str, Any]) -> dict[str, Images]:
    parts = {"x_train": made["x"], "x_test": made["x_test"]}
    labels = {"y_train": made["y"], "y_test": made["y_test"]}
    return {name: values.astype(np.float32) for name, values in parts.items()} | {
        name: np.asarray(values, dtype=np.int64) for name, values in labels.items()
    }


def mnist1d_choice() -> dict[str, Images]:
    """The same from another seed: signals to choose by, so that those of `mnist1d` are only measured on."""
    from mnist1d.data import get_dataset_args, make_dataset

    options = get_dataset_args()
    options.seed += 1
    return _signals(make_dataset(options))


def clothes_choice() -> dict[str, Images]:
    """5,000 + 5,000 of Fashion-MNIST's training images, to choose by: its test images are only measured on."""
    folder = ensure_builtin("fashion-mnist", load_settings())
    images = np.load(folder / "train.images.npy", mmap_mode="r")
    labels = np.load(folder / "train.labels.npy")
    drawn = np.random.default_rng(0).permutation(len(labels))[:10_000]
    train, test = np.sort(drawn[:5000]), np.sort(drawn[5000:])
    return {"x_train": images[train], "y_train": labels[train], "x_test": images[test], "y_test": labels[test]}


ARCHIVES: dict[str, Callable[[], dict[str, Images]]] = {
    "emoji": emoji,
    "emoji-choice": emoji_choice,
    "emoji-vendors": emoji_vendors,
    "letters": letters,
    "mnist1d": mnist1d,
    "clothes-choice": clothes_choice,
    "mnist1d-choice": mnist1d_choice,
}
HELD_OUT = frozenset({"letters"})
"""Sets that nothing may be tuned by."""
