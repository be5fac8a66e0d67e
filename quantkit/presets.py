"""Presets: how `--int8`, `--fp8`, `--int4` … quantize weights and activations, and what a target makes of it."""

from dataclasses import dataclass, replace

from quantkit.errors import SpecError
from quantkit.formats import FP8_E4M3, INT8, QuantSpec
from quantkit.formats.presets import WEIGHT_SPECS
from quantkit.plugins import Registry


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a flag of `quantkit export` stands for.

    Attributes:
        name: the flag, and part of the output file's name.
        weights: how weights are quantized; its axis, of channels or of blocks, is set where the weight is known.
        activations: how activations are quantized, unless the target wants it otherwise (`Target.int8_activations`);
            None for a preset that leaves them in float and so needs no calibration.
        skips: quantize the skip branch of residual Adds.
        narrow_convolutions: quantize convolutions that are depthwise or have ≤ 16 channels in or out.
        gemm: quantize Gemm, which mostly is a network's last layer.
    """

    name: str
    weights: QuantSpec
    activations: QuantSpec | None
    skips: bool
    narrow_convolutions: bool
    gemm: bool

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
    """

    name: str
    int8_activations: QuantSpec
    outputs: bool
    integer_bias: bool
    whole_blocks: bool = False


_PRESETS: Registry[Preset] = Registry(
    group="quantkit.presets",
    noun="preset",
    builtin={
        "int8": Preset(
            name="int8",
            weights=WEIGHT_SPECS["int8"],
            activations=QuantSpec(format=INT8),
            skips=True,
            narrow_convolutions=True,
            gemm=True,
        ),
        # TensorRT has no faster float8 kernel for depthwise and narrow convolutions than its float16 one, and a
        # quantized Add or last layer costs more accuracy than it saves time.
        "fp8": Preset(
            name="fp8",
            weights=WEIGHT_SPECS["fp8"],
            activations=QuantSpec(format=FP8_E4M3),
            skips=False,
            narrow_convolutions=False,
            gemm=False,
        ),
        "int4": Preset(
            name="int4",
            weights=WEIGHT_SPECS["int4"],
            activations=None,
            skips=False,
            narrow_convolutions=False,
            gemm=True,
        ),
    },
    check=lambda loaded: (
        "" if isinstance(loaded, Preset) else f"is of type {type(loaded).__name__}, no Preset"
    ),
)


def get_preset(name: str, *, block_size: int | None = None) -> Preset:
    """Return the preset registered as `name`.

    Args:
        name: int8, fp8, int4, or a plug-in's.
        block_size: elements that share a scale, where the preset's weights lie in blocks; None for its own choice.

    Raises:
        UnknownNameError: nobody has registered it.
        SpecError: its weights do not lie in blocks of a size that can be chosen.
    """
    preset = _PRESETS.get(name)
    if block_size is None:
        return preset
    if preset.weights.block_size is None or preset.weights.scale_format is not None:
        raise SpecError(f"preset {name}: its weights have no groups to choose; leave the group size out.")
    return replace(preset, weights=replace(preset.weights, block_size=block_size))


def list_presets() -> list[str]:
    """Return the names of all presets."""
    return _PRESETS.names()
