"""How long a launch takes: contenders in turns, each a CUDA graph of one call, on a cold and clean L2.

Before each launch 256 MB are written and another 256 MB read, so that L2 holds none of its operands and nothing that
must be written back; the order is drawn, so that clocks and temperature favour nobody; what is told is the median
with its quartiles. A rest after each launch shows what a kernel does at full clock: without it large products run
into the board's power limit, and so does every contender.
"""

import importlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quantkit.kernels import device as gpu
from quantkit.kernels.compile import compile_kernel

SOURCE = Path(__file__).parent / "cuda" / "timing.cu"
_FLUSHED_BYTES = 256 << 20
# Longer than a host just woken takes to enqueue what is timed: some 150 µs.
_HOLD_CYCLES = 300_000


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Microseconds of one call: the median of `runs`, and the quartiles around it."""

    median_us: float
    q1_us: float
    q3_us: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A call to time, and whose stream and memory it runs on: "cupy", or "torch" for all that allocates by torch."""

    run: Callable[[], Any]
    framework: str = "cupy"


class Stopwatch(Protocol):
    """A GPU's clock; tests bring one of their own."""

    def capture(self, contender: Contender) -> Callable[[], None]:
        """Run the call once, and return what replays it as a graph."""

    def cold(self) -> None:
        """Leave nothing in the caches, and hold the GPU until what follows is enqueued."""

    def mark(self) -> Any:
        """Record a moment on the stream."""

    def elapsed_us(self, start: Any, end: Any) -> float:
        """Return the time between two moments."""

    def wait(self) -> None:
        """Wait until all that was enqueued is done."""

    def release(self) -> None:
        """Give back the memory of what was timed before."""


def time_in_turns(
    contenders: Mapping[str, Contender],
    *,
    repeats: int = 25,
    pause_s: float = 0.002,
    seed: int = 0,
    stopwatch: Stopwatch | None = None,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Return the timing of each contender, and why those that cannot run refused, in one line.

    repeats: launches of each. pause_s: rest after each, 0 for none.
    """
    watch = stopwatch or GpuStopwatch()
    replays, refused = {}, {}
    for name, contender in contenders.items():
        try:
            replays[name] = watch.capture(contender)
        except Exception as error:
            # Libraries refuse a shape with whatever exception they like; it is told, and the others run.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            refused[name] = lines[0][:160]
    order = [name for name in replays for _ in range(repeats)]
    random.Random(seed).shuffle(order)
    moments: dict[str, list[tuple[Any, Any]]] = {name: [] for name in replays}
    for name in order:
        watch.cold()
        start = watch.mark()
        replays[name]()
        moments[name].append((start, watch.mark()))
        if pause_s:
            watch.wait()
            time.sleep(pause_s)
    watch.wait()
    found = {name: _timing([watch.elapsed_us(*pair) for pair in pairs]) for name, pairs in moments.items()}
    return found, refused


def _timing(times: list[float]) -> Timing:
    times = sorted(times)
    quarter = len(times) // 4
    return Timing(
        median_us=statistics.median(times), q1_us=times[quarter], q3_us=times[-1 - quarter], runs=len(times)
    )


class GpuStopwatch:
    """The clock of the current GPU, on a stream of its own."""

    def __init__(self) -> None:
        cupy = gpu.cupy()
        self._cupy = cupy
        built = compile_kernel(SOURCE, arch=gpu.architecture(int(cupy.cuda.Device().id)))
        module = cupy.RawModule(path=str(built.cubin))
        self._read, self._hold = module.get_function("read_through"), module.get_function("hold")
        self._written = cupy.cuda.alloc(_FLUSHED_BYTES)
        self._other = cupy.cuda.alloc(_FLUSHED_BYTES)
        self._sink = cupy.cuda.alloc(8)
        self._other.memset(1, _FLUSHED_BYTES)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()

    def capture(self, contender: Contender) -> Callable[[], None]:
        """Run the call once, so that it is compiled and loaded, and return what replays it as a graph."""
        # Operands were uploaded on other streams.
        self._cupy.cuda.Device().synchronize()
        if contender.framework == "torch":
            return self._capture_by_torch(contender.run)
        with self._stream:
            contender.run()
            self._stream.synchronize()
            self._stream.begin_capture()
            try:
                contender.run()
            finally:
                graph = self._stream.end_capture()
            graph.upload(self._stream)
        # The call holds its operands: they must live as long as the graph.
        return lambda run=contender.run: graph.launch(self._stream)  # type: ignore[misc]

    def _capture_by_torch(self, run: Callable[[], Any]) -> Callable[[], None]:
        """Captured by torch itself, so that what the call allocates stays the graph's."""
        torch = importlib.import_module("torch")
        stream = torch.cuda.ExternalStream(self._stream.ptr)
        with torch.cuda.stream(stream):
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run()

        def replay() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return replay

    def cold(self) -> None:
        """Write and read other memory, so that L2 is full of it and clean; then hold the GPU."""
        self._written.memset_async(0, _FLUSHED_BYTES, self._stream)
        with self._stream:
            self._read(
                (1056,),
                (256,),
                (
                    np.uint64(self._other.ptr),
                    np.uint64(_FLUSHED_BYTES // 16),
                    np.uint64(self._sink.ptr),
                ),
            )
            self._hold((1,), (1,), (np.int64(_HOLD_CYCLES),))

    def mark(self) -> Any:
        """Record an event."""
        event = self._cupy.cuda.Event()
        event.record(self._stream)
        return event

    def elapsed_us(self, start: Any, end: Any) -> float:
        """Return the time between two events."""
        return float(self._cupy.cuda.get_elapsed_time(start, end)) * 1e3

    def wait(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def release(self) -> None:
        """Give freed memory back to the driver: CuPy and torch each keep what they have, and starve each other."""
        self._cupy.get_default_memory_pool().free_all_blocks()
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.cuda.empty_cache()
