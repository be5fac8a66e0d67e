"""How one tensor is quantized."""

from dataclasses import dataclass
from typing import Literal

from quantkit.errors import SpecError
from quantkit.formats.format import Format


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a tensor is quantized; the presets of this toolkit are values of it.

    Attributes:
        format: the element type of the codes.
        axis: None for one scale per tensor; else the axis that has a scale per index (per channel), or, with
            `block_size`, the axis that is cut into blocks.
        block_size: elements along `axis` that share a scale; None when not blocked.
        symmetric: zero is the middle code and the zero point is fixed; else the range's ends are free.
        scale_format: the element type the scales themselves are stored in; None for the tensor's own float type.
        dynamic: when the scale is computed as the model runs: per whole "tensor", per "token" (row) or per "block".
    """

    format: Format
    axis: int | None = None
    block_size: int | None = None
    symmetric: bool = True
    scale_format: Format | None = None
    dynamic: Literal["tensor", "token", "block"] | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None and (self.axis is None or self.block_size < 1):
            raise SpecError(
                f"{self.format.name}: block_size {self.block_size} without a fitting axis; "
                "give block_size ≥ 1 together with axis."
            )
        if not self.symmetric and self.format.kind == "float":
            raise SpecError(f"{self.format.name}: float formats have no zero point; use symmetric=True.")

    def __str__(self) -> str:
        words = [self.format.name]
        if self.block_size is not None:
            words.append(f"block {self.block_size}")
        elif self.axis is not None:
            words.append("per channel")
        if not self.symmetric:
            words.append("asymmetric")
        if self.dynamic is not None:
            words.append(f"dynamic per {self.dynamic}")
        return ", ".join(words)
