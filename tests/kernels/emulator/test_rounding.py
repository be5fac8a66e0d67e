"""The emulator's matrix instructions round as an H200's do: bit for bit against what one returned."""

from pathlib import Path

import numpy as np
import pytest

from quantkit.kernels.emulator import Mode

from ..backends import EmulatorBackend
from ..layouts import DTYPES
from ..record_golden import run_case

GOLDEN = np.load(Path(__file__).parent.parent / "data" / "sm_90.npz")
CASES = sorted({key.rpartition("/")[0] for key in GOLDEN.files})


@pytest.mark.parametrize("case", CASES)
def test_real_valued_products_round_as_an_h200_does(compiler, case):
    type_name, kind, steps, _ = case.split("-")
    a, b = (GOLDEN[f"{case}/{name}"].view(DTYPES[type_name]) for name in "ab")
    d = run_case(EmulatorBackend(Mode.EAGER), type_name, kind, a, b, GOLDEN[f"{case}/c"], int(steps))
    np.testing.assert_array_equal(d.view(np.uint32), GOLDEN[f"{case}/d"].view(np.uint32))


def test_fp8_wgmma_loses_what_lies_thirteen_bits_below_the_largest_product(compiler):
    """2^14 x 1 beside 1 x 1: the small one is cut off, though float32 would hold both."""
    import ml_dtypes

    a, b = np.zeros((64, 32), ml_dtypes.float8_e4m3fn), np.zeros((8, 32), ml_dtypes.float8_e4m3fn)
    a[:, 0], b[:, 0], a[:, 1], b[:, 1] = 128, 128, 1, 1
    c = np.zeros((64, 8), np.float32)
    machine = EmulatorBackend(Mode.EAGER)
    assert (run_case(machine, "E4M3", "wgmma", a, b, c, 1) == 2.0**14).all()
    assert (run_case(machine, "E4M3", "mma", a[:16], b, c[:16], 1) == 2.0**14 + 1).all()
