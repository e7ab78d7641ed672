"""Pictures that stay in their files' bytes show what they always show, and take no memory of their own."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw

from vlm_core import pictures
from vlm_core.identity import image_digest, picture_digest
from vlm_core.images import as_rgb, require_image
from vlm_core.memory import Bounded
from vlm_core.pictures import PackedPicture


def encoded(side=12, mode="RGB", seed=0) -> tuple[Image.Image, bytes]:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    plain, file = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side + 3, *channels), np.uint8)), io.BytesIO()
    plain.save(file, format="PNG")
    return plain, file.getvalue()


@pytest.fixture
def decoded(monkeypatch):
    """What is kept decoded, room for two pictures of 12 x 15 pixels; and what was decoded."""
    kept, done, own = Bounded(2 * 12 * 15 * 4), [], pictures._decoded
    monkeypatch.setattr(pictures, "DECODED", kept)
    monkeypatch.setattr(pictures, "_decoded", lambda data: done.append(data) or own(data))
    return kept, done


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_it_is_the_image_that_it_was(mode):
    plain, data = encoded(mode=mode)
    packed = PackedPicture(memoryview(data))
    require_image(packed, "it")
    assert (packed.size, packed.mode, packed.tobytes()) == (plain.size, mode, plain.tobytes())
    assert image_digest(packed) == image_digest(plain) and picture_digest(packed) == picture_digest(plain)
    looks = {
        "array": np.asarray, "rgb": as_rgb, "copy": Image.Image.copy, "smaller": lambda one: one.resize((5, 4)),
        "cut": lambda one: one.crop((1, 2, 6, 7)), "turned": lambda one: one.transpose(0), "pixel": lambda one: one.getpixel((3, 2)),
        "read": lambda one: one.load()[3, 2], "difference": lambda one: ImageChops.difference(one, plain),
        "again": lambda one: pickle.loads(pickle.dumps(one)).tobytes(),
    }  # fmt: skip
    for name, look in looks.items():
        np.testing.assert_array_equal(np.asarray(look(packed)), np.asarray(look(plain)), err_msg=name)


def test_pixels_are_decoded_when_looked_at_and_kept_within_bytes(decoded):
    kept, done = decoded
    packed = [PackedPicture(encoded(seed=seed)[1]) for seed in range(5)]
    assert not done and all(one.size == (15, 12) for one in packed)
    for one in packed:
        one.tobytes()
        assert kept.bytes <= kept.limit
    assert len(kept) == 2 and len(done) == 5
    packed[4].tobytes(), PackedPicture(encoded(seed=4)[1]).tobytes()
    assert len(done) == 5  # known, as is another picture of the same bytes
    packed[0].tobytes()
    assert len(done) == 6


@pytest.mark.parametrize("change", [
    lambda one: one.putpixel((0, 0), (1, 2, 3)), lambda one: one.paste((9, 9, 9), (0, 0, 4, 4)), lambda one: one.thumbnail((6, 6)),
    lambda one: ImageDraw.Draw(one).line((0, 0, 9, 9)),
])  # fmt: skip
def test_changing_one_in_place_changes_no_other(change):
    plain, data = encoded()
    changed, other = PackedPicture(data), PackedPicture(data)
    changed.tobytes(), change(changed), change(expected := plain.copy())
    assert changed.tobytes() == expected.tobytes() != plain.tobytes() and other.tobytes() == plain.tobytes()
    assert PackedPicture(data).tobytes() == plain.tobytes() and pickle.loads(pickle.dumps(changed)).tobytes() == expected.tobytes()


def test_what_is_no_picture_is_refused():
    with pytest.raises(ValueError, match="a packed picture is no PNG file .*: save it as one"):
        PackedPicture(b"nothing")
    file = io.BytesIO()
    encoded()[0].convert("P").save(file, format="PNG")
    with pytest.raises(ValueError, match="mode 'P' is not kept packed, those of L, RGB, RGBA are"):
        PackedPicture(file.getvalue())
