"""Presets: how `--int8`, `--fp8`, `--int4` … quantize weights and activations, and what a target makes of it."""

from dataclasses import dataclass, replace
from typing import Literal

from quantkit.errors import SpecError
from quantkit.formats import E8M0, FP8_E4M3, QuantSpec
from quantkit.formats.presets import ACTIVATION_SPECS, WEIGHT_SPECS, WITH_ZERO_POINTS
from quantkit.formats.spec import ScaleRule
from quantkit.plugins import Registry


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a flag of `quantkit export` stands for.

    Attributes:
        name: the flag, and part of the output file's name.
        weights: how weights are quantized; its axis, of channels or of blocks, is set where the weight is known.
        activations: how activations are quantized, unless the target wants it otherwise (`Target.int8_activations`);
            None for a preset that leaves them in float and so needs no calibration.
        optional_activations: how they are where that is asked for (`with_activations`).
        skips: quantize the skip branch of residual Adds.
        narrow_convolutions: quantize convolutions that are depthwise or have ≤ 16 channels in or out.
        gemm: quantize Gemm, which mostly is a network's last layer.
    """

    name: str
    weights: QuantSpec
    activations: QuantSpec | None
    optional_activations: QuantSpec | None = None
    skips: bool = False
    narrow_convolutions: bool = False
    gemm: bool = True

    @property
    def in_blocks(self) -> bool:
        """Whether weights are quantized in blocks along the axis that a product contracts: of MatMul and Gemm only."""
        return self.weights.block_size is not None or self.weights.block_shape is not None

    @property
    def integer_activations(self) -> bool:
        """Whether activations become integers."""
        return self.activations is not None and self.activations.format.kind == "integer"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a runtime can execute, as far as it bears on placing and solving. The emitters hold one each.

    Attributes:
        name: the `--target`.
        int8_activations: symmetric or not, signed or not.
        outputs: integer kernels want their outputs quantized too, and all readers of a tensor read the quantized one.
        integer_bias: biases are stored as int32 with scale s_x · s_w.
        whole_blocks: the last block of a weight may not be short.
        plain_products: the kinds of weights that only an operator for x @ W has, a matrix in packed blocks
            (`is_packed_block`).
        layers_only: linear layers alone, with a matrix of their own; products of two activations stay in float.
        matrices, convolutions, embeddings: the kinds of weights (`kind_of`) that MatMul and Gemm, Conv, and Gather can
            have; None for all.
        activations: the kinds of activations that it can express; None for all. Of those that it cannot, dynamic ones
            are left in float and static ones keep their node there.
        documented_int4_blocks: the sizes of groups that its documentation has for int4; empty where it sets no limit.
    """

    name: str
    int8_activations: QuantSpec
    outputs: bool
    integer_bias: bool
    whole_blocks: bool = False
    plain_products: frozenset[str] = frozenset()
    layers_only: bool = False
    matrices: frozenset[str] | None = None
    convolutions: frozenset[str] | None = None
    embeddings: frozenset[str] | None = frozenset()
    activations: frozenset[str] | None = None
    documented_int4_blocks: frozenset[int] = frozenset()

    def activation_spec(self, preset: Preset) -> QuantSpec | None:
        """Return how this target quantizes the activations of a preset; None where they stay in float."""
        found = preset.activations
        if found is None or (found.dynamic is not None and not self.can_activate(found)):
            return None
        plain = found.format.kind == "integer" and found.format.bits == 8 and found.dynamic is None
        return self.int8_activations if plain else found

    def needs_calibration(self, preset: Preset) -> bool:
        """Tell whether it quantizes activations of a preset by what was observed of them."""
        return is_observed(self.activation_spec(preset))

    def can_activate(self, spec: QuantSpec) -> bool:
        """Tell whether it can express activations of this kind."""
        return self.activations is None or kind_of(spec) in self.activations

    def why_not(self, spec: QuantSpec, op_type: str) -> str:
        """Return why an operator's weight cannot be quantized so; "" where it can."""
        kind = kind_of(spec)
        held, what = {
            "Conv": (self.convolutions, "convolutions"),
            "ConvTranspose": (self.convolutions, "convolutions"),
            "Gather": (self.embeddings, "embeddings"),
        }.get(op_type, (self.matrices, "matrices"))
        return (
            "" if held is None or kind in held else f"{self.name} has no {what} with {_words(spec)} weights"
        )


def is_observed(spec: QuantSpec | None) -> bool:
    """Whether what was observed of a tensor bears on how it is quantized: its scale, or the scale of its scales."""
    return spec is not None and (spec.dynamic is None or spec.has_global_scale)


def is_packed_block(size: int) -> bool:
    """Whether ONNX Runtime's operators for weights in packed blocks take blocks of this size: 16, 32, 64 … (1.31)."""
    return size >= 16 and size & (size - 1) == 0


