# mypy: ignore-errors
"""A product in Triton, the peer that anyone can write in forty lines: int8, e4m3 and bf16, scales of rows and columns.

Imported only where Triton is.
"""

import torch
import triton
import triton.language as tl

_CONFIGS = [
    triton.Config({"TILE_M": m, "TILE_N": n, "TILE_K": k, "GROUP": 8}, num_stages=stages, num_warps=warps)
    for m, n, k, stages, warps in (
        (128, 256, 64, 3, 8),
        (128, 128, 128, 3, 8),
        (128, 128, 64, 4, 4),
        (64, 128, 128, 4, 4),
        (64, 64, 128, 5, 4),
        (16, 64, 256, 4, 4),
    )
]


@triton.autotune(configs=_CONFIGS, key=["m", "n", "k", "SCALED"])
@triton.jit
def _kernel(
    a, w, d, row_scale, column_scale, m, n, k,
    SCALED: tl.constexpr, INTEGER: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    along_m, along_n = tl.cdiv(m, TILE_M), tl.cdiv(n, TILE_N)
    group = program // (GROUP * along_n)
    height = min(along_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (program % (GROUP * along_n)) % height
    tile_n = (program % (GROUP * along_n)) // height
    rows = (tile_m * TILE_M + tl.arange(0, TILE_M)) % m
    columns = (tile_n * TILE_N + tl.arange(0, TILE_N)) % n
    inner = tl.arange(0, TILE_K)
    from_a = a + rows[:, None] * k + inner[None, :]
    from_w = w + columns[None, :] * k + inner[:, None]
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.int32 if INTEGER else tl.float32)
    for step in range(tl.cdiv(k, TILE_K)):
        left = k - step * TILE_K
        part_a = tl.load(from_a, mask=inner[None, :] < left, other=0.0)
        part_w = tl.load(from_w, mask=inner[:, None] < left, other=0.0)
        total = tl.dot(part_a, part_w, total, out_dtype=tl.int32 if INTEGER else tl.float32)
        from_a += TILE_K
        from_w += TILE_K
    result = total.to(tl.float32)
    if SCALED:
        result *= tl.load(row_scale + rows)[:, None] * tl.load(column_scale + columns)[None, :]
    to_rows = tile_m * TILE_M + tl.arange(0, TILE_M)
    to_columns = tile_n * TILE_N + tl.arange(0, TILE_N)
    mask = (to_rows[:, None] < m) & (to_columns[None, :] < n)
    tl.store(d + to_rows[:, None] * n + to_columns[None, :], result.to(tl.bfloat16), mask=mask)


def product(a, w, out, row_scale=None, column_scale=None):
    """Write (a[m, k] @ w[n, k].T) · row_scale · column_scale into `out`, bfloat16, and return it."""
    m, k = a.shape
    n = w.shape[0]
    scaled = row_scale is not None

    def grid(meta):
        return (triton.cdiv(m, meta["TILE_M"]) * triton.cdiv(n, meta["TILE_N"]),)

    _kernel[grid](
        a, w, out, row_scale if scaled else out, column_scale if scaled else out, m, n, k,
        SCALED=scaled, INTEGER=a.dtype == torch.int8,
    )  # fmt: skip
    return out
