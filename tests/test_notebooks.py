"""Every notebook is executed as a reader would, and stored as an author should."""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel `python3` that is the Python of this very test, whatever else is installed for the user."""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    words = ", ".join(
        f'"{w}"' for w in (sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}")
    )
    (folder / "kernel.json").write_text(
        f'{{"argv": [{words}], "display_name": "Python 3", "language": "python"}}'
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")


def execute(path: Path, folder: Path) -> Any:
    """Run the notebook in `folder`, a copy of the repository that holds the example alone."""
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("*.py"))
    work = folder / "notebooks"
    work.mkdir()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    ).execute()
    return notebook


def shown(notebook: Any, kind: str) -> list[str]:
    """What the cells put out as this MIME type."""
    return [
        output["data"][kind]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if kind in output.get("data", {})
    ]


def test_the_quickstart_runs_and_shows_tables_and_a_picture(tmp_path: Path, kernels: None) -> None:
    before = {p: p.stat().st_mtime_ns for p in (ROOT / "notebooks").iterdir()}
    notebook = execute(ROOT / "notebooks" / "01_quickstart.ipynb", tmp_path)
    tables = [html for html in shown(notebook, "text/html") if html.startswith("<table>")]
    # The cache, two exports, sizes, two evaluations, the layers, the methods.
    assert len(tables) == 8
    assert len(shown(notebook, "image/png")) == 1
    assert sorted(p.name for p in (tmp_path / "notebooks").glob("*.fp8.onnx")) == ["model.fp8.onnx"]
    for method in ("entropy", "minmax", "mse", "percentile"):
        assert method in tables[-1]
    assert {p: p.stat().st_mtime_ns for p in (ROOT / "notebooks").iterdir()} == before


def test_four_bits_are_won_back_step_by_step(tmp_path: Path, kernels: None) -> None:
    notebook = execute(ROOT / "notebooks" / "02_fewer_bits.ipynb", tmp_path)
    # The cache, the methods, the layers, what was tried.
    tables = [html for html in shown(notebook, "text/html") if html.startswith("<table>")]
    assert len(tables) == 4
    rows = re.findall(r"<tr>(.*?)</tr>", tables[1], re.S)[1:]
    sqnr = [float(re.findall(r"<td.*?>(.*?)</td>", row, re.S)[2]) for row in rows]
    # Each method is better than the one before, and INT8 best.
    assert sqnr == sorted(sqnr)
    assert sqnr[2] > sqnr[1] + 5
    assert len(shown(notebook, "image/png")) == 1
    assert "[[rule]]" in str(notebook.cells)
    assert (tmp_path / "notebooks" / "mixed.onnx").exists()


@each_notebook
def test_a_notebook_is_stored_without_outputs_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert os.path.getsize(path) <= 40_000
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
        assert cell.metadata == {}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@each_notebook
def test_a_notebook_reads_as_a_lesson(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert sum(cell.cell_type == "markdown" for cell in cells) * 2 >= sum(
        c.cell_type == "code" for c in cells
    )
