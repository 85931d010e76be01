"""Class folders of picture files: decoded once, stored in their own sizes; files that cannot be decoded are listed."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from app.datasets.ingest.archive import Archive, ArchiveMember, read_exactly
from app.datasets.ingest.arrays import check_class_names
from app.datasets.ingest.limits import Rejected, UploadLimits, UploadProblem, rejection, shorten_problems
from app.datasets.packed.holdout import HELD_OUT_SHARE, stratified_mask
from app.datasets.packed.packed import SPLITS, ArrayFile

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
DECODED = frozenset({"png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp"})
# files with these endings are pictures that their sender expects to be used; others (.txt, .json) are ignored
OTHER_PICTURES = frozenset(
    {"gif", "tif", "tiff", "svg", "psd", "heic", "heif", "avif", "jp2", "ico", "eps", "tga", "pnm", "ppm", "pgm"}
)
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
WHITE = 255


@dataclass(frozen=True)
class Picture:
    """The split and the class name of one picture file."""

    split: str
    class_name: str


@dataclass
class DecodedSplit:
    """The decoded pictures of one split: bytes in a file, a row (offset, height, width, channels) and a label each."""

    file: BinaryIO
    sizes: list[tuple[int, int, int, int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    end: int = 0

    def add(self, pixels_HWC: npt.NDArray[np.uint8], label: int) -> None:
        """Append one picture."""
        self.file.write(pixels_HWC.tobytes())
        self.sizes.append((self.end, *pixels_HWC.shape))
        self.labels.append(label)
        self.end += pixels_HWC.nbytes


@dataclass(frozen=True)
class Pictures:
    """What was packed; `example_shape` is the H x W x C that all pictures share, None for mixed sizes."""

    class_names: tuple[str, ...]
    example_shape: tuple[int, int, int] | None
    held_out: bool
    notes: tuple[str, ...]
    problems: tuple[UploadProblem, ...]


def pack_pictures(archive: Archive, out: Path, limits: UploadLimits) -> Pictures:
    """Decode the pictures of class folders into `out`.

    Raises Rejected where the folders make no data set, or where too many pictures cannot be decoded.
    """
    layout = _Layout(archive.entries)
    class_names = check_class_names(layout.class_names(limits), "class folders")
    held_out = not any(picture.split == "test" for picture in layout.pictures.values())
    if held_out:
        layout.hold_out(class_names)
    problems = list(layout.problems)
    numbers = {name: number for number, name in enumerate(class_names)}
    all_files = len(layout.pictures) + len(problems)
    splits = {split: DecodedSplit((out / f"{split}.pixels.bin").open("wb")) for split in SPLITS}
    decoded_bytes = 0
    try:
        for entry, stream in archive.members():
            picture = layout.pictures.get(entry.name)
            if picture is None:
                continue
            if entry.size > limits.picture_bytes:
                problems.append(
                    UploadProblem(entry.name, f"has {entry.size} bytes; the limit is {limits.picture_bytes}")
                )
            else:
                pixels = decode_picture(read_exactly(stream, entry.size, entry.name), limits)
                if isinstance(pixels, str):
                    problems.append(UploadProblem(entry.name, pixels))
                else:
                    decoded_bytes += pixels.nbytes
                    if decoded_bytes > limits.unpacked_bytes:
                        raise rejection("upload", f"its pictures decode to more than {limits.unpacked_bytes} bytes")
                    splits[picture.split].add(pixels, numbers[picture.class_name])
            _refuse_many(problems, all_files, limits, enough=True)
    finally:
        for split in splits.values():
            split.file.close()
    _refuse_many(problems, all_files, limits, enough=False)
    if not splits["test"].labels or not splits["train"].labels:
        raise Rejected(
            UploadProblem("upload", "has too few pictures: no class has two, of which one could be held out as test"),
            *problems,
        )
    example_shape = _write_arrays(out, splits)
    notes = layout.notes(held_out, list(splits.values()), len(problems), all_files, example_shape)
    return Pictures(class_names, example_shape, held_out, notes, shorten_problems(problems))


def _refuse_many(problems: list[UploadProblem], files: int, limits: UploadLimits, *, enough: bool) -> None:
    """Raise Rejected if too many pictures cannot be decoded to skip them; with `enough`, only once the list is long."""
    if problems and len(problems) >= files * limits.corrupt_share and (not enough or len(problems) >= 100):
        most = f"fewer than {limits.corrupt_share:.0%} would be skipped"
        summary = f"{len(problems)} of {files} pictures cannot be used; {most}"
        raise Rejected(UploadProblem("upload", summary), *shorten_problems(problems))


class _Layout:
    """Which member is a picture of which split and class, found from the names alone."""

    def __init__(self, entries: tuple[ArchiveMember, ...]) -> None:
        self.problems: list[UploadProblem] = []
        self.ignored = 0
        self.joined_validation = False
        self.validation_is_test = False
        named = [entry for entry in entries if self._is_picture(entry)]
        paths = {entry.name: entry.parts for entry in named}
        while (
            paths
            and len({parts[0] for parts in paths.values()}) == 1
            and min(len(parts) for parts in paths.values()) >= 3
        ):
            paths = {name: parts[1:] for name, parts in paths.items()}
        tops = {parts[0].casefold() for parts in paths.values() if len(parts) > 1}
        self._by_split = tops <= set(SPLIT_FOLDERS) and any(SPLIT_FOLDERS[top] == "train" for top in tops)
        self._has_test = any(SPLIT_FOLDERS.get(top) == "test" for top in tops)
        self.pictures: dict[str, Picture] = {}
        for name, parts in paths.items():
            self._assign_split(name, parts)

    def _is_picture(self, entry: ArchiveMember) -> bool:
        ending = entry.name.rpartition(".")[2].lower()
        if ending in OTHER_PICTURES:
            self.problems.append(UploadProblem(entry.name, f"is a .{ending} file; {', '.join(FORMATS)} are read"))
        elif ending not in DECODED:
            self.ignored += 1
        return ending in DECODED

    def _assign_split(self, name: str, parts: tuple[str, ...]) -> None:
        split = "train"
        if self._by_split and len(parts) > 1:
            split = SPLIT_FOLDERS[parts[0].casefold()]
            parts = parts[1:]
            if split == "val":
                self.joined_validation |= self._has_test
                self.validation_is_test |= not self._has_test
                split = "train" if self._has_test else "test"
        if len(parts) < 2:
            self.problems.append(UploadProblem(name, "is outside a class folder: the folder's name is the class"))
        else:
            self.pictures[name] = Picture(split, parts[0])

    def class_names(self, limits: UploadLimits) -> list[str]:
        """The class folders' names in order of code points, as torchvision's ImageFolder numbers them.

        Raises Rejected for fewer than two, too many, and test classes without training pictures.
        """
        if not self.pictures:
            raise Rejected(
                UploadProblem("upload", f"holds no pictures ({', '.join(FORMATS)}) in class folders"),
                *shorten_problems(self.problems),
            )
        names = sorted({picture.class_name for picture in self.pictures.values() if picture.split == "train"})
        if len(names) < 2:
            found = ascii(names[0]) if names else "none"
            raise rejection("class folders", f"at least two classes with training pictures are needed; found: {found}")
        if len(names) > limits.classes:
            raise rejection("class folders", f"there are {len(names)} classes; the limit is {limits.classes}")
        if len({name.casefold() for name in names}) != len(names):
            raise rejection(
                "class folders", "two names differ only in letter case: give them one name or two different ones"
            )
        unknown = sorted({picture.class_name for picture in self.pictures.values()} - set(names))
        if unknown:
            raise rejection(f"test/{unknown[0]}", "is a class without training pictures")
        return names

    def hold_out(self, class_names: tuple[str, ...]) -> None:
        """Move a stratified tenth of the training pictures into the test split."""
        numbers = {name: number for number, name in enumerate(class_names)}
        names = sorted(self.pictures)
        labels = np.array([numbers[self.pictures[name].class_name] for name in names], np.int64)
        for name, held_out in zip(
            names, stratified_mask(labels, HELD_OUT_SHARE, np.random.default_rng(0)), strict=True
        ):
            if held_out:
                self.pictures[name] = Picture("test", self.pictures[name].class_name)

    def notes(
        self,
        held_out: bool,
        splits: list[DecodedSplit],
        skipped: int,
        files: int,
        example_shape: tuple[int, int, int] | None,
    ) -> tuple[str, ...]:
        """What the sender and the report should know."""
        notes: list[str] = []
        if held_out:
            notes.append(
                f"no test part was sent: {len(splits[1].labels)} pictures, a tenth of each class, are held out as test"
            )
        if self.validation_is_test:
            notes.append("no test folder was sent: the validation folder is the test part")
        if self.joined_validation:
            notes.append(
                "the validation folder is part of the training part: a job holds out its own validation pictures"
            )
        if skipped:
            notes.append(f"{skipped} of {files} picture files could not be used and were skipped")
        if self.ignored:
            notes.append(f"{self.ignored} files are not pictures and are not used")
        if example_shape is None:
            sizes = Counter((height, width) for split in splits for _, height, width, _ in split.sizes)
            notes.append(f"the pictures have {len(sizes)} different sizes and are resized to each job's input_shape")
        return tuple(notes)


def decode_picture(data: bytes, limits: UploadLimits) -> npt.NDArray[np.uint8] | str:
    """The pixels H x W x C of a picture file (C = 1 for grey, 3 for colour), or a sentence that says why not.

    Pictures are rotated as EXIF says, transparency is put on white, palettes and other colour spaces become RGB, 16
    bits become 8.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about odd but readable files
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > limits.picture_pixels:
                    return f"is {width} x {height} pixels; the limit is {limits.picture_pixels} pixels"
                if picture.format in ("PNG", "WEBP") and getattr(picture, "n_frames", 1) > 1:
                    return "is an animation: one picture a file"
                picture.load()
                return flatten_picture(ImageOps.exif_transpose(picture))
    # A decoder that reads a hostile file may raise anything; the sentence is listed among the problems.
    except Exception as error:
        text = re.sub(r"\s*<_io\.BytesIO[^>]*>", "", str(error)).strip(" '\"")
        return f"cannot be decoded: {text or type(error).__name__}"[:200]


