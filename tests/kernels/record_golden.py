"""Record what a GPU's matrix instructions return for real-valued operands: `python -m tests.kernels.record_golden OUT`.

Each case is one chain of instructions, K after K, on 64 x 8 (wgmma) or 16 x 8 (mma.sync) outputs: operands, and
accumulators before and after, bit for bit. The emulator's model of rounding is held to these files.
"""

import sys
from pathlib import Path

import numpy as np

from .backends import gpu
from .emulator.test_wgmma import run_wgmma
from .layouts import DTYPES, a_fragment, b_fragment, d_index, depth, wgmma_d_index

SOURCE = Path(__file__).parent / "emulator" / "instructions.cu"
N, KEPT = 32, 8


def operands(rng: np.random.Generator, shape: tuple[int, ...], type_name: str, spread: float) -> np.ndarray:
    """Normal values times powers of two of the given spread: 0 is what layers hold, more tests alignment."""
    values = rng.standard_normal(shape) * np.exp2(rng.uniform(-spread, spread, shape))
    return np.clip(values, -400, 400).astype(DTYPES[type_name])


def cases() -> list[tuple[str, str, float, float, int]]:
    """(type, instruction, spread of the operands, size of the accumulator, steps)."""
    types = [t for t in DTYPES if t != "S8"]
    shapes = [
        (0.0, 0.0, 1),
        (0.0, 8.0, 1),
        (4.0, 0.0, 1),
        (4.0, 100.0, 1),
        (2.0, 3.0, 4),
        (4.0, 1e4, 4),
        (6.0, 1e-3, 2),
    ]
    return [(t, kind, s, c, n) for t in types for kind in ("wgmma", "mma") for s, c, n in shapes]


def run_case(machine, type_name, kind, a, b, c, steps) -> np.ndarray:
    """The accumulators [M, N] after the chain."""
    if kind == "wgmma":
        d = run_wgmma(machine, type_name, a, b, c, b.shape[0], 32 * steps if steps > 1 else 32, steps=steps)
        out = np.zeros((64, b.shape[0]), np.float32)
        out[wgmma_d_index(b.shape[0])] = d
        return out
    d, k = c[d_index()].astype(np.float32), depth(type_name)
    for s in range(steps):
        part = slice(s * k, s * k + k)
        fragments = a_fragment(a[:, part]), b_fragment(b[:, part])
        machine.launch(SOURCE, "mma_once", *fragments, d, defines={"TYPE": type_name}, grid=1, block=32)
    out = np.zeros((16, 8), np.float32)
    out[d_index()] = d
    return out


def record(folder: Path) -> None:
    machine = gpu()
    if machine is None:
        raise SystemExit("no GPU with CuPy and NVRTC here")
    arrays: dict[str, np.ndarray] = {}
    for number, (type_name, kind, spread, size, steps) in enumerate(cases()):
        rng = np.random.default_rng(number)
        rows, columns = (64, N) if kind == "wgmma" else (16, 8)
        k = depth(type_name) * steps
        a, b = operands(rng, (rows, k), type_name, spread), operands(rng, (columns, k), type_name, spread)
        c = (rng.standard_normal((rows, columns)) * size).astype(np.float32)
        d = run_case(machine, type_name, kind, a, b, c, steps)
        b, c, d = b[:KEPT], c[:, :KEPT], d[:, :KEPT]  # columns do not know of each other
        name = f"{type_name}-{kind}-{steps}-{number}"
        arrays |= {
            f"{name}/a": a.view(np.uint8),
            f"{name}/b": b.view(np.uint8),
            f"{name}/c": c,
            f"{name}/d": d,
        }
    np.savez_compressed(folder / f"sm_{machine.arch[0]}{machine.arch[1]}.npz", **arrays)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
