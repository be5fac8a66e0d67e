"""What GPUs can do at most: the ceilings that a roofline is drawn from.

Figures of the makers' data sheets: dense products with 32-bit sums, at boost clock. They are ceilings, no promise: a
device copy on an H200 was measured at 4.3 of its 4.8 TB/s, bf16 products at 0.80 of 0.99 PFLOP/s.
"""

import re
from dataclasses import dataclass

from quantkit.errors import UnknownNameError
from quantkit.kernels.heuristics import H200 as MODEL_OF_H200
from quantkit.kernels.heuristics import Device


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as benchmarks see it.

    Attributes:
        name: h200, say. architecture: what NVRTC calls it.
        peak_tflops: by the type whose products run at that rate (bf16, fp8, int8, fp4); 10¹² operations a second, a
            product and its sum being two. A type that is missing has no tensor core there.
        dram_gb_per_s: bandwidth of its memory, 10⁹ bytes a second.
    """

    name: str
    architecture: str
    multiprocessors: int
    peak_tflops: dict[str, float]
    dram_gb_per_s: float

    def time_model(self) -> Device:
        """Return what the ranking of tiles knows of it: an H200's figures, brought to this GPU's size."""
        share = self.multiprocessors / MODEL_OF_H200.multiprocessors
        rate = self.peak_tflops.get("int8", 2 * self.peak_tflops["bf16"]) / 1979
        return Device(
            multiprocessors=self.multiprocessors,
            cycles_per_us=MODEL_OF_H200.cycles_per_us,
            macs_per_cycle=MODEL_OF_H200.macs_per_cycle * rate / share,
            dram_bytes_per_us=MODEL_OF_H200.dram_bytes_per_us * self.dram_gb_per_s / 4800,
            l2_bytes_per_us=MODEL_OF_H200.l2_bytes_per_us * share,
        )


def _gpu(name: str, architecture: str, sms: int, gb: float, **peak: float) -> Gpu:
    return Gpu(name=name, architecture=architecture, multiprocessors=sms, peak_tflops=peak, dram_gb_per_s=gb)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", "sm_80", 108, 2039, bf16=312, int8=624),
        _gpu("a10", "sm_86", 72, 600, bf16=125, int8=250),
        _gpu("l4", "sm_89", 58, 300, bf16=121, fp8=242, int8=242),
        _gpu("l40s", "sm_89", 142, 864, bf16=362, fp8=733, int8=733),
        _gpu("rtx4090", "sm_89", 128, 1008, bf16=165, fp8=330, int8=661),
        _gpu("h100", "sm_90a", 132, 3350, bf16=989, fp8=1979, int8=1979),
        _gpu("h100-pcie", "sm_90a", 114, 2000, bf16=756, fp8=1513, int8=1513),
        _gpu("h200", "sm_90a", 132, 4800, bf16=989, fp8=1979, int8=1979),
        _gpu("b200", "sm_100a", 148, 8000, bf16=2250, fp8=4500, int8=4500, fp4=9000),
        _gpu("rtx5090", "sm_120a", 170, 1792, bf16=210, fp8=419, int8=838, fp4=1676),
    )
}

# Products and sums a cycle of one multiprocessor, bf16; eight-bit types run at twice that.
_MACS_PER_CYCLE = {"sm_80": 1024, "sm_86": 512, "sm_89": 512, "sm_90a": 2048, "sm_100a": 4096, "sm_120a": 512}


def get_gpu(name: str) -> Gpu:
    """Return the GPU known as `name`, in whatever spelling: H200, "NVIDIA H200", h100_pcie.

    Raises:
        UnknownNameError: none is.
    """
    found = find_gpu(name)
    if found is None:
        raise UnknownNameError(f"{name}: no GPU known here; choose one of {', '.join(GPUS)}.")
    return found


def find_gpu(name: str) -> Gpu | None:
    """Return the GPU whose name stands in `name`, as a driver writes it ("NVIDIA H100 PCIe"), or None."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    words = words.replace("rtx-", "rtx")
    fitting = [g for g in GPUS.values() if re.search(rf"(^|-){g.name.split('-')[0]}(-|$)", words)]
    fitting = [g for g in fitting if all(part in words.split("-") for part in g.name.split("-"))]
    return max(fitting, key=lambda g: len(g.name), default=None)


def describe_gpu(
    name: str, architecture: str, *, multiprocessors: int, clock_khz: int, memory_khz: int, bus_bits: int
) -> Gpu:
    """Return the GPU of a driver's figures: the one of that name, else with ceilings computed from its clocks."""
    known = find_gpu(name)
    if known is not None and (known.architecture, known.multiprocessors) == (architecture, multiprocessors):
        return known
    macs = _MACS_PER_CYCLE.get(architecture, 512)
    bf16 = 2e-9 * macs * multiprocessors * clock_khz
    peak = {"bf16": bf16, "int8": 2 * bf16}
    if architecture not in ("sm_80", "sm_86"):
        peak["fp8"] = 2 * bf16
    return Gpu(
        name=name.removeprefix("NVIDIA ").lower(),
        architecture=architecture,
        multiprocessors=multiprocessors,
        peak_tflops=peak,
        dram_gb_per_s=2e-6 * memory_khz * bus_bits / 8,  # two transfers a cycle
    )
