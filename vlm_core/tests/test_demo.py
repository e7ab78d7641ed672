"""The demo notebook runs, and what is stored in it is what it gives."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "vlm_core" / "demo.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The notebook run afresh, and behind it the strongest head as its attribution's array says."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    last = "layer, head = np.unravel_index(np.nanargmax(found.coefficients), found.coefficients.shape)\nprint(f'{layer}.{head}')"
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    kernels = tmp_path_factory.mktemp("kernels") / "kernels" / "this"
    kernels.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "this", "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(kernels.parents[1]))
        client = NotebookClient(notebook, timeout=300, kernel_name="this", resources={"metadata": {"path": str(ROOT)}})
        return client.execute()


def outputs(notebook):
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def text(outputs_of_cell):
    """What a cell prints, or shows as text."""
    return "".join(one.get("text") or one.get("data", {}).get("text/plain", "") for one in outputs_of_cell)


def test_what_is_stored_is_of_this_code(stored, run):
    before, after = outputs(stored), outputs(run)[:-1]
    assert len(before) == len(after) > 7
    for one, other in zip(before, after, strict=True):
        assert one and [output.output_type for output in one] == [output.output_type for output in other]
        assert [sorted(output.get("data", {})) for output in one] == [sorted(output.get("data", {})) for output in other]
        assert "error" not in {output.output_type for output in one}
        assert "stderr" not in {output.get("name") for output in (*one, *other)}
    assert [cell.execution_count for cell in stored.cells if cell.cell_type == "code"] == list(range(1, len(before) + 1))


def test_the_head_map_names_the_strongest_head(stored, run):
    strongest = text(outputs(run)[-1]).strip()
    for notebook in (stored, run):
        named = re.findall(r"strongest head: (\d+\.\d+)", " ".join(map(text, outputs(notebook))))
        assert named == [strongest]


def test_answers_are_those_that_are_stored(stored, run):
    tables = [[text(cell) for cell in outputs(notebook) if "prompt" in text(cell)] for notebook in (stored, run)]
    assert len(tables[0]) == 2 and tables[0] == tables[1]
    assert tables[0][0].count("True") == 3 > tables[0][1].count("True"), "without the top heads something is answered wrong"
    shares = [[text(cell) for cell in outputs(notebook) if "share kept" in text(cell)] for notebook in (stored, run)]
    assert shares[0] and shares[0] == shares[1]


def test_the_slider_is_a_strip_without_javascript(stored):
    pages = [one.get("data", {}).get("text/html", "") for cell in outputs(stored) for one in cell]
    (slider,) = [page for page in pages if "kept-tokens" in page]
    without = slider.partition("<script>")[0]
    pictures = re.findall(r'src="(data:image/png;base64,[^"]+)"', without)
    assert len(pictures) == 3 * without.count("<tr>") and len(set(pictures)) == len(pictures)
    assert "<tr hidden" not in without and "<p hidden>" in without and '<input type="range"' in without
    assert f'max="{without.count("<tr>") - 1}"' in without
    assert not re.search(r'(?:src|href)="(?!data:)', slider), "it needs nothing beside itself"


def test_it_is_small_and_its_cells_are_short(stored):
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert all(len(cell.source.splitlines()) <= 32 for cell in stored.cells)
    assert not re.search(r"/(?:home|work|tmp|usr)/", NOTEBOOK.read_text(encoding="utf-8"))
