"""The public face, and the order of the house: who may import whom, and who may speak."""

import ast
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import quantkit
from tests.conftest import ROOT

PACKAGE = ROOT / "quantkit"

# Top to bottom: a part imports only from rows below its own. `quantkit` itself, the face, holds names alone and
# the version; it imports nothing until it is asked.
HOUSE = (
    ("cli",),
    ("mixed_precision",),
    ("exporting", "pipeline"),
    ("evaluation", "exported", "interchange"),
    ("export",),
    ("planning",),
    ("bench", "observing"),
    ("cache", "decode", "memory"),
    ("calibrators", "graph", "kernels"),
    ("formats", "metrics"),
    ("data", "files", "plugins", "runtime", "statistics"),
    ("blas", "model_files", "tables"),
    ("errors",),
)
# These do the work of three different places, and know nothing of each other; an engine may launch kernels.
STRANGERS = {"export", "kernels", "engine"}
HEAVY = {"cupy", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "PIL", "scipy"}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text()
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in it the import stands."""
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "quantkit")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quantkit":
            assert node.module is not None and node.level == 0
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


def part(module: str) -> str:
    """The part of the house that a module belongs to."""
    return [*module.split("."), ""][1]


# --- the face -----------------------------------------------------------------------------------------------


def test_the_face_shows_what_it_promises() -> None:
    assert quantkit.__all__ == [
        "Benchmark",
        "BudgetResult",
        "CalibrationCache",
        "Evaluation",
        "Exported",
        "ImagePreprocessing",
        "QuantkitError",
        "Request",
        "Sensitivity",
        "__version__",
        "bench_model",
        "calibrate_model",
        "collect_grams",
        "evaluate_model",
        "export_model",
        "measure_sensitivity",
        "meet_budget",
    ]
    assert dir(quantkit) == sorted(quantkit.__all__)


@pytest.mark.parametrize("name", quantkit.__all__)
def test_every_name_of_the_face_leads_somewhere(name: str) -> None:
    value = getattr(quantkit, name)
    if callable(value):
        assert value.__doc__
        assert getattr(importlib.import_module(value.__module__), name) is value


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'quantkit' has no attribute 'calibrate'"):
        _ = quantkit.calibrate  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "first",
    [
        "import quantkit",
        "import quantkit.cli",
        "from quantkit.cli import main; sys.argv = ['quantkit', '--help']; main()",
        "from quantkit.cli import main; sys.argv = ['quantkit', 'export', '--help']; main()",
        "from quantkit.cli import main; sys.argv = ['quantkit', '--version']; main()",
    ],
)
def test_the_first_touch_loads_no_runtime(first: str) -> None:
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(*(set(sys.modules) & {HEAVY!r}), file=sys.stderr))\n{first}"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stderr.split() == []


def test_cupy_is_imported_by_what_needs_a_gpu_alone() -> None:
    assert {part(name) for name in modules() if "cupy" in _foreign(name)} <= {
        "kernels",
        "engine",
        "statistics",
    }


# --- the house ----------------------------------------------------------------------------------------------


def test_every_part_has_its_place_in_the_house() -> None:
    placed = [name for row in HOUSE for name in row]
    assert len(placed) == len(set(placed))
    assert {part(name) for name in modules()} - {""} == set(placed)


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    if module == "quantkit":
        return
    row = {name: index for index, names in enumerate(HOUSE) for name in names}
    for other in imports(module):
        if other != "quantkit" and part(other) != part(module):
            assert row[part(other)] > row[part(module)], f"{module} imports {other}"


def test_the_face_imports_nothing_until_it_is_asked() -> None:
    tree = modules()["quantkit"]
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", None) for node in at_once} == {"importlib", "typing"}


def test_no_module_imports_in_a_circle() -> None:
    tied = {name: set(imports(name)) - {"quantkit"} for name in modules() if name != "quantkit"}
    try:
        list(graphlib.TopologicalSorter(tied).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_export_kernels_and_engine_are_strangers() -> None:
    for module in modules():
        for other in imports(module):
            if part(module) in STRANGERS and part(other) in STRANGERS - {part(module)}:
                assert (part(module), part(other)) == ("engine", "kernels")


@pytest.mark.parametrize("module", [name for name in modules() if part(name) != "cli"])
def test_only_the_command_line_prints_or_exits(module: str) -> None:
    spoken = {"sys.exit", "os._exit", "sys.stdout", "sys.stderr", "quit", "exit", "print", "input"}
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Name | ast.Attribute):
            assert ast.unparse(node) not in spoken, f"{module}:{node.lineno}"
    assert "typer" not in _foreign(module)
    assert "argparse" not in _foreign(module)


def _foreign(module: str) -> set[str]:
    """The packages, quantkit aside, that a module imports."""
    found = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_the_scan_sees_imports_wherever_they_stand() -> None:
    assert "quantkit.exporting" in set(imports("quantkit.cli.export"))
    assert "quantkit.errors" in set(imports("quantkit.plugins"))
    assert Path(quantkit.__file__).parent == PACKAGE
