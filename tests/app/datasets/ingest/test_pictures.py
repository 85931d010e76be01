"""Class folders of pictures: what is kept, what is turned into what, what is listed, what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.datasets.ingest.limits import Rejected, UploadLimits
from app.datasets.ingest.pack import PackedUpload, pack_upload
from app.datasets.ingest.pictures import decode_picture
from app.datasets.packed.resizing import ensure_resized, prepare_pictures, stored_pictures
from tests.support.services.uploads import class_folders, picture, tarred, zipped

LIMITS = UploadLimits(unpacked_bytes=10_000_000, picture_pixels=100_000)


def pack(tmp_path: Path, members: dict[str, bytes], limits: UploadLimits = LIMITS) -> PackedUpload:
    out = tmp_path / "out"
    out.mkdir()
    return pack_upload(zipped(tmp_path / "u", members), "auto", out, limits)


def refused(tmp_path: Path, members: dict[str, bytes], limits: UploadLimits = LIMITS) -> Rejected:
    with pytest.raises(Rejected) as refusal:
        pack(tmp_path, members, limits)
    return refusal.value


def load(tmp_path: Path, name: str) -> np.ndarray:
    return np.load(tmp_path / "out" / f"{name}.npy")


def test_pictures_of_one_size_become_an_array_and_a_tenth_is_held_out(tmp_path: Path) -> None:
    found = pack(tmp_path, class_folders(20))
    assert found.format == "image_folder"
    facts = found.manifest.facts()
    assert (facts.example_shape, facts.pictures, facts.class_names) == ((8, 8, 3), True, ("cat", "dog"))
    assert (facts.train, facts.test, found.manifest.held_out) == (36, 4, True)
    assert any("4 pictures" in note and "held out" in note for note in found.manifest.notes)
    assert np.bincount(load(tmp_path, "test.labels")).tolist() == [2, 2]
    sent = {np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in class_folders(20).values()}
    assert {row.tobytes() for split in ("train", "test") for row in load(tmp_path, f"{split}.images")} == sent


@pytest.mark.parametrize("root", ["", "data/", "data/v1/"])
def test_train_and_test_folders_are_the_splits_under_any_outer_folder(tmp_path: Path, root: str) -> None:
    members = {**class_folders(6, root=f"{root}train/"), **class_folders(2, root=f"{root}test/")}
    found = pack(tmp_path, {**members, f"{root}readme.txt": b"hello"})
    assert (found.manifest.train, found.manifest.test, found.manifest.held_out) == (12, 4, False)
    assert any("1 files are not pictures" in note for note in found.manifest.notes)


def test_a_validation_folder_joins_training_where_there_is_a_test_folder_else_it_is_the_test(tmp_path: Path) -> None:
    members = {**class_folders(6, root="train/"), **class_folders(3, root="val/")}
    (tmp_path / "a").mkdir()
    found = pack(tmp_path / "a", members)
    assert (found.manifest.train, found.manifest.test) == (12, 6)
    assert "no test folder was sent: the validation folder is the test part" in found.manifest.notes
    found = pack(tmp_path, {**members, **class_folders(2, root="test/")})
    assert (found.manifest.train, found.manifest.test) == (18, 4)
    assert any("is part of the training part" in note for note in found.manifest.notes)


def test_folders_inside_class_folders_belong_to_the_class(tmp_path: Path) -> None:
    members = {f"{kind}/images/{number}.JPEG": picture(kind="JPEG") for kind in "ab" for number in range(5)}
    assert pack(tmp_path, {f"train/{name}": data for name, data in members.items()}).manifest.classes == ("a", "b")


def test_pictures_of_mixed_sizes_keep_theirs_and_are_resized_once_for_a_job(tmp_path: Path) -> None:
    members = {
        f"{kind}/{number}.png": picture((8 + number, 12), seed=number, mode="RGB" if kind == "a" else "L")
        for kind in "ab"
        for number in range(10)
    }
    found = pack(tmp_path, members)
    facts = found.manifest.facts()
    assert (facts.example_shape, facts.default_input_shape(), facts.layout((3, 6, 6))) == (None, None, "pictures")
    assert any("10 different sizes" in note for note in found.manifest.notes)
    stored = list(stored_pictures(tmp_path / "out", "train"))
    assert {shape.shape[2] for shape in stored} == {1, 3}
    assert {(height, width) for height, width, _ in (row.shape for row in stored)} <= {(12, 8 + n) for n in range(10)}
    original = {np.atleast_3d(np.asarray(Image.open(io.BytesIO(data)))).tobytes() for data in members.values()}
    assert {row.tobytes() for row in stored} <= original

    prepare_pictures(tmp_path / "out", (3, 6, 6))
    path = ensure_resized(tmp_path / "out", "train", (3, 6, 6))
    made = path.stat()
    resized = np.load(path)
    assert (resized.shape, resized.dtype) == ((18, 3, 6, 6), np.uint8)
    expected = Image.fromarray(stored[0]).resize((6, 6), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized[0], np.asarray(expected).transpose(2, 0, 1))
    ensure_resized(tmp_path / "out", "train", (3, 6, 6))
    assert path.stat() == made, "the copy is made once"


def test_grey_pictures_have_one_channel_unless_one_is_in_colour(tmp_path: Path) -> None:
    members = {f"{kind}/{number}.png": picture(mode="L", seed=number) for kind in "ab" for number in range(5)}
    (tmp_path / "grey").mkdir()
    assert pack(tmp_path / "grey", members).manifest.example_shape == (8, 8, 1)
    found = pack(tmp_path, {**members, "b/colour.png": picture()})
    assert found.manifest.example_shape == (8, 8, 3)
    train = load(tmp_path, "train.images")
    assert sum(bool((row[..., :1] == row).all()) for row in train) >= 8, "a grey picture has three equal channels"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_every_offered_format_is_read(kind: str) -> None:
    pixels = decode_picture(picture((9, 7), kind=kind), LIMITS)
    assert not isinstance(pixels, str)
    assert pixels.shape == (7, 9, 3)


def png(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def pixel(data: bytes) -> list[int]:
    pixels = decode_picture(data, LIMITS)
    assert not isinstance(pixels, str), pixels
    return pixels[0, 0].tolist()


def test_colour_spaces_are_flattened_as_an_eye_would_see_them_on_white_paper() -> None:
    assert pixel(png(Image.new("RGBA", (2, 2), (200, 100, 0, 0)))) == [255, 255, 255]
    assert pixel(png(Image.new("RGBA", (2, 2), (200, 100, 0, 255)))) == [200, 100, 0]
    assert pixel(png(Image.new("RGBA", (2, 2), (0, 0, 0, 51)))) == [204, 204, 204]
    assert pixel(png(Image.new("LA", (2, 2), (0, 0)))) == [255]
    assert pixel(png(Image.new("1", (2, 2), 1))) == [255]
    assert pixel(png(Image.new("I;16", (2, 2), 0x1234))) == [0x12]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(png(palette)) == [10, 20, 30]
    assert pixel(png(palette, transparency=1)) == [255, 255, 255]
    cmyk = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(cmyk, "JPEG")
    assert max(pixel(cmyk.getvalue())) < 10


def test_a_picture_is_turned_as_its_camera_held_it() -> None:
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    pixels = decode_picture(file.getvalue(), LIMITS)
    assert not isinstance(pixels, str)
    assert pixels.shape == (4, 2, 3)


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def animation(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 120, 250)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


BROKEN = {
    "text": b"this is no picture",
    "empty": b"",
    "truncated.png": picture()[:-40],
    "truncated.jpg": picture((64, 64), kind="JPEG")[:500],
    "huge by its header": png_header(13_000, 13_000),
    "absurd by its header": png_header(2**31 - 1, 2**31 - 1),
    "animated png": animation("PNG"),
    "animated webp": animation("WEBP"),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "psd": b"8BPS\x00\x01" + bytes(40),
    "gif": b"GIF89a" + bytes(40),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_cannot_be_used_gives_a_sentence(what: str) -> None:
    sentence = decode_picture(BROKEN[what], LIMITS)
    assert isinstance(sentence, str)
    assert len(sentence) > 10
    assert "0x" not in sentence, "no addresses of ours"
    if "header" in what:
        assert "the limit is 100000 pixels" in sentence or "cannot be decoded" in sentence


def test_fewer_than_one_in_a_hundred_corrupt_pictures_are_listed_and_skipped(tmp_path: Path) -> None:
    members = {**class_folders(100), "dog/broken.png": BROKEN["truncated.png"]}
    found = pack(tmp_path, members)
    assert [problem.file for problem in found.problems] == ["dog/broken.png"]
    assert found.manifest.train + found.manifest.test == 200
    assert any("1 of 201 picture files" in note for note in found.manifest.notes)


def test_one_in_a_hundred_is_too_many_and_all_are_listed(tmp_path: Path) -> None:
    members = {**class_folders(49), "cat/extra.png": picture()}
    (tmp_path / "one").mkdir()
    refusal = refused(tmp_path / "one", {**members, "cat/broken.png": b""})
    assert "1 of 100 pictures cannot be used; fewer than 1% would be skipped" in refusal.problems[0].message
    refusal = refused(tmp_path, {**members, "cat/broken.png": b"", "dog/photo.tiff": b"II*\x00"})
    assert {problem.file for problem in refusal.problems[1:]} == {"cat/broken.png", "dog/photo.tiff"}


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path: Path) -> None:
    refusal = refused(tmp_path, {f"{kind}/{number}.png": b"" for kind in "ab" for number in range(75)})
    assert len(refusal.problems) <= 102
    assert "100 of 150" in refusal.problems[0].message


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "holds no pictures"),
        ({"readme.txt": b"x"}, "holds no pictures"),
        ({"cat/1.png": picture(), "cat/2.png": picture()}, "found: 'cat'"),
        ({"1.png": picture(), "2.png": picture()}, "holds no pictures"),
        ({"cat/1.png": picture(), "dog/1.png": picture()}, "too few pictures"),
        ({**class_folders(3), "Cat/9.png": picture()}, "differ only in letter case"),
        ({**class_folders(3, root="train/"), **class_folders(1, ("bird",), root="test/")}, "without training pictures"),
        (class_folders(1, ("x" * 201, "y")), "1 to 200 printable"),
    ],
)
def test_folders_that_make_no_data_set_are_refused(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    assert reason in str(refused(tmp_path, members))


def test_too_many_classes_and_too_large_files_are_refused_by_their_limit(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    limits = UploadLimits(classes=3)
    assert "there are 4 classes; the limit is 3" in str(
        refused(tmp_path / "a", class_folders(2, tuple("abcd")), limits)
    )
    assert "the limit is 50" in str(refused(tmp_path, class_folders(3), UploadLimits(picture_bytes=50)))


def test_pictures_that_decode_to_too_much_together_are_refused(tmp_path: Path) -> None:
    members = {f"{kind}/{n}.png": png(Image.new("RGB", (200, 200))) for kind in "ab" for n in range(5)}
    assert "decode to more than 500000" in str(refused(tmp_path, members, UploadLimits(unpacked_bytes=500_000)))


def test_a_tar_of_class_folders_is_read_as_well(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    found = pack_upload(tarred(tmp_path / "u", class_folders(10), mode="w:gz"), "auto", tmp_path / "out", LIMITS)
    assert (found.format, found.manifest.train) == ("image_folder", 18)
