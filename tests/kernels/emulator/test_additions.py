from pathlib import Path

import numpy as np
import pytest

from quantkit.kernels.emulator import EmulatorError, Mode, load

SOURCE = Path(__file__).parent / "additions.cu"


def test_additions_of_many_threads_to_one_word_all_count(machine):
    values = np.random.default_rng(0).integers(0, 7, 1000).astype(np.uint32)
    counts = np.zeros(64, np.uint32)
    machine.launch(
        SOURCE,
        "count_values",
        values,
        counts,
        np.int32(1000),
        np.int32(64),
        grid=1,
        block=128,
        shared_bytes=256,
    )
    want = np.bincount(values, minlength=64)
    want[values[0]] += 1
    np.testing.assert_array_equal(counts, want)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("name", ["read_too_early", "not_published", "added_while_read"])
def test_an_addition_is_a_write_to_those_who_do_not_add(compiler, name, mode):
    with pytest.raises(EmulatorError) as caught:
        load(SOURCE, name).launch(np.zeros(64, np.uint32), grid=1, block=64, shared_bytes=16, mode=mode)
    assert caught.value.kind == "race"


def test_nan_loses_every_comparison_and_a_magnitude_has_no_sign(machine):
    special = np.array([0, 1, -2, np.inf, -np.inf, np.nan, 2**-149, -(2**-140)], np.float32)
    a, b = (x.reshape(-1).copy() for x in np.meshgrid(special, special))
    out = np.empty((3, a.size), np.float32)
    machine.launch(SOURCE, "compare", a, b, out, np.int32(a.size), grid=1, block=32)
    np.testing.assert_array_equal(out, [np.fmin(a, b), np.fmax(a, b), np.abs(a)])
