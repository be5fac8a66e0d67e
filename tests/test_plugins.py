"""What third parties register: found by its name, and refused in one line where it is not what it should be."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import numpy as np
import pytest

from quantkit import plugins
from quantkit.calibrators import get_calibrator, list_calibrators, solve_range
from quantkit.errors import QuantkitError, SpecError, UnknownNameError
from quantkit.export import get_emitter, list_emitters
from quantkit.formats import INT8, QuantSpec, Range, get_format, list_formats
from quantkit.interchange import export_cache
from quantkit.pipeline import calibrate_model
from quantkit.planning.presets import get_preset
from quantkit.planning.solve import calibrator_of, solve
from quantkit.statistics import FloatHistogram
from tests.models import MODELS
from tests.plans import calibrated

HERE = "tests.test_plugins"


@dataclass(frozen=True, kw_only=True)
class Half:
    name = "half"
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError("share:\nnot in 0…1")

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> object:
        return Range(histogram.min * self.share, histogram.max * self.share)


class Raises(Half):
    name = "raises"

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> object:
        raise ValueError("boom\nand a second line")


class GivesNone(Half):
    name = "gives-none"

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> object:
        return None


class GivesInfinity(Half):
    name = "gives-infinity"

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> object:
        return Range(float("nan"), float("inf"))


class GivesReversed(Half):
    name = "gives-reversed"

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> object:
        return Range(1.0, -1.0)


class GivesSmuggled(Half):
    name = "gives-smuggled"

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> object:
        found = Range(0, 1)
        object.__setattr__(found, "hi", np.asarray(np.nan))
        return found


class GivesMany(Half):
    name = "gives-many"

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> object:
        return Range([0, 0], [1, 1])


class NotOne:
    pass


class Nameless:
    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> Range:
        return Range(0, 1)


class Targetless:
    def emit(self, graph: object, plan: object) -> None:
        raise AssertionError


class RaisingEmitter(Targetless):
    def __init__(self) -> None:
        raise RuntimeError("no licence\nfound")


NUMBER = 3
WRONG = {
    Raises: r"solve raised ValueError: boom and a second line",
    GivesNone: r"solve returned NoneType, not a Range",
    GivesInfinity: r"solve raised SpecError: range: lo nan and hi inf must be finite",
    GivesReversed: r"solve raised SpecError: range: lo 1.0 and hi -1.0 must be finite",
    GivesSmuggled: r"solve returned a range from 0.0 to nan",
    GivesMany: r"solve returned a range from \[0. 0.\] to \[1. 1.\]",
}
wrong = pytest.mark.parametrize(("calibrator", "says"), WRONG.items(), ids=lambda x: getattr(x, "name", ""))


def install(monkeypatch: pytest.MonkeyPatch, kind: str, **names: str) -> None:
    """Register names of this module as a package's entry points would."""
    real = plugins.entry_points

    def found(*, group: str) -> EntryPoints:
        added = [
            EntryPoint(name=n.replace("_", "-"), value=v if ":" in v else f"{HERE}:{v}", group=group)
            for n, v in names.items()
            if group == f"quantkit.{kind}"
        ]
        return EntryPoints([*real(group=group), *added])

    monkeypatch.setattr(plugins, "entry_points", found)


