"""One upload becomes one packed folder, or a refusal that says why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.datasets.ingest.archive import Archive, open_archive
from app.datasets.ingest.arrays import pack_npz
from app.datasets.ingest.cifar import find_form, is_pickled, pack_cifar
from app.datasets.ingest.finish import finish_arrays
from app.datasets.ingest.idx import match_idx_name, pack_idx
from app.datasets.ingest.limits import UploadLimits, UploadProblem, rejection
from app.datasets.ingest.pictures import pack_pictures
from app.datasets.packed.packed import Manifest, write_manifest

Format = Literal["image_folder", "npz", "cifar", "idx"]
FORMATS: tuple[Format, ...] = ("image_folder", "npz", "cifar", "idx")


@dataclass(frozen=True)
class PackedUpload:
    """A packed upload: its format, its manifest, and a problem for each file that was left out."""

    format: Format
    manifest: Manifest
    problems: tuple[UploadProblem, ...]


def pack_upload(upload: Path, kind: str, out: Path, limits: UploadLimits, *, name: str = "upload") -> PackedUpload:
    """Check the upload and pack it into the empty folder `out`; `kind` is one of FORMATS or `auto`.

    Raises Rejected, with its problems.
    """
    with open_archive(upload, limits) as archive:
        found: Format = detect_format(archive) if kind == "auto" else _known_format(kind)
        if found == "image_folder":
            pictures = pack_pictures(archive, out, limits)
            manifest = write_manifest(
                out,
                name=name,
                dtype="uint8",
                classes=pictures.class_names,
                example_shape=pictures.example_shape,
                pictures=True,
                held_out=pictures.held_out,
                notes=pictures.notes,
            )
            return PackedUpload(found, manifest, pictures.problems)
        pack = {"npz": pack_npz, "cifar": pack_cifar, "idx": pack_idx}[found]
        return PackedUpload(found, finish_arrays(pack(archive, out, limits), out, name=name), ())


def _known_format(kind: str) -> Format:
    for known in FORMATS:
        if kind == known:
            return known
    raise rejection("upload", f"the format {kind!a} is not one of auto, {', '.join(FORMATS)}")


def detect_format(archive: Archive) -> Format:
    """The format that the names in the archive show; class folders where no other one fits."""
    names = [entry.parts[-1] for entry in archive.entries]
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if any(match_idx_name(name) for name in names):
        return "idx"
    if find_form(names) is not None or is_pickled(names):
        return "cifar"
    return "image_folder"
