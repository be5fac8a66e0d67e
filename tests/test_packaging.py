import importlib.metadata
import tomllib
from importlib.resources import files

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
