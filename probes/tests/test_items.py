"""Items of a probe set: what `datasets` decodes, decoded when looked at, in memory that does not grow with their number."""

import gc
import io
from pathlib import Path

import pyarrow
import pytest
from PIL import Image

import probes
from probes.dataset import FEATURES
from vlm_core import pictures
from vlm_core.memory import Bounded

SIDE = 1344
ROOM = 4 * 4 * SIDE**2  # for four pictures


@pytest.fixture(scope="module")
def drawn():
    return probes.build("discovery", tasks=("color", "count"), n_per_task=6)


def test_items_are_those_of_the_dataset(drawn, tmp_path):
    plain = [{**row, "image": row["image"].tobytes(), "partner_image": row["partner_image"].tobytes()} for row in drawn]
    for dataset in (drawn, probes.on_disk(drawn, tmp_path / "drawn.arrow"), drawn.select(range(len(drawn)))):
        items = probes.items_of(dataset)
        assert [{**item, "image": item["image"].tobytes(), "partner_image": item["partner_image"].tobytes()} for item in items] == plain
        assert all(tuple(item) == tuple(FEATURES) for item in items)
        assert len({id(item["image"]) for item in items}) == len({item["scene_id"] for item in items}) < len(items)
    backwards = probes.items_of(drawn.select(range(len(drawn) - 1, -1, -1)))
    assert [item["id"] for item in backwards] == [row["id"] for row in plain][::-1]
    assert backwards[0]["partner_image"].tobytes() == plain[-1]["partner_image"]


def test_a_mapped_probe_sets_pictures_take_no_memory(drawn, tmp_path):
    mapped = probes.on_disk(drawn, tmp_path / "drawn.arrow")
    before = pyarrow.total_allocated_bytes()
    items = probes.items_of(mapped)
    packed = [item[name].packed for item in items for name in ("image", "partner_image")]
    stored = sum(map(len, packed))
    assert all(isinstance(one, pyarrow.Buffer) for one in packed)
    assert pyarrow.total_allocated_bytes() - before < stored / 10


def large(n, drawn):
    """``n`` rows with pictures of one colour each, no two alike."""
    rows = []
    for number in range(n):
        shown = {}
        for place, name in enumerate(("image", "partner_image")):
            file = io.BytesIO()
            Image.new("RGB", (SIDE, SIDE), (number, place, n)).save(file, format="PNG", compress_level=1)
            shown[name] = {"bytes": file.getvalue(), "path": None}
        rows.append({**{name: None for name in FEATURES}, **shown, "scene_id": str(number)})
    return type(drawn).from_list(rows, features=FEATURES)


def own_bytes():
    """Memory of this process that no file backs."""
    gc.collect()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_large_pictures_take_as_much_memory_however_many_they_are(drawn, monkeypatch):
    """Of 8 and of 24 items, every picture looked at and every item kept."""
    for n in (8, 24):
        dataset = large(n, drawn)
        monkeypatch.setattr(pictures, "DECODED", Bounded(ROOM))
        before = own_bytes()
        items = probes.items_of(dataset)
        for item in items:
            for name in ("image", "partner_image"):
                assert item[name].getpixel((5, SIDE - 1))[2] == n
        taken = own_bytes() - before
        assert len(pictures.DECODED) == 4 and taken < ROOM + 4 * 4 * SIDE**2 <= 2 * n * 4 * SIDE**2 / 2
