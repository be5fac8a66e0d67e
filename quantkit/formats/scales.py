"""Scales that are stored in few bits: powers of two for MX, 8-bit floats under a global scale for NVFP4."""

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import SpecError
from quantkit.formats.format import E8M0, Format
from quantkit.formats.spec import QuantSpec, ScaleRule

# GPUs flush subnormal numbers to zero, and a zero scale divides by zero.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
# Exponents that E8M0 has codes for.
_LEAST_EXPONENT, _GREATEST_EXPONENT = -127, 127


def power_of_two_scale(amax: NDArray[np.float64], fmt: Format, rule: ScaleRule) -> NDArray[np.float32]:
    """Return the E8M0 scale of blocks with these absolute maxima, as float32 of the shape of `amax`.

    With max the format's largest value (6 for E2M1, 448 for E4M3) and emax = floor(log2(max)):

    - "ocp": 2^(floor(log2(amax)) − emax), as OCP Microscaling Formats v1.0, section 6.3. An amax between max and
      2^(emax+1) times the scale saturates.
    - "rceil": 2^ceil(log2(amax / max)), the least power of two that saturates nothing (PTX `cvt.rp.ue8m0x2`).
    - "even": as "ocp", of amax rounded half to even to the format's own mantissa, so that only what would round
      past max takes the next power.

    Exponents stop at −127 and 127. A block that is zero altogether has the scale 1, as everywhere here.
    """
    mantissa, exponent = np.frexp(amax)
    max_mantissa, max_exponent = np.frexp(fmt.symmetric_max)
    # amax = mantissa · 2^exponent with mantissa in [½, 1): comparing mantissas is exact where log2 would not be.
    power = exponent - int(max_exponent)
    if rule == "rceil":
        power = power + (mantissa > max_mantissa)
    elif rule == "even":
        power = power + (mantissa >= 1 - 2.0 ** -(mantissa_bits(fmt) + 2))
    power = np.where(amax == 0, 0, np.clip(power, _LEAST_EXPONENT, _GREATEST_EXPONENT))
    return np.ldexp(np.float32(1), power.astype(np.int32))


def mantissa_bits(fmt: Format) -> int:
    """Bits of precision after the leading one: 3 for E4M3, 1 for E2M1, 6 for int8 taken as 1.6 fixed point."""
    if fmt.kind == "integer":
        return fmt.bits - 2
    values = fmt.magnitudes()
    return int(np.count_nonzero((values >= 1) & (values < 2))).bit_length() - 1


def global_scale_of(amax: NDArray[np.float64], spec: QuantSpec) -> NDArray[np.float32]:
    """Return the float32 scale under which the largest block's own scale is the largest code, shape ().

    s = max(amax) / (max · scale_max): amax / (6 · 448) for NVFP4. A tensor that is zero altogether has 1.
    """
    assert spec.scale_format is not None
    largest = float(amax.max(initial=0.0))
    if largest == 0:
        return np.asarray(1, np.float32)
    ratio = largest / (spec.format.symmetric_max * spec.scale_format.max)
    return np.asarray(max(ratio, SMALLEST_SCALE), np.float32)


def block_scales(
    amax: NDArray[np.float64], global_scale: NDArray[np.float32], spec: QuantSpec
) -> NDArray[np.float32]:
    """Return the codes of `spec.scale_format`, as float32, nearest to amax / (max · global_scale).

    A block's scale stops at the format's least code: 2⁻⁹ for E4M3, as in NVIDIA's Model Optimizer. torchao stops
    at its least normal number, 2⁻⁶; but the subnormal codes are decoded exactly by every runtime, and without
    them blocks 10⁻⁵ as large as the tensor's largest value lose up to three more bits. A block that is zero
    altogether has the scale 1.
    """
    held = spec.scale_format
    assert held is not None and held != E8M0
    least = float(held.magnitudes()[1])
    ratio = amax / (spec.format.symmetric_max * float(global_scale))
    ratio = np.where(amax == 0, 1.0, np.clip(ratio, least, held.max))
    # By way of float32, as kernels hold it (and ml_dtypes goes that way, too).
    return ratio.astype(np.float32).astype(held.dtype).astype(np.float32)


def float_scales(ratio: NDArray[np.float64], dtype: np.dtype, steps: float) -> NDArray[np.float32]:
    """Return `ratio` as `dtype` holds it, such that `steps` of it fall short of the range by half a step at most.

    Raises:
        SpecError: `dtype` cannot hold it.
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = ratio.astype(dtype)
        stored = rounded.astype(np.float32)
        short = (ratio - stored) * steps > stored / 2
        if np.any(short & (stored > 0)):
            above = np.nextafter(rounded, dtype.type(np.inf)).astype(np.float32)
            stored = np.where(short & (stored > 0), above, stored)
    if not np.all(np.isfinite(stored)) or not np.all(stored > 0):
        raise SpecError(
            f"scale: {ratio.min():.3g} … {ratio.max():.3g} does not fit {dtype.name}; keep this tensor in float."
        )
    return stored
