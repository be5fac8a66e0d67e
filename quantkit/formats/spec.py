"""How one tensor is quantized."""

from dataclasses import dataclass
from typing import Literal, get_args

from quantkit.errors import SpecError
from quantkit.formats.format import E8M0, Format

ScaleRule = Literal["ocp", "rceil", "even"]


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a tensor is quantized; the presets of this toolkit are values of it.

    Attributes:
        format: the element type of the codes.
        axis: None for one scale per tensor; else the axis that has a scale per index (per channel), or, with
            `block_size`, the axis that is cut into blocks.
        block_size: elements along `axis` that share a scale; None when not blocked. The last block may be short.
        block_shape: rows and columns of the last two axes that share a scale, instead of `axis` and `block_size`.
            The last tiles may be short.
        symmetric: zero is the middle code and the zero point is fixed; else the range's ends are free.
        scale_format: the element type the scales themselves are stored in; None for the tensor's own float type.
            A float type brings a float32 `global_scale` along (NVFP4); E8M0 does without (MX).
        scale_rule: which power of two an E8M0 scale is; see `power_of_two_scale`. Without meaning for other scales.
        dynamic: when the scale is computed as the model runs: per whole "tensor", per "token" (a scale for every
            row of the last axis) or per "block".
    """

    format: Format
    axis: int | None = None
    block_size: int | None = None
    block_shape: tuple[int, int] | None = None
    symmetric: bool = True
    scale_format: Format | None = None
    scale_rule: ScaleRule = "rceil"
    dynamic: Literal["tensor", "token", "block"] | None = None

    def __post_init__(self) -> None:
        name = self.format.name
        if self.format.min > 0:
            raise SpecError(f"{name}: has no zero, so it can only be a scale_format; choose another format.")
        if self.block_size is not None and (self.axis is None or self.block_size < 1):
            raise SpecError(
                f"{name}: block_size {self.block_size} without a fitting axis; give block_size ≥ 1 together with axis."
            )
        if self.block_shape is not None and (
            self.axis is not None or self.block_size is not None or min(self.block_shape) < 1
        ):
            raise SpecError(
                f"{name}: block_shape {self.block_shape} cuts the last two axes by itself; "
                "give sides ≥ 1 and neither axis nor block_size."
            )
        if not self.symmetric and self.format.kind == "float":
            raise SpecError(f"{name}: float formats have no zero point; use symmetric=True.")
        self._check_scales(name)
        self._check_dynamic(name)

    def _check_scales(self, name: str) -> None:
        if self.scale_rule not in get_args(ScaleRule):
            raise SpecError(
                f"{name}: no scale rule {self.scale_rule}; choose one of {', '.join(get_args(ScaleRule))}."
            )
        if self.scale_format is None:
            return
        if self.scale_format.kind != "float":
            raise SpecError(
                f"{name}: {self.scale_format.name} cannot hold scales; choose a float format or e8m0."
            )
        if not self.symmetric:
            raise SpecError(
                f"{name}: scales in {self.scale_format.name} have no zero points; use symmetric=True."
            )

    def _check_dynamic(self, name: str) -> None:
        in_blocks = self.block_size is not None or self.block_shape is not None
        if self.dynamic == "block" and not in_blocks:
            raise SpecError(f"{name}: dynamic per block without blocks; give axis and block_size.")
        if self.dynamic in ("tensor", "token") and (self.axis is not None or in_blocks):
            raise SpecError(f"{name}: dynamic per {self.dynamic} has no axis and no blocks; leave them None.")

    @property
    def has_global_scale(self) -> bool:
        """Whether the scales are codes of a float format, in units of a float32 `global_scale`."""
        return self.scale_format is not None and self.scale_format != E8M0

    def __str__(self) -> str:
        words = [self.format.name]
        if self.block_size is not None:
            words.append(f"block {self.block_size}")
        elif self.block_shape is not None:
            words.append(f"block {self.block_shape[0]}×{self.block_shape[1]}")
        elif self.axis is not None:
            words.append("per channel")
        if self.scale_format is not None:
            rule = f" ({self.scale_rule})" if self.scale_format == E8M0 else ""
            words.append(f"{self.scale_format.name} scales{rule}")
        if not self.symmetric:
            words.append("asymmetric")
        if self.dynamic is not None:
            words.append(f"dynamic per {self.dynamic}")
        return ", ".join(words)
