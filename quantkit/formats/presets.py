"""The number formats that go by a name of their own, as values of `QuantSpec`."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from quantkit.errors import SpecError, UnknownNameError
from quantkit.formats.format import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    INT2,
    INT4,
    INT8,
    INT16,
    UINT2,
    UINT4,
    UINT16,
    Format,
)
from quantkit.formats.spec import QuantSpec, ScaleRule

# Weights, with 0 in place of an axis that `weight_spec` fills in: that of the blocks or that of the channels.
WEIGHT_SPECS: Mapping[str, QuantSpec] = MappingProxyType(
    {
        "int8": QuantSpec(format=INT8, axis=0),
        "int16": QuantSpec(format=INT8, axis=0),
        "w16a16": QuantSpec(format=INT16, axis=0),
        "fp8": QuantSpec(format=FP8_E4M3, axis=0),
        "fp8-block": QuantSpec(format=FP8_E4M3, block_shape=(128, 128)),
        "int4": QuantSpec(format=INT4, axis=0, block_size=128),
        "w4a8": QuantSpec(format=INT4, axis=0, block_size=128),
        "w4a8-fp8": QuantSpec(format=INT4, axis=0, block_size=128),
        "int2": QuantSpec(format=INT2, axis=0, block_size=32),
        "nvfp4": QuantSpec(format=FP4_E2M1, axis=0, block_size=16, scale_format=FP8_E4M3),
        "mxfp4": QuantSpec(format=FP4_E2M1, axis=0, block_size=32, scale_format=E8M0),
        "mxfp8": QuantSpec(format=FP8_E4M3, axis=0, block_size=32, scale_format=E8M0),
    }
)

# Activations, of the presets that can quantize them; blocks run along the last axis, which is K of a MatMul.
ACTIVATION_SPECS: Mapping[str, QuantSpec] = MappingProxyType(
    {
        "int8": QuantSpec(format=INT8),
        "int16": QuantSpec(format=UINT16, symmetric=False),
        "w16a16": QuantSpec(format=INT16),
        "fp8": QuantSpec(format=FP8_E4M3),
        "fp8-block": QuantSpec(format=FP8_E4M3, axis=-1, block_size=128, dynamic="block"),
        "w4a8": QuantSpec(format=INT8),
        "w4a8-fp8": QuantSpec(format=FP8_E4M3),
        "nvfp4": QuantSpec(format=FP4_E2M1, axis=-1, block_size=16, scale_format=FP8_E4M3, dynamic="block"),
        "mxfp4": QuantSpec(format=FP4_E2M1, axis=-1, block_size=32, scale_format=E8M0, dynamic="block"),
        "mxfp8": QuantSpec(format=FP8_E4M3, axis=-1, block_size=32, scale_format=E8M0, dynamic="block"),
    }
)

# What an integer becomes when its zero points are free: 0 … 15 is what runtimes store beside 4-bit zero points.
WITH_ZERO_POINTS: Mapping[str, Format] = MappingProxyType({"int4": UINT4, "int2": UINT2})


def weight_spec(
    name: str,
    *,
    channel_axis: int,
    contraction_axis: int,
    block_size: int | Literal["channel"] | None = None,
    symmetric: bool = True,
    scale_rule: ScaleRule | None = None,
    per_tensor: bool = False,
) -> QuantSpec:
    """Return how the preset `name` quantizes a weight.

    Args:
        name: one of `WEIGHT_SPECS`.
        channel_axis: the axis of the output channels: 1 of a MatMul's [K, N].
        contraction_axis: the axis that products are summed along: 0 of a MatMul's [K, N].
        block_size: elements that share a scale, "channel" for all of a channel's; None for the preset's own.
        symmetric: False for integers with zero points; 4 and 2 bits are unsigned then.
        scale_rule: which power of two an E8M0 scale is; None for the preset's own, "rceil".
        per_tensor: one scale for the whole weight.

    Raises:
        UnknownNameError: no such preset.
        SpecError: the preset does not have what is asked for.
    """
    spec = _named(name, WEIGHT_SPECS, "weights")
    own_blocks = spec.block_shape is not None or spec.scale_format is not None
    if (block_size is not None or per_tensor) and own_blocks:
        asked = "per_tensor" if per_tensor else f"block_size {block_size}"
        raise SpecError(f"{name}: {asked} asked for, but its blocks are part of the format; leave it out.")
    if scale_rule is not None:
        if spec.scale_format != E8M0:
            raise SpecError(
                f"{name}: scale_rule {scale_rule} asked for, but its scales are floats; leave it out."
            )
        spec = replace(spec, scale_rule=scale_rule)
    if not symmetric:
        spec = replace(spec, format=WITH_ZERO_POINTS.get(spec.format.name, spec.format), symmetric=False)
    if spec.block_shape is not None:
        return spec
    if per_tensor:
        return replace(spec, axis=None, block_size=None)
    if block_size is not None:
        spec = replace(spec, block_size=None if block_size == "channel" else block_size)
    return replace(spec, axis=channel_axis if spec.block_size is None else contraction_axis)


def activation_spec(name: str) -> QuantSpec | None:
    """Return how the preset `name` quantizes activations where that is wanted; None where it has no way to.

    Raises:
        UnknownNameError: no such preset.
    """
    _named(name, WEIGHT_SPECS, "weights")
    return ACTIVATION_SPECS.get(name)


def _named(name: str, table: Mapping[str, QuantSpec], what: str) -> QuantSpec:
    if name not in table:
        raise UnknownNameError(f"preset {name}: no such format for {what}; choose one of {', '.join(table)}.")
    return table[name]
