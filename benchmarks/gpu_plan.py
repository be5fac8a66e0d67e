"""All that a GPU is asked in `gpu_run.py --all`, as small jobs, the most important first.

check        every kernel in every format against its oracle, never-run kernels first; graphs, streams, quantization
four_bits    weights of four bits beside cuBLAS in bf16, at the shapes that goals are set for
table        int8, fp8 and bf16 beside cuBLAS and cuBLASLt
blocks       block-scaled fp8 beside cuBLASLt's
statistics   calibration's reductions, bit for bit NumPy's, and beside a copy; Gram matrices
golden       what matrix instructions return, for the emulator to be held to
tune         the best-modelled configurations where goals are set; the tables above once more with what it found
sustained, layers, formats   the rest of the tables: without rest, of well-known networks, beside every peer
sanitized    small products under compute-sanitizer
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu_checks import MATRICES, QUANTIZED, check_cases, compared, quantized, side_by_side
from gpu_times import compare, facts, formats_table, tune
from supervised import Job

from quantkit.bench.cases import cases_of_shapes
from quantkit.bench.measuring import compile_ahead
from quantkit.kernels import gram, quantize_launch, statistics_launch, timing
from quantkit.kernels.build import Job as Build
from quantkit.kernels.build import build_all
from quantkit.kernels.compile import DEFAULT_CACHE, nvrtc_version
from quantkit.kernels.families import FAMILIES, family_of
from quantkit.kernels.gpus import Gpu, get_gpu
from quantkit.kernels.present import present_gpu
from quantkit.kernels.quantize_launch import QuantizeKind

TABLE = [
    (8192, 8192, 8192),
    (4096, 4096, 4096),
    (4096, 7168, 16384),
    (1024, 8192, 8192),
    (256, 8192, 8192),
    (64, 8192, 8192),
    (16, 8192, 8192),
    (1, 8192, 8192),
]
# Where the weight's bytes are the cost: formats of few bits are held against the others on these.
STREAMED = [(m, n, 8192) for n in (8192, 28672) for m in (1, 16, 64, 256, 1024, 4096)]
LAYERS = {
    "llama3_8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "llama3_70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "vit_b": [(2304, 768), (768, 768), (3072, 768), (768, 3072)],
    "resnet50": [(64, 576), (256, 64), (128, 1152), (512, 1024), (256, 2304), (2048, 512), (1000, 2048)],
}
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
FORMATS = sorted({form for family in FAMILIES for form in family.formats})
BLOCKS = [
    ("fp8-block", TABLE[2]),
    ("fp8-block", TABLE[0]),
    ("fp8-block", (64, 8192, 8192)),
    ("mxfp8", TABLE[1]),
]
FOUR_BITS = ("int4", "nvfp4", "mxfp4", "w4a8", "w4a8-fp8", "mxfp4-fp8")
# What is tuned, the farthest from its goal first.
TUNED = [
    *(((m, 28672, 8192), form) for m in (16, 1, 64) for form in FOUR_BITS),
    *(((m, 8192, 8192), form) for m in (16, 1, 256) for form in ("int4", "w4a8")),
    *((shape, form) for form in ("int8", "fp8") for shape in TABLE),
    *((shape, form) for form, shape in BLOCKS),
]  # fmt: skip
_BY = "nvrtc-version"
_CONFIGURATIONS = 2  # of a format that are checked on each ragged shape
_ROOT = Path(__file__).resolve().parent.parent


def jobs(*, repeats: int, pause_s: float, depth: int, tuned: Path, only: str | None = None) -> Iterator[Job]:
    """Yield all jobs in their order; of the parts `only`, where it names some."""
    asked = None if only is None else {"facts", *only.split(",")}
    for job in _all(repeats, pause_s, depth, tuned):
        if asked is None or job.part in asked:
            yield job


def _all(repeats: int, pause_s: float, depth: int, tuned: Path) -> Iterator[Job]:
    here = present_gpu()
    yield Job(part="facts", name="facts", run=facts)
    yield from _checks(here)
    tables = partial(_tables, repeats=repeats, pause_s=pause_s)
    yield from tables("")
    yield from _statistics(repeats, pause_s)
    yield Job(part="golden", name="golden", run=partial(golden, tuned.parent), needs_s=15, limit_s=120)
    for shape, form in TUNED:
        yield Job(
            part="tune", name=f"{_words(shape)} {form}", needs_s=8, limit_s=180,
            run=partial(tune, [shape], [form], depth, max(9, repeats // 2), pause_s, tuned),
        )  # fmt: skip
    yield from tables("_tuned")
    for shape in TABLE:
        yield Job(part="sustained", name=_words(shape), run=partial(compare, [shape], repeats, 0.0))
    for name, sizes in LAYERS.items():
        for n, k in sizes:
            for m in ROWS:
                shape = m, n, k
                yield Job(
                    part=f"layers_{name}", name=_words(shape), run=partial(compare, [shape], repeats, pause_s)
                )
    for shape in dict.fromkeys([*TABLE, *STREAMED]):
        for form in FORMATS:
            run = partial(formats_table, [shape], [form], repeats, pause_s * 1e3)
            yield Job(part="formats", name=f"{_words(shape)} {form}", run=run, needs_s=8, limit_s=180)
    for tool in ("memcheck", "racecheck"):
        yield Job(part="sanitized", name=tool, run=partial(sanitized, tool), needs_s=60, limit_s=300)


def _words(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


def _checks(here: Gpu) -> Iterator[Job]:
    """Kernels that ran on no GPU yet come first: a wrong one spares the time that its figures would take."""
    known = {"gemm_sm90", "gemm_mma"}
    for family in sorted(FAMILIES, key=lambda family: family.name in known):
        if here.architecture not in family.architectures:
            continue
        for form in sorted(family.formats):
            run = partial(_check_family, family.name, form)
            yield Job(part="check", name=f"{family.name} {form}", run=run, needs_s=4, limit_s=120)
    yield Job(part="check", name="quantize", run=quantized, needs_s=4, limit_s=120)
    yield Job(part="check", name="side by side", run=side_by_side)


def _check_family(name: str, form: str) -> dict[str, Any]:
    here = present_gpu()
    cases = list(check_cases(_CONFIGURATIONS, here, (name, form)))
    compile_ahead(cases, here)
    return compared(cases)


def _tables(suffix: str, *, repeats: int, pause_s: float) -> Iterator[Job]:
    """The figures that goals are set for."""
    for number, shape in enumerate(sorted(STREAMED, key=lambda shape: (shape[0], -shape[1]))):
        run = partial(_four_bits, shape, repeats, pause_s)
        # What was tuned is asked for once a process, and remembered.
        fresh = bool(suffix) and number == 0
        yield Job(part=f"four_bits{suffix}", name=_words(shape), run=run, needs_s=3, fresh=fresh)
    for shape in TABLE:
        yield Job(part=f"table{suffix}", name=_words(shape), run=partial(compare, [shape], repeats, pause_s))
    for form, shape in BLOCKS:
        run = partial(formats_table, [shape], [form], repeats, pause_s * 1e3)
        yield Job(part=f"blocks{suffix}", name=f"{_words(shape)} {form}", run=run, needs_s=6, limit_s=120)


def _four_bits(shape: tuple[int, int, int], repeats: int, pause_s: float) -> list[dict[str, Any]]:
    import w4_run

    return w4_run.compare(w4_run.Timer(pause_s), [(*shape, form) for form in w4_run.FORMS], repeats)


def _statistics(repeats: int, pause_s: float) -> Iterator[Job]:
    import statistics_run as run

    def told(checks: Callable[[], Any]) -> dict[str, Any]:
        found = list(checks())
        return {"cases": len(found), "wrong": [f"{what}: {why}" for what, why in found if why]}

    for cube in run.CHECKED:
        checks = partial(run.reduced_exactly, [cube])
        yield Job(part="statistics", name=_words(cube[0]), run=partial(told, checks), needs_s=4, limit_s=120)
    yield Job(part="statistics", name="gram", run=partial(told, run.grams_agree), needs_s=10, limit_s=120)
    for timed in run.TIMED:
        times = partial(run.time_statistics, repeats, pause_s, cubes=[timed])
        yield Job(part="statistics_times", name=timed[0], run=times, needs_s=3)
    yield Job(part="gram_times", name="gram", run=partial(run.time_grams, repeats, pause_s), needs_s=5)
    yield Job(part="statistics", name="from ONNX Runtime", run=partial(told, run.fetched_exactly), needs_s=5)
    yield Job(part="statistics", name="calibrated", run=partial(told, run.calibrated_alike), needs_s=10)


def golden(folder: Path) -> dict[str, Any]:
    """Record what matrix instructions return, and compare it with what the emulator is held to."""
    import numpy as np

    from tests.kernels.record_golden import record

    with tempfile.TemporaryDirectory() as made:
        record(Path(made))
        (path,) = Path(made).glob("*.npz")
        known = _ROOT / "tests" / "kernels" / "data" / path.name
        found: dict[str, Any] = {"file": path.name, "bytes": path.stat().st_size}
        if known.exists():
            new, old = np.load(path), np.load(known)
            shared = sorted(set(new) & set(old))
            found |= {
                "arrays": len(shared),
                "differ": [k for k in shared if new[k].tobytes() != old[k].tobytes()],
            }
        shutil.copy(path, folder / path.name)
    return found


def sanitized(tool: str) -> dict[str, Any]:
    """Run small products of every kernel under compute-sanitizer."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        raise FileNotFoundError("compute-sanitizer is not on the PATH")
    paths = [str(Path(__file__).resolve().parent), str(_ROOT)]
    code = f"import sys; sys.path[:0] = {paths}; import gpu_plan; gpu_plan.small_products()"
    command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("=========")]
    return {"exit": ran.returncode, "lines": lines[-10:]}


