"""What cuda/include/epilogue.h is compiled for and what it is given: macros, and the arguments in their order."""

from dataclasses import dataclass

import numpy as np

from quantkit.errors import KernelError

# Element types of D and of the residual, and their macros.
OUTPUTS = {
    "int32": "OUTPUT_S32",
    "float32": "OUTPUT_F32",
    "bfloat16": "OUTPUT_BF16",
    "float16": "OUTPUT_F16",
    "int8": "OUTPUT_S8",
    "float8_e4m3fn": "OUTPUT_E4M3",
}
OUTPUT_BYTES = {"int32": 4, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}
FACTORS = {"none": "SCALE_NONE", "one": "SCALE_ONE", "each": "SCALE_EACH"}
ACTIVATIONS = {
    "none": "ACTIVATION_NONE",
    "relu": "ACTIVATION_RELU",
    "clip": "ACTIVATION_CLIP",
    "gelu": "ACTIVATION_GELU",
    "gelu_tanh": "ACTIVATION_GELU_TANH",
    "silu": "ACTIVATION_SILU",
}
RESIDUALS = {"none": "RESIDUAL_NONE", "before": "RESIDUAL_BEFORE", "after": "RESIDUAL_AFTER"}

# struct Numbers of epilogue.h.
_NUMBERS = np.dtype(
    [
        (name, np.float32)
        for name in (
            "low",
            "high",
            "scale",
            "reciprocal",
            "zero_point",
            "residual_scale",
            "residual_zero_point",
        )
    ]
)
# Within these a reciprocal is a normal float, and a quotient's correction exact.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-100, 2.0**100


@dataclass(frozen=True, kw_only=True)
class EpilogueKind:
    """What the epilogue is compiled for.

    row_scale, column_scale, zero_point: none, one (for all), each (a vector). activation: one of ACTIVATIONS.
    residual: none, before or after the activation; residual_type: its element type, one of OUTPUTS.
    output_zero_point: the int8 output has one other than 0.
    """

    row_scale: str = "none"
    column_scale: str = "none"
    zero_point: str = "none"
    bias: bool = False
    activation: str = "none"
    residual: str = "none"
    residual_type: str = "bfloat16"
    output_zero_point: bool = False

    def defines(self, output: str) -> dict[str, str | int]:
        """Return the macros of epilogue.h for results of type `output`."""
        return {
            "OUTPUT": OUTPUTS[output],
            "ROW_SCALE": FACTORS[self.row_scale],
            "COLUMN_SCALE": FACTORS[self.column_scale],
            "ZERO_POINT": FACTORS[self.zero_point],
            "BIAS": int(self.bias),
            "ACTIVATION": ACTIVATIONS[self.activation],
            "RESIDUAL": RESIDUALS[self.residual],
            "RESIDUAL_TYPE": OUTPUTS[self.residual_type],
            "OUTPUT_ZERO_POINT": int(self.output_zero_point),
        }


@dataclass(frozen=True, kw_only=True)
class EpilogueValues:
    """The numbers that a kernel gets by value.

    low, high: of Clip. scale, zero_point: of an int8 or e4m3 output. residual_scale, residual_zero_point: of an int8
    or e4m3 residual.
    """

    low: float = 0.0
    high: float = 0.0
    scale: float = 1.0
    zero_point: int = 0
    residual_scale: float = 1.0
    residual_zero_point: int = 0

    def __post_init__(self) -> None:
        if not SMALLEST_SCALE <= self.scale <= LARGEST_SCALE:
            raise KernelError(f"output scale {self.scale}: outside of 2^-100 … 2^100; choose another.")

    def packed(self) -> np.void:
        """Return struct Numbers, to pass by value."""
        scale = np.float32(self.scale)
        fields = (
            self.low,
            self.high,
            scale,
            np.float32(1) / scale,
            self.zero_point,
            self.residual_scale,
            self.residual_zero_point,
        )
        # Opaque bytes, the form of a structure that both CuPy and the emulator pass by value.
        by_value: np.void = np.array([fields], _NUMBERS).view(f"V{_NUMBERS.itemsize}")[0]
        return by_value