def one_line(error: pytest.ExceptionInfo[QuantkitError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_plug_in_is_found_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "calibrators", half="Half")
    assert get_calibrator("half", share=0.25) == Half(share=0.25)
    assert list_calibrators()["half"] == ""


@wrong
def test_a_method_that_gives_no_range_is_named_with_its_tensor(calibrator: type[Half], says: str) -> None:
    histogram = calibrated("conv_relu").histograms["x"]
    with pytest.raises(SpecError, match=says) as caught:
        solve_range(calibrator(), histogram, QuantSpec(format=INT8), tensor="conv1")  # type: ignore[arg-type]
    text = one_line(caught)
    assert text.startswith(f"calibration method {calibrator.name}, tensor conv1: ")
    assert text.endswith("mend its plug-in, or choose another --method.")


@wrong
def test_solving_a_plan_with_such_a_method_is_refused(calibrator: type[Half], says: str) -> None:
    held = calibrated("conv_relu")
    with pytest.raises(SpecError, match=f"method {calibrator.name}, tensor r: {says}"):
        solve(
            held.graph,
            held.histograms,
            preset=get_preset("int8"),
            target=get_emitter("ort").target,
            calibrator=calibrator(),  # type: ignore[arg-type]
        )


def test_writing_another_tools_file_with_such_a_method_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, "calibrators", gives_none="GivesNone")
    tiny = MODELS["conv_relu"]
    cache = calibrate_model(tiny.build(), tiny.feeds(4))
    with pytest.raises(SpecError, match="method gives-none, tensor r: solve returned NoneType"):
        export_cache(cache, tmp_path / "t.cache", format="tensorrt", method="gives-none", model=tiny.build())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("NotOne", "is no Calibrator class: it has no solve"),
        ("NUMBER", "is of type int, no Calibrator class"),
        ("Missing", "does not load .AttributeError"),
        ("no_such_module:X", "does not load .ModuleNotFoundError"),
    ],
)
def test_what_is_no_calibrator_is_refused_and_listed_with_the_error(
    monkeypatch: pytest.MonkeyPatch, value: str, says: str
) -> None:
    install(monkeypatch, "calibrators", odd=value)
    with pytest.raises(UnknownNameError, match=f"^calibration method odd: its plug-in .*{says}") as caught:
        get_calibrator("odd")
    assert list_calibrators()["odd"] == one_line(caught)


def test_a_calibrator_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "calibrators", nameless="Nameless")
    with pytest.raises(UnknownNameError, match="its plug-in makes Nameless, no Calibrator with a name"):
        get_calibrator("nameless")


def test_an_option_that_a_plug_in_refuses_with_an_error_of_its_own_gives_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "calibrators", half="Half")
    with pytest.raises(SpecError, match="half: cannot be made with share=2") as caught:
        get_calibrator("half", share=2)
    assert "(ValueError: share: not in 0…1)" in one_line(caught)


def test_a_plug_in_with_a_built_ins_name_is_listed_as_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "calibrators", entropy="Half")
    found = list_calibrators()
    assert found["entropy"] == ""
    assert found[f"entropy ({HERE}:Half)"] == "ignored: a built-in has this name"
    assert get_calibrator("entropy").name == "entropy"


def test_formats_and_emitters_of_another_kind_are_refused_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "formats", int9="NUMBER")
    with pytest.raises(UnknownNameError, match=r"format int9: .* is of type int, no Format; mend"):
        get_format("int9")
    assert "no Format" in list_formats()["int9"]
    monkeypatch.undo()
    install(monkeypatch, "emitters", odd="NotOne", bare="Targetless", broken="RaisingEmitter")
    with pytest.raises(UnknownNameError, match=r"target odd: .* is no Emitter class: it has no emit"):
        get_emitter("odd")
    assert "no Emitter class" in list_emitters()["odd"]
    with pytest.raises(UnknownNameError, match="target bare: its plug-in makes Targetless, no Emitter"):
        get_emitter("bare")
    with pytest.raises(UnknownNameError, match=r"target broken: .*RuntimeError: no licence found"):
        get_emitter("broken")


def test_a_cache_of_a_method_that_is_gone_says_so_and_takes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "calibrators", half="Half")
    tiny = MODELS["conv_relu"]
    cache = calibrate_model(tiny.build(), tiny.feeds(2), method="half", method_options={"share": 0.25})
    assert calibrator_of(cache) == Half(share=0.25)
    monkeypatch.undo()
    with pytest.raises(
        UnknownNameError, match=r"^calibration method half: .* the cache: .*--method"
    ) as caught:
        calibrator_of(cache)
    one_line(caught)
    assert calibrator_of(cache, "minmax") == get_calibrator("minmax")