def flatten_picture(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels H x W x 1 of a grey picture, H x W x 3 of any other."""
    if picture.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip them
        wide = np.asarray(picture).astype(np.int64)
        return (np.clip(wide, 0, 65535) >> 8).astype(np.uint8)[:, :, None]
    if picture.mode == "1":
        picture = picture.convert("L")
    if "transparency" in picture.info or picture.mode in ("PA", "RGBa", "La"):
        picture = picture.convert("LA" if picture.mode in ("L", "La") else "RGBA")
    if picture.mode in ("LA", "RGBA"):
        ground = Image.new(picture.mode, picture.size, (WHITE,) * len(picture.getbands()))
        picture = Image.alpha_composite(ground.convert("RGBA"), picture.convert("RGBA")).convert(
            "L" if picture.mode == "LA" else "RGB"
        )
    pixels = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _write_arrays(out: Path, splits: dict[str, DecodedSplit]) -> tuple[int, int, int] | None:
    """Write labels, and images or sizes; returns the shape H x W x C that all pictures share, None for mixed sizes.

    Where some are grey and some in colour but all of one size, the grey ones get three equal channels.
    """
    rows = [row for split in splits.values() for row in split.sizes]
    sizes = {(height, width) for _, height, width, _ in rows}
    channels = max(channels for *_, channels in rows)
    for name, split in splits.items():
        np.save(out / f"{name}.labels.npy", np.array(split.labels, np.int64))
        pixels = out / f"{name}.pixels.bin"
        if len(sizes) == 1:
            [(height, width)] = sizes
            _write_images(pixels, split, out / f"{name}.images.npy", (height, width, channels))
            pixels.unlink()
        else:
            np.save(out / f"{name}.sizes.npy", np.array(split.sizes, np.int64).reshape(-1, 4))
    return (*sizes.pop(), channels) if len(sizes) == 1 else None


def _write_images(pixels: Path, split: DecodedSplit, path: Path, shape: tuple[int, int, int]) -> None:
    read: Callable[[int], bytes]
    with pixels.open("rb") as file, ArrayFile(path, shape, "uint8") as images:
        read = file.read
        for _, height, width, channels in split.sizes:
            picture = np.frombuffer(read(height * width * channels), np.uint8).reshape(1, height, width, channels)
            images.write(np.broadcast_to(picture, (1, *shape)))