def kind_of(spec: QuantSpec) -> str:
    """Return the name of a format as targets know it, whatever its axis: "int4 block", "fp8", "nvfp4" …

    Integers with zero points end in "+zero".
    """
    fmt = spec.format
    if spec.scale_format == E8M0:
        return f"mx{fmt.name.split('_')[0]}"
    if spec.scale_format is not None:
        return f"nv{fmt.name.split('_')[0]}"
    name = "fp8" if fmt == FP8_E4M3 else fmt.name
    if spec.block_shape is not None:
        name += " tile"
    elif spec.block_size is not None:
        name += " block"
    elif spec.dynamic is not None:
        name += f" {spec.dynamic}"
    return name if spec.symmetric else f"{name}+zero"


def _words(spec: QuantSpec) -> str:
    kind = kind_of(spec)
    words = kind.removesuffix("+zero").replace(" block", " block-wise").replace(" tile", " tile-wise")
    return words + (" zero-pointed" if kind.endswith("+zero") else "")


def _preset(name: str, **options: bool) -> Preset:
    activations = ACTIVATION_SPECS.get(name)
    # Weights in blocks of few bits save memory alone; their activations are quantized where that is asked for.
    by_default = name not in ("nvfp4", "mxfp4")
    return Preset(
        name=name,
        weights=WEIGHT_SPECS[name],
        activations=activations if by_default else None,
        optional_activations=activations,
        **options,
    )


_PRESETS: Registry[Preset] = Registry(
    group="quantkit.presets",
    noun="preset",
    builtin={
        "int8": _preset("int8", skips=True, narrow_convolutions=True),
        # TensorRT has no faster float8 kernel for depthwise and narrow convolutions than its float16 one, and a
        # quantized Add or last layer costs more accuracy than it saves time.
        "fp8": _preset("fp8", gemm=False),
        "fp8-block": _preset("fp8-block"),
        "int4": _preset("int4", narrow_convolutions=True),
        "w4a8": _preset("w4a8", narrow_convolutions=True),
        "w4a8-fp8": _preset("w4a8-fp8", narrow_convolutions=True),
        "nvfp4": _preset("nvfp4"),
        "mxfp4": _preset("mxfp4"),
        "mxfp8": _preset("mxfp8"),
        "int16": _preset("int16", skips=True, narrow_convolutions=True),
        "w16a16": _preset("w16a16", skips=True, narrow_convolutions=True),
        "int2": _preset("int2"),
    },
    check=lambda loaded: (
        "" if isinstance(loaded, Preset) else f"is of type {type(loaded).__name__}, no Preset"
    ),
)


def get_preset(
    name: str,
    *,
    block_size: int | Literal["channel"] | None = None,
    symmetric: bool = True,
    scale_rule: ScaleRule | None = None,
    per_tensor: bool = False,
    activations: bool | None = None,
) -> Preset:
    """Return the preset registered as `name`.

    Args:
        name: one of `list_presets()`.
        block_size: elements that share a scale, where the preset's weights lie in blocks, or "channel" for all of a
            channel's; None for its own choice.
        symmetric: False for integer weights with zero points.
        scale_rule: which power of two the scales of MX formats are; None for "rceil".
        per_tensor: one scale for each whole weight.
        activations: False leaves activations in float, True quantizes them where the preset does so only when asked.

    Raises:
        UnknownNameError: nobody has registered it.
        SpecError: the preset does not have what is asked for.
    """
    preset = _PRESETS.get(name)
    weights = preset.weights
    fixed = weights.block_shape is not None or weights.scale_format is not None
    if block_size is not None:
        if weights.block_size is None or fixed:
            raise SpecError(f"preset {name}: its weights have no groups to choose; leave the group size out.")
        weights = replace(weights, block_size=None if block_size == "channel" else block_size)
    if per_tensor:
        if fixed or weights.block_size is not None:
            raise SpecError(f"preset {name}: its weights lie in blocks; leave per-tensor out.")
        weights = replace(weights, axis=None)
    if scale_rule is not None:
        if weights.scale_format != E8M0:
            raise SpecError(
                f"preset {name}: its scales are no powers of two; leave the scale rule out, or choose mxfp4 or mxfp8."
            )
        weights = replace(weights, scale_rule=scale_rule)
    if not symmetric:
        unsigned = WITH_ZERO_POINTS.get(weights.format.name)
        if unsigned is None or fixed:
            raise SpecError(
                f"preset {name}: its weights have no zero points; leave them out, or choose int4 or int2."
            )
        weights = replace(weights, format=unsigned, symmetric=False)
    preset = replace(preset, weights=weights)
    if activations is None:
        return preset
    if not activations:
        return replace(preset, activations=None, skips=False)
    if preset.optional_activations is None and preset.activations is None:
        raise SpecError(
            f"preset {name}: it quantizes weights alone; choose w4a8, w4a8-fp8, nvfp4 or another with activations."
        )
    return replace(preset, activations=preset.activations or preset.optional_activations)


def list_presets() -> list[str]:
    """Return the names of all presets."""
    return _PRESETS.names()
