"""Running products on the GPU that is here: the kernel and its peers in turns, and D against the oracle."""

import platform
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.bench.cases import Case
from quantkit.bench.cropping import taken
from quantkit.bench.peers import facts_of_peers, peers_of
from quantkit.bench.row import relative_error
from quantkit.errors import KernelError
from quantkit.kernels import device
from quantkit.kernels.build import Job, build_all
from quantkit.kernels.compile import nvrtc_version
from quantkit.kernels.family import Family, Operands, Prediction
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.timing import Contender, GpuStopwatch, Stopwatch, time_in_turns

OURS = "ours"
# Of D, what is compared with the oracle: rows from the start, columns from all over.
_ROWS, _COLUMNS = 64, 1024

Run = Callable[[Case, Family, Prediction], dict[str, Any]]


def compile_ahead(chosen: Sequence[tuple[Family, Any, Any]], gpu: Gpu) -> None:
    """Compile what (family, work, configuration) need, one a processor, so that nobody waits for it in turn."""
    jobs = []
    for family, work, configuration in chosen:
        source, defines = family.source(work, configuration, gpu)
        jobs.append(Job(source=source, arch=gpu.architecture, defines=tuple(sorted(defines.items()))))
    build_all(jobs)


def measured(
    gpu: Gpu, *, peers: bool, repeats: int, pause_s: float, stopwatch: Stopwatch | None = None
) -> Run:
    """Return what times one case: the fields of its row."""
    watch = stopwatch or GpuStopwatch()

    def run(case: Case, family: Family, prediction: Prediction) -> dict[str, Any]:
        watch.release()
        work, operands = case.work, case.operands()
        try:
            call = family.prepare(work, operands, prediction.configuration)
            error, checked = compared(call(), family, case, operands)
        except MemoryError as failure:
            raise KernelError(
                f"{work.m}x{work.n}x{work.k} {work.format}: does not fit into the GPU's memory; give a smaller --batch."
            ) from failure
        except RuntimeError as failure:
            # CuPy's errors of CUDA: a fault of the kernel, and what runs after it can tell nothing.
            raise KernelError(
                f"{family.name} {prediction.words}: fails on {work.m}x{work.n}x{work.k} {work.format} "
                f"({str(failure).splitlines()[0]}); report this."
            ) from failure
        contenders = {OURS: Contender(run=call)}
        refused: dict[str, str] = {}
        if peers:
            found, refused = peers_of(case.work, operands)
            contenders |= found
        times, stopped = time_in_turns(
            contenders, repeats=repeats, pause_s=pause_s, seed=case.work.m, stopwatch=watch
        )
        return {
            "timing": times.pop(OURS, None),
            "peers": times,
            "refused": refused | stopped,
            "error": error,
            "checked": checked,
            "origin": operands.origin,
        }

    return run


def compared(d: Any, family: Family, case: Case, operands: Operands) -> tuple[float, str]:
    """Return the error of a part of D against the family's oracle, and which part it is."""
    rows = min(case.work.m, _ROWS, len(operands.activations))
    columns = np.unique(np.linspace(0, case.work.n - 1, min(case.work.n, _COLUMNS)).astype(np.int64))
    got = as_numpy(d[:rows], case.work.output)[:, columns]
    part = taken(operands, slice(rows), columns, slice(None))
    want = family.reference(case.work, part)
    return relative_error(got, want), f"{rows} × {columns.size} of {case.work.m} × {case.work.n}"


def as_numpy(d: Any, output: str) -> NDArray[Any]:
    """Return a device array as NumPy's, bfloat16 that travels as uint16 under its own name."""
    array: NDArray[Any] = d if isinstance(d, np.ndarray) else device.cupy().asnumpy(d)
    return array.view(ml_dtypes.bfloat16) if output == "bfloat16" else array


def facts() -> dict[str, Any]:
    """Return what measured times depend on besides the code."""
    cupy = device.cupy()
    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(int(cupy.cuda.Device().id))["name"]
    return {
        "device": name.decode() if isinstance(name, bytes) else str(name),
        "driver_cuda": int(runtime.driverGetVersion()),
        "nvrtc": ".".join(map(str, nvrtc_version())),
        "cupy": str(cupy.__version__),
        "python": platform.python_version(),
        **facts_of_peers(),
    }
