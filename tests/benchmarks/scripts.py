"""Scripts in benchmarks/ are no package: tests load them by their path, with those beside them."""

import importlib
import sys
from types import ModuleType

import pytest

from tests.conftest import ROOT


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module(name)
