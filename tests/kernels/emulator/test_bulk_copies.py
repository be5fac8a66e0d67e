"""TMA loads, stores and reductions, multicast, and flat bulk copies, against NumPy slices."""

from pathlib import Path

import numpy as np
import pytest

from quantkit.kernels.emulator import Swizzle, TensorMap

from ..layouts import swizzled

SOURCE = Path(__file__).with_name("instructions.cu")
SPANS = {Swizzle.NONE: 0, Swizzle.BYTES_32: 32, Swizzle.BYTES_64: 64, Swizzle.BYTES_128: 128}


def box_of(array: np.ndarray, start: tuple[int, ...], box: tuple[int, ...], fill: int = 0) -> np.ndarray:
    """The box of `array` at `start` (outermost first), `fill` where it reaches out."""
    padded = np.full(box, fill, array.dtype)
    inner = tuple(slice(max(0, s), min(n, s + b)) for s, n, b in zip(start, array.shape, box, strict=True))
    to = tuple(slice(i.start - s, max(i.stop, i.start) - s) for i, s in zip(inner, start, strict=True))
    if all(i.stop > i.start for i in inner):
        padded[to] = array[inner]
    return padded


def image_of(box: np.ndarray, swizzle: Swizzle) -> np.ndarray:
    """The box as bytes in shared memory."""
    data = np.ascontiguousarray(box).view(np.uint8).reshape(-1)
    image = np.zeros_like(data)
    image[swizzled(np.arange(data.size), SPANS[swizzle])] = data
    return image


def coordinates(start: tuple[int, ...]) -> list[np.int32]:
    """Innermost first, padded to the kernels' five."""
    return [np.int32(c) for c in (*reversed(start), 0, 0, 0, 0, 0)][:5]


