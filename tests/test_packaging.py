import importlib.metadata
import os
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import quantkit
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = PROJECT["entry-points"]


def test_the_installed_version_is_the_one_in_the_package() -> None:
    assert importlib.metadata.version("quantkit") == quantkit.__version__


def test_the_package_says_that_it_is_typed() -> None:
    assert (files("quantkit") / "py.typed").is_file()


@pytest.mark.parametrize(
    "target", [t for group in GROUPS.values() for t in group.values()] + list(PROJECT["scripts"].values())
)
def test_every_entry_point_leads_somewhere(target: str) -> None:
    assert importlib.metadata.EntryPoint(name="", value=target, group="").load() is not None


@pytest.fixture(scope="module")
def built_without_a_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed where compiling fails."""
    out = tmp_path_factory.mktemp("build")
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(out), "build", "-b", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CC": "false"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (package,) = out.glob("lib*/quantkit")
    return package


def test_installing_does_without_a_compiler(built_without_a_compiler: Path) -> None:
    folder = built_without_a_compiler / "statistics"
    assert (folder / "__init__.py").is_file()
    assert [path.name for path in folder.iterdir() if path.suffix in (".so", ".pyd")] == []


def test_no_file_of_the_package_is_left_behind(built_without_a_compiler: Path) -> None:
    source = ROOT / "quantkit"
    wanted = {
        path.relative_to(source)
        for path in source.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so", ".pyd", ".c")
    }
    assert Path("py.typed") in wanted
    assert (
        wanted - {path.relative_to(built_without_a_compiler) for path in built_without_a_compiler.rglob("*")}
        == set()
    )


@pytest.mark.parametrize("system", ["linux", "win32", "darwin"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "arm64", "AMD64"])
def test_exactly_one_onnxruntime_is_installed_anywhere(system: str, machine: str) -> None:
    platform = {"sys_platform": system, "platform_machine": machine}
    wanted = [
        r.name
        for r in map(Requirement, PROJECT["dependencies"])
        if r.name.startswith("onnxruntime") and (r.marker is None or r.marker.evaluate(platform))
    ]
    assert len(wanted) == 1
    assert (wanted == ["onnxruntime-gpu"]) == (system == "linux" and machine == "x86_64")


def test_the_base_install_brings_no_cuda() -> None:
    heavy = ("cupy", "cuda", "nvidia", "torch")
    assert not [d for d in PROJECT["dependencies"] if d.startswith(heavy)]
    extras = [extra for d in PROJECT["dependencies"] for extra in Requirement(d).extras]
    assert extras == []