def small_products() -> None:
    """Check one configuration of every kernel and format on the smallest shapes."""
    here = present_gpu()
    for family in FAMILIES:
        for form in sorted(family.formats):
            compared([case for case in check_cases(1, here, (family.name, form)) if case[1].m < 64])


# ---- compiling ahead ---------------------------------------------------------------------------------------------


def builds(here: Gpu, *, depth: int, only: str | None = None) -> list[Build]:
    """Return what the jobs compile, in their order, but for the golden vectors."""
    asked = None if only is None else set(only.split(","))
    found: dict[Build, None] = {}

    def add(source: Path, defines: dict[str, Any]) -> None:
        found[Build(source=source, arch=here.architecture, defines=tuple(sorted(defines.items())))] = None

    def products(shapes: list[tuple[int, int, int]], formats: list[str], count: int) -> None:
        for case in cases_of_shapes(shapes, formats).cases:
            family = family_of(case.work, here)
            if family is None:
                continue
            chosen = [
                family.predict(case.work, here).configuration,
                *list(family.ranked(case.work, here))[:count],
            ]
            for configuration in dict.fromkeys(chosen):
                source, defines = family.source(case.work, configuration, here)
                add(source, dict(defines))

    def wants(*parts: str) -> bool:
        return asked is None or bool(asked & set(parts))

    add(timing.SOURCE, {})
    if wants("check"):
        for family in FAMILIES:
            for form in sorted(family.formats):
                for _, work, configuration in check_cases(_CONFIGURATIONS, here, (family.name, form)):
                    source, defines = family.source(work, configuration, here)
                    add(source, dict(defines))
        for rows, columns in MATRICES:
            for spec, _ in QUANTIZED:
                kind = QuantizeKind(x_type="float32", spec=spec)
                launch = quantize_launch.launch_of(kind, rows, columns, vector=columns % 8 == 0)
                add(quantize_launch.SOURCE, launch.defines)
    if wants("four_bits", "table", "blocks"):
        products(STREAMED, list(FOUR_BITS), 0)
        products(TABLE, ["int8", "fp8", "bf16"], 0)
        for form, shape in BLOCKS:
            products([shape], [form], 0)
    if wants("statistics", "statistics_times", "gram_times"):
        import statistics_run as run

        cubes = [*run.CHECKED, *((cube, channels) for _, cube, channels in run.TIMED)]
        for cube, channels in cubes:
            for dtype in run.TYPES:
                launched = statistics_launch.launch_of(
                    cube, dtype, channels=channels, multiprocessors=here.multiprocessors
                )
                add(statistics_launch.SOURCE, launched.defines)
        for dtype in ("float16", "bfloat16"):
            add(gram.SOURCE, gram.gram_launch(4096, dtype).defines)
    if wants("tune"):
        for shape, form in TUNED:
            products([shape], [form], depth)
    if wants("layers", "sustained", "formats"):
        products(
            [(m, n, k) for sizes in LAYERS.values() for n, k in sizes for m in ROWS],
            ["int8", "fp8", "bf16"],
            0,
        )
        products(list(dict.fromkeys([*TABLE, *STREAMED])), FORMATS, 0)
    return list(found)


