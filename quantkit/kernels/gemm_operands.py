"""What `matmul` takes besides activations: a packed weight, and what happens to the sums."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What happens to the sums before they are stored, in the order of these fields.

    Arrays lie on the device. A factor of rows is a number or an array of one for all, or an array of one a row.

    Attributes:
        zero_point: of the activations' codes, int32; subtracted from each. Weights have none.
        row_scale: of the activations, float32.
        bias: float32, one a column.
        residual: [..., n] like D, C-contiguous: float32, float16, bfloat16, int8, or uint8 for e4m3.
        residual_scale, residual_zero_point: of an int8 or e4m3 residual, (code − zero point) · scale.
        residual_first: add the residual before the activation, not after.
        activation: relu, clip, gelu, gelu_tanh, silu, or None. Gelu and Silu are within 2^-15 of their true values.
        clip: the two limits of clip.
        output_scale, output_zero_point: D = x / scale + zero point, saturated; for outputs int8 and float8_e4m3fn.
    """

    zero_point: Any = None
    row_scale: Any = None
    bias: Any = None
    residual: Any = None
    residual_scale: float = 1.0
    residual_zero_point: int = 0
    residual_first: bool = False
    activation: str | None = None
    clip: tuple[float, float] | None = None
    output_scale: float = 1.0
    output_zero_point: int = 0


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight laid out for the kernels of `arch`.

    data: [n, pitch] on the device, rows padded with zeros to a multiple of 16 bytes. scale: float32 on the device,
    one or n of them; None stands for 1. format: int8, float8_e4m3fn, bfloat16 or float16. code_sums: int32 on the
    device, n sums over k of int8 codes, which a zero point of activations is multiplied by.
    """

    data: Any
    scale: Any
    n: int
    k: int
    format: str
    arch: str
    code_sums: Any = None
