"""A family and a GPU's clock that need no GPU: NumPy computes, and time passes as the configuration says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from quantkit.kernels.family import Family, Operands, Prediction
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.timing import Contender, Timing
from quantkit.kernels.work import Work


class FakeClock:
    """Time that contenders move on themselves."""

    def __init__(self) -> None:
        self.now = 0.0

    def capture(self, contender: Contender) -> Callable[[], None]:
        contender.run()
        return contender.run

    def cold(self) -> None:
        self.now += 100.0

    def mark(self) -> float:
        return self.now

    def elapsed_us(self, start: float, end: float) -> float:
        return end - start

    def release(self) -> None:
        pass

    def wait(self) -> None:
        pass


class FakeFamily(Family):
    """Configurations are the microseconds that they take; a negative one is refused, "wrong" damages D."""

    name = "fake"
    formats = frozenset({"int8", "fp8", "bf16"})
    architectures = ("sm_90a",)

    def __init__(self, clock: FakeClock, times_us: Sequence[float], *, wrong: bool = False) -> None:
        self.clock, self.times_us, self.wrong = clock, list(times_us), wrong
        self.remembered: dict[Any, Timing] = {}

    def predict(self, work: Work, gpu: Gpu) -> Prediction:
        return Prediction(kernel=self.name, configuration=self.times_us[0], words="tile", time_us=9.0)

    def ranked(self, work: Work, gpu: Gpu) -> Sequence[Any]:
        return self.times_us

    def prepare(self, work: Work, operands: Operands, configuration: Any = None) -> Callable[[], Any]:
        d = np.resize(self.reference(work, operands), (work.m, work.n))
        if self.wrong:
            d[0, 0] += 1

        def run() -> Any:
            if configuration < 0:
                raise RuntimeError("out of registers")
            self.clock.now += configuration
            return d

        return run

    def remember(self, work: Work, gpu: Gpu, timed: Mapping[Any, Timing]) -> None:
        self.remembered = dict(timed)
