"""A product of two matrices as benchmarks see it: its shape, its format, and what any kernel needs at least."""

from dataclasses import dataclass

from quantkit.errors import UnknownNameError
from quantkit.kernels.epilogue import OUTPUT_BYTES
from quantkit.kernels.gpus import Gpu


@dataclass(frozen=True, kw_only=True)
class GemmFormat:
    """How the operands of a product are stored.

    Attributes:
        activations, weights: their element types.
        activation_bits, weight_bits: of an element, without scales.
        group: weights along K that share a scale; None where a scale is for a whole row or more.
        scale_bits: of such a scale.
        activation_scale_bits: of the scales that come with blocks of activations, for each element.
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
    activation_scale_bits: float = 0.0

    def weight_bytes(self, n: int, k: int, group: int | None = None) -> float:
        """Return the bytes of a weight [n, k] with the scales of its groups."""
        size = group or self.group
        return n * (k * self.weight_bits + (0 if size is None else -(-k // size) * self.scale_bits)) / 8


def _format(
    name: str,
    activations: str,
    weights: str,
    rate: str,
    group: int | None = None,
    scale_bits: int = 0,
    activation_scale_bits: float = 0.0,
) -> GemmFormat:
    return GemmFormat(
        name=name,
        activations=activations,
        weights=weights,
        activation_bits=_BITS[activations],
        weight_bits=_BITS[weights],
        rate=rate,
        group=group,
        scale_bits=scale_bits,
        activation_scale_bits=activation_scale_bits,
    )


_BITS = {"bf16": 16, "int8": 8, "e4m3": 8, "int4": 4, "e2m1": 4, "int2": 2}

# Named as the presets are. Four-bit floats are decoded to the activations' type: their own tensor cores, where both
# operands are such (-fp4), begin with Blackwell.
FORMATS = {
    fmt.name: fmt
    for fmt in (
        _format("int8", "int8", "int8", "int8"),
        _format("fp8", "e4m3", "e4m3", "fp8"),
        _format("fp8-block", "e4m3", "e4m3", "fp8", activation_scale_bits=0.25),
        _format("bf16", "bf16", "bf16", "bf16"),
        _format("w8a16", "bf16", "int8", "bf16"),
        _format("int4", "bf16", "int4", "bf16", group=128, scale_bits=16),
        _format("w4a8", "int8", "int4", "int8", group=128, scale_bits=8),
        _format("w4a8-fp8", "e4m3", "int4", "fp8", group=128, scale_bits=16),
        _format("int2", "bf16", "int2", "bf16", group=32, scale_bits=16),
        _format("mxfp4", "bf16", "e2m1", "bf16", group=32, scale_bits=8),
        _format("mxfp4-fp8", "e4m3", "e2m1", "fp8", group=32, scale_bits=8),
        _format("mxfp8", "e4m3", "e4m3", "fp8", group=32, scale_bits=8, activation_scale_bits=0.25),
        _format("nvfp4", "bf16", "e2m1", "bf16", group=16, scale_bits=8),
        _format("mxfp4-fp4", "e2m1", "e2m1", "fp4", group=32, scale_bits=8, activation_scale_bits=0.25),
        _format("nvfp4-fp4", "e2m1", "e2m1", "fp4", group=16, scale_bits=8, activation_scale_bits=0.5),
    )
}
_ALSO_KNOWN_AS = {"w4a16": "int4", "e4m3": "fp8", "w8a8": "int8"}


def get_gemm_format(name: str) -> GemmFormat:
    """Return the format of that name; w4a16 is another for int4.

    Raises:
        UnknownNameError: there is none.
    """
    known = _ALSO_KNOWN_AS.get(name, name)
    if known not in FORMATS:
        raise UnknownNameError(f"{name}: no format of a product; choose one of {', '.join(FORMATS)}.")
    return FORMATS[known]


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
        bits = fmt.activation_bits + fmt.activation_scale_bits
        read = self.m * self.k * bits / 8 + fmt.weight_bytes(self.n, self.k, self.group)
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
