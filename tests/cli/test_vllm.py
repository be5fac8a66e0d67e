"""The command line writes folders for vLLM, reads them again, and refuses wrong name maps in one line."""

import json
import sys

import numpy as np
import onnx
import pytest

from quantkit.cli import main
from tests.export.vllm_folders import ROWS, two_layers


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    onnx.save(two_layers(), "m.onnx")
    np.save("x.npy", ROWS)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantkit", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        return (code if isinstance(code, int) else 0), *capsys.readouterr()

    return run


def test_a_folder_is_written_again_under_other_names_and_evaluated(run, tmp_path):
    export = ("export", "m.onnx", "--int4", "--group", "16", "--target", "vllm")
    code, out, _ = run(*export)
    assert code == 0
    folder = tmp_path / "m.int4.vllm"
    assert "wrote m.int4.vllm: int4 for vllm" in out
    assert "weights read back; they follow the plan exactly" in out
    names = json.loads((folder / "names.json").read_text())
    moved = {key: value and f"model.{value}" for key, value in names.items()}
    (tmp_path / "map.json").write_text(json.dumps(moved))
    assert run(*export, "--name-map", "map.json")[0] == 0
    assert json.loads((folder / "names.json").read_text()) == moved
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "names.json"]
    code, out, _ = run("evaluate", "m.onnx", "m.int4.vllm", "--data", "x.npy")
    assert code == 0
    assert "SQNR" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or directory"),
        ("[1]", "is of type list, no object"),
        ('{"nobody": "a"}', "no linear layer, tensor or module called nobody"),
    ],
)
def test_a_wrong_name_map_is_one_line(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "map.json").write_text(content)
    code, _, error = run(
        "export", "m.onnx", "--int4", "--group", "16", "--target", "vllm", "--name-map", "map.json"
    )
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "m.int4.vllm").exists()


def test_a_folder_that_holds_something_else_is_refused_before_the_work(run, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "tokenizer.json").write_text("{}")
    code, _, error = run("export", "m.onnx", "--int4", "--group", "16", "--target", "vllm", "--out", "q")
    assert code == 2
    assert "holds other files (tokenizer.json)" in error
    assert [p.name for p in (tmp_path / "q").iterdir()] == ["tokenizer.json"]


def test_only_vllm_takes_a_name_map(run, tmp_path):
    (tmp_path / "map.json").write_text("{}")
    code, _, error = run("export", "m.onnx", "--int4", "--group", "16", "--name-map", "map.json")
    assert code == 2
    assert "tensorrt: has no name_map" in error