def prebuild(folder: Path, gpu: str, *, depth: int, only: str | None = None) -> str:
    """Compile what the jobs will ask for into a folder that travels to the GPU; return what was done, in words."""
    wanted = builds(get_gpu(gpu), depth=depth, only=only)
    build_all(
        wanted, cache=folder, on_built=lambda done, count: print(f"\r{done} of {count}", end="", flush=True)
    )
    (folder / _BY).write_text(_version())
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"\n{folder}: {len(wanted)} kernels, {size / 1e6:.1f} MB, by NVRTC {_version()}"


def carry(folder: Path) -> str:
    """Copy what `prebuild` made into this user's cache; return how much of it will be found, in words."""
    DEFAULT_CACHE.mkdir(parents=True, exist_ok=True)
    cubins = sorted(folder.glob("*.cubin"))
    for cubin in cubins:
        for path in (cubin.with_suffix(".log"), cubin):
            if path.exists() and not (DEFAULT_CACHE / path.name).exists():
                temporary = DEFAULT_CACHE / f"{path.name}.{os.getpid()}"
                shutil.copy(path, temporary)
                temporary.replace(DEFAULT_CACHE / path.name)
    by = (folder / _BY).read_text() if (folder / _BY).exists() else "an unknown version"
    note = (
        ""
        if by == _version()
        else f"; made by NVRTC {by}, and here is {_version()}: all are compiled once more"
    )
    return f"{folder}: {len(cubins)} cubins{note}"


def _version() -> str:
    return ".".join(map(str, nvrtc_version()))