def load(machine, tensor_map: TensorMap, start: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(tensor_map.box)) * tensor_map.array.itemsize
    out = np.zeros(-(-size // 16) * 16, np.uint8)
    machine.launch(
        SOURCE,
        "tma_load_box",
        tensor_map,
        out,
        np.int32(size),
        *coordinates(start),
        defines={"RANK": len(start)},
        grid=1,
        block=128,
        shared_bytes=size + 16,
    )
    return out[:size]


CASES = [  # shape, box, start, dtype, swizzle
    ((40, 128), (16, 128), (8, 0), np.uint8, Swizzle.BYTES_128),
    ((40, 144), (16, 128), (30, 80), np.uint8, Swizzle.BYTES_128),
    ((40, 64), (24, 64), (-5, 16), np.uint8, Swizzle.BYTES_64),
    ((33, 64), (8, 16), (32, -8), np.uint16, Swizzle.BYTES_32),
    ((20, 64), (8, 32), (3, 20), np.float32, Swizzle.BYTES_128),
    ((20, 64), (5, 12), (18, 60), np.float32, Swizzle.NONE),
    ((20, 64), (4, 4), (100, 0), np.float32, Swizzle.NONE),
    ((256,), (64,), (-16,), np.uint8, Swizzle.NONE),
    ((5, 7, 32), (2, 3, 16), (4, 5, 24), np.uint16, Swizzle.NONE),
    ((3, 4, 5, 32), (2, 2, 2, 32), (1, -1, 4, 0), np.uint8, Swizzle.BYTES_32),
    ((2, 3, 4, 5, 16), (2, 2, 2, 2, 16), (1, 1, 3, 4, 0), np.uint8, Swizzle.NONE),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{len(c[0])}d-{c[4].name.lower()}-{c[2]}")
def test_a_load_brings_the_box_swizzled_and_zeros_out_of_bounds(machine, case):
    shape, box, start, dtype, swizzle = case
    array = np.random.default_rng(1).integers(1, 200, shape).astype(dtype)
    got = load(machine, TensorMap(array=array, box=box, swizzle=swizzle), start)
    np.testing.assert_array_equal(got, image_of(box_of(array, start, box), swizzle))


def test_a_map_may_be_a_window_with_strides_of_its_own(machine):
    array = np.arange(64 * 96, dtype=np.int32).reshape(64, 96)
    tensor_map = TensorMap(array=array, box=(8, 16), shape=(20, 40), strides_bytes=(2 * 96 * 4, 4))
    got = load(machine, tensor_map, (16, 32)).view(np.int32).reshape(8, 16)
    np.testing.assert_array_equal(got, box_of(array[::2][:20, :40], (16, 32), (8, 16)))


def test_out_of_bounds_floats_may_be_nan(machine):
    array = np.ones((4, 16), np.float32)
    got = (
        load(machine, TensorMap(array=array, box=(8, 16), fill_nan=True), (0, 0))
        .view(np.float32)
        .reshape(8, 16)
    )
    assert (got[:4] == 1).all()
    assert np.isnan(got[4:]).all()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{len(c[0])}d-{c[4].name.lower()}-{c[2]}")
def test_a_store_writes_what_lies_inside_and_nothing_else(machine, case):
    shape, box, start, dtype, swizzle = case
    start = tuple(abs(c) // 16 * 16 if c < 0 else c for c in start)  # stores do not start before the tensor
    rng = np.random.default_rng(2)
    array = rng.integers(1, 200, shape).astype(dtype)
    data = rng.integers(1, 200, box).astype(dtype)
    expected = array.copy()
    inner = tuple(slice(max(0, s), max(0, min(n, s + b))) for s, n, b in zip(start, shape, box, strict=True))
    offset = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inner, start, strict=True))
    if all(i.stop > i.start for i in inner):
        expected[inner] = data[offset]
    store(machine, TensorMap(array=array, box=box, swizzle=swizzle), data, start, add=False)
    np.testing.assert_array_equal(array, expected)


def store(machine, tensor_map: TensorMap, data: np.ndarray, start: tuple[int, ...], *, add: bool) -> None:
    image = image_of(data, tensor_map.swizzle)
    padded = np.zeros(-(-image.size // 16) * 16, np.uint8)
    padded[: image.size] = image
    machine.launch(
        SOURCE,
        "tma_store_box",
        tensor_map,
        padded,
        np.int32(image.size),
        np.int32(add),
        *coordinates(start),
        defines={"RANK": len(start)},
        grid=1,
        block=128,
        shared_bytes=padded.size,
    )


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_reduction_adds_the_box(machine, dtype):
    rng = np.random.default_rng(3)
    array, data = rng.integers(-99, 99, (30, 40)).astype(dtype), rng.integers(-99, 99, (16, 32)).astype(dtype)
    expected = array.copy()
    expected[20:, 16:] += data[:10, :24]
    store(machine, TensorMap(array=array, box=(16, 32), swizzle=Swizzle.BYTES_128), data, (20, 16), add=True)
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(("size", "blocks"), [(2, 0b11), (4, 0b1111), (4, 0b0101)])
def test_multicast_fills_the_chosen_blocks(machine, size, blocks):
    rows, array = 8, np.random.default_rng(4).integers(0, 256, (8 * size, 128), dtype=np.uint8)
    box_bytes = rows * 128
    out = np.zeros((size, size * box_bytes), np.uint8)
    machine.launch(
        SOURCE,
        "multicast",
        TensorMap(array=array, box=(rows, 128), swizzle=Swizzle.BYTES_128),
        out,
        np.int32(box_bytes),
        np.int32(rows),
        np.int32(blocks),
        defines={"CLUSTER": size},
        grid=size,
        block=128,
        cluster=size,
        shared_bytes=size * box_bytes + 16,
    )
    image = image_of(array, Swizzle.BYTES_128)
    for rank in range(size):
        expected = image if blocks >> rank & 1 else np.zeros_like(image)
        np.testing.assert_array_equal(out[rank], expected)


def test_flat_copies_go_in_and_out(machine):
    data, out = np.random.default_rng(5).integers(0, 256, 4096, dtype=np.uint8), np.zeros(4096, np.uint8)
    machine.launch(SOURCE, "bulk_copy", data, out, np.int32(4096), grid=1, block=128, shared_bytes=4112)
    np.testing.assert_array_equal(out, data)
