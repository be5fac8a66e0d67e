"""The NumPy oracle of gemm_blocks_sm90.cu: block products, promoted one after the other."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.reference import finish_reference

Floats = NDArray[np.float32]


def blocks_reference(
    a: NDArray[Any], a_scale: Floats, w: NDArray[Any], w_scale: Floats, *, block: int, **epilogue: Any
) -> NDArray[np.generic]:
    """Return D[m, n] of e4m3 codes a[m, k], w[n, k] and what `finish_reference` makes of the sums.

    sum = fma(a[:, b] @ w[:, b].T, a_scale[:, b] · w_scale[:, b], sum) for b = 0, 1, …: a block's products are summed
    exactly and rounded to float32 once, the two scales' product likewise; the multiply-add rounds once.

    Args:
        a: codes [m, k]. w: codes [n, k].
        a_scale: float32 [m, blocks]. w_scale: [n, blocks], or [⌈n / 128⌉, blocks] of 128 × 128 blocks.
        block: elements of K in a block.
        epilogue: as `finish_reference` takes it.
    """
    m, k = a.shape
    n = len(w)
    if len(w_scale) != n:
        w_scale = np.repeat(w_scale, 128, axis=0)[:n]
    sums = np.zeros((m, n), np.float32)
    # Products of e4m3 are multiples of 2^-18 up to 2^17.6: float64 holds a block's sum exactly.
    wide_a, wide_w = a.astype(np.float64), w.astype(np.float64)
    for b in range(-(-k // block)):
        part = slice(b * block, (b + 1) * block)
        product = (wide_a[:, part] @ wide_w[:, part].T).astype(np.float32)
        with np.errstate(under="ignore", over="ignore"):
            scale = a_scale[:, b, None] * w_scale[None, :, b]
        sums = fused_multiply_add(product, scale, sums)
    return finish_reference(sums, **epilogue)


def fused_multiply_add(x: Floats, y: Floats, z: Floats) -> Floats:
    """Return x · y + z, rounded to float32 once."""
    product = x.astype(np.float64) * y  # exact: 24 bits by 24
    addend = z.astype(np.float64)
    total = product + addend
    # What that addition lost (Knuth). Where it lost something an odd last bit keeps the second rounding from a tie that
    # is none.
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    even = (total.view(np.int64) & 1) == 0
    odd = np.where((lost != 0) & even, np.nextafter(total, np.copysign(np.inf, lost)), total)
    with np.errstate(over="ignore", under="ignore"):
        rounded: Floats = odd.astype(np.float32)
    return rounded
