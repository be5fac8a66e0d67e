"""Presets: how `--int8` and `--fp8` quantize weights and activations, and what a target makes of it."""

from dataclasses import dataclass

from quantkit.formats import FP8_E4M3, INT8, QuantSpec
from quantkit.plugins import Registry


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a flag of `quantkit export` stands for.

    Attributes:
        name: the flag, and part of the output file's name.
        weights: how weights are quantized, per channel; the axis is set where the weight is known.
        activations: how activations are quantized, unless the target wants it otherwise (`Target.int8_activations`).
        skips: quantize the skip branch of residual Adds.
        narrow_convolutions: quantize convolutions that are depthwise or have ≤ 16 channels in or out.
        gemm: quantize Gemm, which mostly is a network's last layer.
    """

    name: str
    weights: QuantSpec
    activations: QuantSpec
    skips: bool
    narrow_convolutions: bool
    gemm: bool


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a runtime can execute, as far as it bears on placing and solving. The emitters hold one each.

    Attributes:
        name: the `--target`.
        int8_activations: symmetric or not, signed or not.
        outputs: integer kernels want their outputs quantized too, and all readers of a tensor read the quantized one.
        integer_bias: biases are stored as int32 with scale s_x · s_w.
    """

    name: str
    int8_activations: QuantSpec
    outputs: bool
    integer_bias: bool


_PRESETS: Registry[Preset] = Registry(
    group="quantkit.presets",
    noun="preset",
    builtin={
        "int8": Preset(
            name="int8",
            weights=QuantSpec(format=INT8, axis=0),
            activations=QuantSpec(format=INT8),
            skips=True,
            narrow_convolutions=True,
            gemm=True,
        ),
        # TensorRT has no faster float8 kernel for depthwise and narrow convolutions than its float16 one, and a
        # quantized Add or last layer costs more accuracy than it saves time.
        "fp8": Preset(
            name="fp8",
            weights=QuantSpec(format=FP8_E4M3, axis=0),
            activations=QuantSpec(format=FP8_E4M3),
            skips=False,
            narrow_convolutions=False,
            gemm=False,
        ),
    },
)


def get_preset(name: str) -> Preset:
    """Return the preset registered as `name`.

    Raises:
        UnknownNameError: nobody has registered it.
    """
    return _PRESETS.get(name)


def list_presets() -> list[str]:
    """Return the names of all presets."""
    return _PRESETS.names()
