"""The README is run: every `sh` and `python` block, in its order, in a copy of the example's folder."""

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from quantkit.calibrators import list_calibrators
from quantkit.cli import main
from quantkit.data import open_data
from quantkit.export import list_emitters
from quantkit.graph import load_graph
from tests.conftest import ROOT, DigitsExample

README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line it begins at, and its text."""

    language: str
    line: int
    text: str


BLOCKS = [
    Block(found[1], README[: found.start()].count("\n") + 1, found[2])
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: DigitsExample) -> Path:
    """What the README supposes: model.onnx, calib/, eval.npz; data in arrays, and in two shards."""
    here = tmp_path_factory.mktemp("readme")
    shutil.copy(digits.model, here / "model.onnx")
    shutil.copy(digits.eval, here / "eval.npz")
    for name in ("calib", "monday", "tuesday"):
        (here / name).mkdir()
    for index, picture in enumerate(sorted(digits.calib.iterdir())[:128]):
        shutil.copy(picture, here / "calib")
        shutil.copy(picture, here / ("monday" if index < 64 else "tuesday"))
    samples = open_data(digits.calib, load_graph(digits.model).inputs, samples=128)
    pixels = np.concatenate([sample["input"] for sample in samples])
    np.save(here / "arrays.npy", pixels)
    np.savez(here / "arrays.npz", pixels=pixels)
    return here


@pytest.fixture(scope="module")
def printed(folder: Path) -> dict[int, str]:
    """Run the blocks in their order; return what each printed, by its line."""
    found = {}
    with contextlib.chdir(folder):
        for block in BLOCKS:
            named = re.match(r"# (\w+\.toml)\n", block.text)
            if block.language == "toml" and named:
                Path(named[1]).write_text(block.text, encoding="utf-8")
            if block.language in ("sh", "python"):
                found[block.line] = _run(block)
    return found


def _run(block: Block) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        if block.language == "python":
            program = compile("\n" * block.line + block.text, ROOT / "README.md", "exec", dont_inherit=True)
            # A class looks its module up.
            exec(program, {"__name__": "builtins"})
            return out.getvalue()
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "quantkit", line
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", words)
                with pytest.raises(SystemExit) as left:
                    main()
            assert left.value.code == 0, line
    return out.getvalue()


def test_every_command_of_the_readme_works(printed: dict[int, str], folder: Path) -> None:
    assert sum(block.language == "sh" for block in BLOCKS) >= 5
    assert sum(block.language == "python" for block in BLOCKS) >= 3
    for name in (
        "model.fp8.onnx",
        "model.int8.onnx",
        "model.int8.ort-cpu.onnx",
        "clipped.onnx",
        "week.calib",
    ):
        assert (folder / name).is_file()


def test_the_table_that_the_readme_shows_is_what_export_prints(printed: dict[int, str]) -> None:
    (shown,) = [block for block in BLOCKS if block.language == "text"]
    everything = "\n".join(printed.values()).splitlines()
    for line in shown.text.splitlines():
        assert line in everything


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert targets == {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_extras_of_the_readme_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set(re.findall(r"pip install '\.\[(\w+)\]'", README))
    assert named
    assert named <= set(project["optional-dependencies"])


def test_the_entry_points_of_the_readme_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"quantkit\.(?:calibrators|formats|emitters)(?=`)", README)) == set(
        project["entry-points"]
    )


@pytest.mark.parametrize("name", [*list_calibrators(), *list_emitters()])
def test_every_method_and_target_has_its_row(name: str) -> None:
    assert re.search(rf"^\| `{name}`( \(default\))? \|", README, re.MULTILINE)


def test_every_path_of_the_readme_exists() -> None:
    for path in re.findall(r"(?:examples|notebooks|quantkit)/[\w./]+\w", README):
        assert (ROOT / path).exists(), path
    assert os.path.getsize(ROOT / "README.md") < 20_000
