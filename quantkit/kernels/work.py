"""A product of two matrices as benchmarks see it: its shape, its format, and what any kernel needs at least."""

from dataclasses import dataclass

from quantkit.errors import UnknownNameError
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.heuristics import OUTPUT_BYTES


@dataclass(frozen=True, kw_only=True)
class GemmFormat:
    """How the operands of a product are stored.

    Attributes:
        activations, weights: their element types.
        activation_bits, weight_bits: of an element, without scales.
        group: weights along K that share a scale; None where a scale is for a whole row or more.
        scale_bits: of such a scale.
        rate: whose tensor-core rate the products run at.
    """

    name: str
    activations: str
    weights: str
    activation_bits: int
    weight_bits: int
    rate: str
    group: int | None = None
    scale_bits: int = 0

    def weight_bytes(self, n: int, k: int, group: int | None = None) -> float:
        """Return the bytes of a weight [n, k] with the scales of its groups."""
        size = group or self.group
        return n * (k * self.weight_bits + (0 if size is None else -(-k // size) * self.scale_bits)) / 8


FORMATS = {
    f.name: f
    for f in (
        GemmFormat(
            name="int8", activations="int8", weights="int8", activation_bits=8, weight_bits=8, rate="int8"
        ),
        GemmFormat(
            name="fp8", activations="e4m3", weights="e4m3", activation_bits=8, weight_bits=8, rate="fp8"
        ),
        GemmFormat(
            name="bf16", activations="bf16", weights="bf16", activation_bits=16, weight_bits=16, rate="bf16"
        ),
        GemmFormat(
            name="w8a16", activations="bf16", weights="int8", activation_bits=16, weight_bits=8, rate="bf16"
        ),
        GemmFormat(
            name="w4a16", activations="bf16", weights="int4", activation_bits=16, weight_bits=4, rate="bf16",
            group=128, scale_bits=16,
        ),
        GemmFormat(
            name="w4a8", activations="int8", weights="int4", activation_bits=8, weight_bits=4, rate="int8",
            group=128, scale_bits=8,
        ),
        GemmFormat(
            name="mxfp4", activations="e4m3", weights="e2m1", activation_bits=8, weight_bits=4, rate="fp8",
            group=32, scale_bits=8,
        ),
        GemmFormat(
            name="nvfp4", activations="bf16", weights="e2m1", activation_bits=16, weight_bits=4, rate="bf16",
            group=16, scale_bits=8,
        ),
    )
}  # fmt: skip


def get_gemm_format(name: str) -> GemmFormat:
    """Return the format of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in FORMATS:
        raise UnknownNameError(f"{name}: no format of a product; choose one of {', '.join(FORMATS)}.")
    return FORMATS[name]


@dataclass(frozen=True, kw_only=True)
class Work:
    """D[m, n] = A[m, k] @ W[n, k].T, of the format, into `output` (bfloat16 …).

    bias, relu: what its epilogue does besides the scales. group: instead of the format's own.
    """

    m: int
    n: int
    k: int
    format: str
    output: str = "bfloat16"
    bias: bool = False
    relu: bool = False
    group: int | None = None

    @property
    def operations(self) -> int:
        """Products and sums."""
        return 2 * self.m * self.n * self.k

    @property
    def size_bytes(self) -> float:
        """Bytes that must move at least: each operand read once, D written once."""
        fmt = FORMATS[self.format]
        read = self.m * self.k * fmt.activation_bits / 8 + fmt.weight_bytes(self.n, self.k, self.group)
        return read + self.m * self.n * OUTPUT_BYTES[self.output]

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.size_bytes

    def roofline(self, gpu: Gpu) -> tuple[float, str]:
        """Return the least time in microseconds that `gpu` allows, and what bounds it: memory, or compute.

        A type without a tensor core there runs at bf16's rate.
        """
        rate = gpu.peak_tflops.get(FORMATS[self.format].rate, gpu.peak_tflops["bf16"])
        compute, memory = self.operations / rate * 1e-6, self.size_bytes / gpu.dram_gb_per_s * 1e-3
        return max(compute, memory), "compute" if compute >= memory else "memory"
