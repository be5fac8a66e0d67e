"""What a number becomes in few bits, in float operators that ONNX Runtime has: equal bit for bit to `quantkit.formats`.

Float32 in, float32 out: the value that the code stands for. NaN stays NaN.
"""

import numpy as np
import onnx_ir as ir

from quantkit.decode.arithmetic import Arithmetic
from quantkit.formats import FP4_E2M1, FP8_E4M3, FP8_E5M2, Format

# 2^-160 … 2^160: more than float32 amax over any format's maximum can reach.
_EXPONENT = 160
_POWERS = 2.0 ** np.arange(-_EXPONENT, _EXPONENT + 1)
_LEAST_E8M0, _GREATEST_E8M0 = 2.0**-127, 2.0**127
# Its exponent of the least normal number, and the bits of its mantissa.
_E4M3_LEAST_NORMAL, _E4M3_MANTISSA = 2.0**-6, 3


def round_to(a: Arithmetic, value: ir.Value, fmt: Format) -> ir.Value:
    """Round to a float format: half to even, saturating."""
    clipped = a.op("Clip", value, a.floats(fmt.min), a.floats(fmt.max))
    if fmt == FP4_E2M1:
        # Within an octave values are evenly spaced: 0.5 below 2 (subnormals too), 1 below 4, 2 up to 6.
        size = a.op("Abs", clipped)
        above = a.op("Where", a.op("Less", size, a.floats(4)), a.floats(1), a.floats(2))
        step = a.op("Where", a.op("Less", size, a.floats(2)), a.floats(0.5), above)
        return a.op("Mul", a.op("Round", a.op("Div", clipped, step)), step)
    assert fmt in (FP8_E4M3, FP8_E5M2)
    code = a.cast(clipped, ir.DataType.from_numpy(fmt.dtype))
    return a.op("Cast", code, to=int(ir.DataType.FLOAT))


def block_amax(a: Arithmetic, blocks: ir.Value, axis: int) -> ir.Value:
    """The absolute maximum along an axis, which stays with length 1; float64, so that what follows is exact."""
    return a.op("Cast", a.reduce_max(a.op("Abs", blocks), axis), to=int(ir.DataType.DOUBLE))


def e4m3_scale(a: Arithmetic, amax: ir.Value, global_scale: ir.Value, fmt: Format) -> ir.Value:
    """The value of the E4M3 code nearest to amax / (max · global_scale), as `block_scales` has it; float32.

    Args:
        a: where to write.
        amax: float64.
        global_scale: float32, of one element.
        fmt: what the codes under this scale are.
    """
    unit = a.op("Mul", a.op("Cast", global_scale, to=int(ir.DataType.DOUBLE)), a.doubles(fmt.max))
    least = float(FP8_E4M3.magnitudes()[1])
    ratio = a.op("Clip", a.op("Div", amax, unit), a.doubles(least), a.doubles(FP8_E4M3.max))
    # Rounded to float32 first, as there; what follows is exact in float64.
    ratio = a.op("Cast", a.op("Cast", ratio, to=int(ir.DataType.FLOAT)), to=int(ir.DataType.DOUBLE))
    octave = a.op("Max", _floor_power_of_two(a, ratio), a.doubles(_E4M3_LEAST_NORMAL))
    step = a.op("Mul", octave, a.doubles(2.0**-_E4M3_MANTISSA))
    return _or_one(a, amax, a.op("Mul", a.op("Round", a.op("Div", ratio, step)), step))


def e8m0_scale(a: Arithmetic, amax: ir.Value, fmt: Format) -> ir.Value:
    """The least power of two that saturates nothing, `power_of_two_scale` by the rule "rceil"; float32.

    That is what the conversion instruction of the GPU does (PTX `cvt.rp.ue8m0x2`). `amax` is float64.
    """
    # Exact where it matters: of a float32 over 448, none that is no power of two rounds to one.
    ratio = a.op("Div", amax, a.doubles(fmt.max))
    below = _floor_power_of_two(a, ratio)
    power = a.op("Where", a.op("Greater", ratio, below), a.op("Add", below, below), below)
    return _or_one(a, amax, a.op("Clip", power, a.doubles(_LEAST_E8M0), a.doubles(_GREATEST_E8M0)))


def e8m0_value(a: Arithmetic, exponent: ir.Value) -> ir.Value:
    """The scale that a byte stands for, 2^(byte − 127), read from a table; float32."""
    table = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
    # 255 is its NaN.
    table[255] = np.nan
    return a.op("Gather", a.constant(table), a.op("Cast", exponent, to=int(ir.DataType.INT32)))


def _floor_power_of_two(a: Arithmetic, value: ir.Value) -> ir.Value:
    """2^floor(log2(value)) of float64 above 0. The logarithm only says where in a table to look, give or take one."""
    guess = a.op("Floor", a.op("Mul", a.op("Log", value), a.doubles(1 / np.log(2))))
    shift, end = (a.constant(np.asarray(n, np.int64)) for n in (_EXPONENT, 2 * _EXPONENT))
    index = a.op("Add", a.op("Cast", guess, to=int(ir.DataType.INT64)), shift)
    place = a.op("Clip", index, a.constant(np.asarray(0, np.int64)), end)
    power = a.op("Gather", a.constant(_POWERS), place)
    twice, half = a.op("Mul", power, a.doubles(2)), a.op("Mul", power, a.doubles(0.5))
    lowered = a.op("Where", a.op("Less", value, power), half, power)
    return a.op("Where", a.op("GreaterOrEqual", value, twice), twice, lowered)


def _or_one(a: Arithmetic, amax: ir.Value, scale: ir.Value) -> ir.Value:
    """The scale in float32, 1 where the block is zero altogether."""
    found = a.op("Where", a.op("Equal", amax, a.doubles(0)), a.doubles(1), scale)
    return a.typed(a.op("Cast", found, to=int(ir.DataType.FLOAT)), ir.DataType.FLOAT)
