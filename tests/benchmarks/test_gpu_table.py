"""The page of GPU figures is what its JSON says."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from quantkit.bench import bench_model
from tests.conftest import ROOT

SOURCE = ROOT / "docs" / "benchmarks-h200.json"


@pytest.fixture(scope="module")
def gpu_table() -> ModuleType:
    # Scripts in benchmarks/ are no package: they are loaded by their path.
    spec = importlib.util.spec_from_file_location("gpu_table", ROOT / "benchmarks" / "gpu_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_in_docs_was_written_from_the_json_beside_it(gpu_table: ModuleType) -> None:
    assert (SOURCE.parent / "benchmarks.md").read_text() == gpu_table.page(SOURCE)


def test_no_page_hides_a_wrong_result() -> None:
    assert json.loads(SOURCE.read_text())["check"]["wrong"] == []


def test_rows_of_bench_become_a_table_with_a_column_for_each_peer(
    gpu_table: ModuleType, tmp_path: Path
) -> None:
    data = json.loads(SOURCE.read_text())
    rows = bench_model(shapes=[(64, 512, 256)], formats=["int8", "fp8"], dry_run=True).to_dict()
    first, second = rows["rows"]
    for row, peers in ((first, {"Triton": 30.0}), (second, {"cuBLAS bf16": 40.0})):
        row |= {
            "time_us": 20.0,
            "peers_us": peers,
            "relative_error": 0.0,
            "kernel": "k",
            "configuration": "tile",
        }
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(data | {"formats": rows}))
    lines = gpu_table.page(path).splitlines()
    (head,) = [line for line in lines if "| × Triton | × cuBLAS bf16 |" in line]
    int8, fp8 = lines[lines.index(head) + 2 : lines.index(head) + 4]
    assert int8.startswith("| 64 × 512 × 256 | int8 | k tile | 20.0 |")
    assert int8.endswith("| 1.50 | – | exact |")
    assert fp8.endswith("| – | 2.00 | exact |")


def test_results_of_everything_become_the_same_page(gpu_table: ModuleType, tmp_path: Path) -> None:
    data = json.loads(SOURCE.read_text())
    one, path = tmp_path / "one.json", tmp_path / "all.json"
    one.write_text(json.dumps({k: v for k, v in data.items() if k != "formats"}))
    facts = {k: v for k, v in data.items() if not isinstance(v, list | dict)}
    cases = data["check"]["cases"]
    checks = [{"cases": 100, "exact": {}, "wrong": []}, {"cases": cases - 100, "exact": {}, "wrong": []}]
    if "exact" in data["check"]:
        checks[1]["exact"] = data["check"]["exact"]
    parts = {"check": dict(enumerate(checks)), "table": data["table"], "sustained": data["sustained"]}
    parts |= {f"layers_{name}": rows for name, rows in data["layers"].items()}
    path.write_text(json.dumps(facts | {"parts": parts}))
    assert gpu_table.page(path).replace("all.json", "one.json") == gpu_table.page(one)


def test_weights_of_four_bits_have_a_table_of_their_own(gpu_table: ModuleType) -> None:
    rows = [{"m": 1, "n": 8, "k": 64, "us": {"torch": 30.0, "int4": 10.0}}]
    assert gpu_table.four_bits_table(rows)[-1] == "| 1 × 8 × 64 | 30.0 µs | 10.0 µs (3.00×) |"
