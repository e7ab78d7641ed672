"""Pictures and paths that come in data, which anyone may have written: decoded within limits, never from elsewhere."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_core.images import MAX_PIXELS, open_image, require_image, stored_image
from vlm_core.paths import within
from vlm_core.sources import Items, items_from, items_of


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def claiming(width: int, height: int) -> bytes:
    """A PNG of under a hundred bytes whose header claims that many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [2**13 + 1, 2**14, 2**20])
def test_a_picture_that_claims_too_many_pixels_is_refused_before_it_is_decoded(side, monkeypatch):
    Image.init()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=rf"^the image of item 'a' has .*more than.* {MAX_PIXELS:,}.*: make it smaller$"):
        open_image(claiming(side, side), "the image of item 'a'")


def test_the_limit_itself_is_let_through():
    # It claims 8192 x 8192 and has none of them: what is refused is its end.
    with pytest.raises(ValueError, match="cannot be decoded to its end"):
        open_image(claiming(2**13, 2**13), "it")
    assert 2**13 * 2**13 == MAX_PIXELS


def test_an_image_that_was_opened_elsewhere_has_the_same_limit():
    large = Image.open(io.BytesIO(claiming(2**13 + 1, 2**13)))
    with pytest.raises(ValueError, match=r"image of item 'a' has 8193 x 8192 pixels, more than the limit"):
        require_image(large, "image of item 'a'")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_a_file_that_ends_early_is_named(kind):
    whole = encoded(noise(), kind)
    assert open_image(whole, "it").size == (64, 64)
    with pytest.raises(ValueError, match=r"^the image of row 3 cannot be decoded to its end \(.+\): copy or make it again$"):
        open_image(whole[: len(whole) // 2], "the image of row 3")


def test_a_picture_is_one_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    with pytest.raises(ValueError, match="the image of row 1 has several frames or pages: save the one that is meant"):
        open_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "the image of row 1")
    assert open_image(encoded(frames[0], "GIF"), "it").size == (4, 4)


@pytest.mark.parametrize("content", [b"no image", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>"])
def test_what_is_no_picture_is_named_with_what_may_be(content):
    # EPS would start Ghostscript.
    with pytest.raises(ValueError, match=r"^the image of row 1 is no image that can be read \(.*\): it may be one of BMP, .*WEBP$"):
        open_image(content, "the image of row 1")


def test_a_picture_is_turned_as_its_camera_says():
    exif = Image.Exif()
    exif[274] = 6
    wide = Image.new("RGB", (8, 4))
    assert open_image(encoded(wide, "JPEG", exif=exif), "it").size == (4, 8)


@pytest.fixture
def folder(tmp_path):
    """``data/`` with a picture, beside it a picture of somebody else; a link to each."""
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    noise().save(data / "sub" / "a.png")
    noise().save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", data / "out.png")
    os.symlink(tmp_path, data / "up")
    os.symlink(data / "sub" / "a.png", data / "in.png")
    return data


OUTSIDE = [
    ("../secret.png", "climbs out of its folder"),
    ("sub/../../secret.png", "climbs out of its folder"),
    ("..\\secret.png", "climbs out of its folder"),
    ("/etc/passwd", "has an absolute path"),
    ("C:\\secret.png", "has an absolute path"),
    ("\\\\host\\share\\a.png", "has an absolute path"),
    ("out.png", "lies outside of its folder"),
    ("up/secret.png", "lies outside of its folder"),
    ("https://example.org/a.png", "is an address"),
    ("file:///etc/passwd", "is an address"),
    ("hf://datasets/a/b.png", "is an address"),
    ("a\0.png", "is no path"),
    ("", "is no path"),
    ("nothing.png", "is not there"),
    ("sub", "is not there"),
]


@pytest.mark.parametrize(("path", "why"), OUTSIDE)
def test_data_names_only_files_of_its_own_folder(folder, path, why):
    with pytest.raises(ValueError, match=rf"^the image of row 2 {why}.*: .*{folder.name}") as refused:
        within(folder, path, "the image of row 2")
    assert "\n" not in str(refused.value)


def test_a_file_of_the_folder_is_found_also_by_a_link_within_it(folder):
    found = within(folder, "sub/a.png", "it")
    assert found == within(folder, "in.png", "it") == within([folder.parent / "other", folder], str(folder / "in.png"), "it", absolute=True)


def test_what_datasets_itself_made_absolute_must_still_lie_in_the_folder(folder):
    assert stored_image({"bytes": None, "path": str(folder / "sub" / "a.png")}, "it", folder).size == (64, 64)
    with pytest.raises(ValueError, match="lies outside of its folder"):
        stored_image({"bytes": None, "path": str(folder.parent / "secret.png")}, "it", folder)
    with pytest.raises(ValueError, match="^it is a path .*: say which folder it lies in"):
        stored_image("sub/a.png", "it")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_items_of_a_file_cannot_show_what_lies_elsewhere(folder, kind):
    def source(path: str) -> Items:
        row = {"image": path, "question": "What?", "answer": "it"}
        file = folder / f"set.{kind}"
        if kind == "jsonl":
            file.write_text(json.dumps(row) + "\n")
        else:
            getattr(datasets.Dataset.from_list([row]), f"to_{kind}")(file)
        return Items(path=str(file))

    assert items_of(source("sub/a.png"), "data")[0]["image"].size == (64, 64)
    with pytest.raises(ValueError, match="^data: the image of row 0 climbs out of its folder"):
        items_of(source("../secret.png"), "data")


def test_a_set_whose_pictures_are_paths_elsewhere_is_not_opened_by_datasets_either(folder):
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")})
    row = {"image": {"bytes": None, "path": str(folder.parent / "secret.png")}, "question": "What?", "answer": "it"}
    file = folder / "set.parquet"
    # As somebody else may write it: datasets itself would put the picture's bytes in.
    pq.write_table(pa.Table.from_pylist([row], schema=features.arrow_schema), file)
    assert datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=folder / "cache")[0]["image"].size == (64, 64)
    with pytest.raises(ValueError, match="the image of row 0 lies outside of its folder"):
        items_of(Items(path=str(file)), "data")


def test_items_of_a_data_set_are_decoded_within_limits():
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    rows = [{"image": {"bytes": claiming(2**14, 2**14), "path": None}, "question": "What?"}]
    with pytest.raises(ValueError, match="the image of row 0 has more than 67,108,864 pixels, the limit"):
        items_from(datasets.Dataset.from_list(rows, features=features))
    several = datasets.Features({"image": datasets.List(datasets.Image()), "question": datasets.Value("string")})
    rows = [{"image": [{"bytes": encoded(noise()), "path": None}, {"bytes": encoded(noise())[:99], "path": None}], "question": "What?"}]
    with pytest.raises(ValueError, match="the image of row 0 cannot be decoded"):
        items_from(datasets.Dataset.from_list(rows, features=several))
