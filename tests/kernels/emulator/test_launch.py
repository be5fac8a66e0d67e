"""The emulator's Python side: arguments, buffers, tensor maps, builds."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import FileError, KernelError
from quantkit.kernels.emulator import Mode, Swizzle, TensorMap, build, launch, load

SOURCE = Path(__file__).with_name("instructions.cu")


def write(folder: Path, body: str, signature: str = "uint8_t* data") -> Path:
    path = folder / "small.cu"
    path.write_text(
        '#include "instructions.h"\nusing namespace qk;\n'
        f"QK_KERNEL(32, 1) small({signature}) {{ {body} }}\nQK_EXPORT(small)\n"
    )
    return path


def test_parameters_arrive_whatever_their_sizes(compiler, tmp_path):
    source = write(
        tmp_path,
        "if (threadIdx.x == 0) { out[0] = a; out[1] = b; out[2] = c; out[3] = d; out[4] = e ? 1 : 0; }",
        "double* out, int8_t a, double b, uint16_t c, int64_t d, bool e",
    )
    out = np.zeros(5)
    arguments = np.int8(-3), np.float64(0.25), np.uint16(65535), np.int64(-(2**40)), np.bool_(True)
    launch(source, "small", out, *arguments, grid=1, block=32)
    np.testing.assert_array_equal(out, [-3, 0.25, 65535, -(2**40), 1])


def test_every_block_and_thread_knows_its_coordinates(compiler, tmp_path):
    body = """
      const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
      const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
      out[block * 64 + thread] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z + 1000 * threadIdx.x +
                                 100000 * threadIdx.y + 1000000 * threadIdx.z;"""
    source = write(tmp_path, body, "int* out")
    for mode in Mode:
        out = np.zeros((2, 3, 4, 2, 2, 16), np.int32)
        launch(source, "small", out, grid=(4, 3, 2), block=(16, 2, 2), mode=mode, multiprocessors=3)
        index = np.indices(out.shape)
        weights = np.array([100, 10, 1, 1000000, 100000, 1000])
        np.testing.assert_array_equal(out, np.tensordot(weights, index, 1))


@pytest.mark.parametrize("cut", [0, -1])
def test_a_damaged_library_is_built_again(compiler, tmp_path, cut):
    source = write(tmp_path, "data[threadIdx.x] = 1;")
    built = build.build_kernel(source, cache=tmp_path / "cache", library=build.build_library())
    whole = built.read_bytes()
    built.write_bytes(whole[:cut])
    assert build.build_kernel(source, cache=tmp_path / "cache", library=build.build_library()) == built
    assert len(built.read_bytes()) == len(whole)


def test_arguments_that_do_not_fit_their_parameters_are_refused(compiler):
    kernel = load(SOURCE, "widths")
    data = np.zeros(3584, np.uint8)
    for arguments, complaint in [
        ((data,), "1 arguments for 2 parameters"),
        ((data, 5), "argument 1 is a int"),
        ((data, np.int32(5)), "argument 1 has 4 bytes, its parameter 8"),
        ((data, data[::2]), "not contiguous"),
        ((data, data[16:]), "overlap"),
    ]:
        with pytest.raises(KernelError, match=complaint):
            kernel.launch(*arguments, grid=1, block=32)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"grid": 0, "block": 32}, "empty"),
        ({"grid": 1, "block": 33}, "multiple of 32"),
        ({"grid": 1, "block": 2048}, "up to 1024"),
        ({"grid": 1, "block": 32, "shared_bytes": 2**18}, "the limit is 232448"),
        ({"grid": 3, "block": 32, "cluster": 2}, "clusters of 2"),
    ],
)
def test_launches_that_no_gpu_takes_are_refused(compiler, options, complaint):
    data = np.zeros(3584, np.uint8)
    with pytest.raises(KernelError, match=complaint):
        load(SOURCE, "widths").launch(data, data.copy(), **options)


def test_one_array_given_twice_is_one_buffer(compiler, tmp_path):
    source = write(tmp_path, "if (a == b && threadIdx.x == 0) a[0] = 1;", "uint8_t* a, uint8_t* b")
    data = np.zeros(16, np.uint8)
    launch(source, "small", data, data, grid=1, block=32)
    assert data[0] == 1


def test_a_plain_write_just_past_the_end_is_found_afterwards(compiler, tmp_path):
    source = write(tmp_path, "data[threadIdx.x] = 1;")
    with pytest.raises(KernelError, match="past an end of buffer 0"):
        launch(source, "small", np.zeros(31, np.uint8), grid=1, block=32)


def test_read_only_arrays_are_inputs(compiler, tmp_path):
    source = write(tmp_path, "data[threadIdx.x] = 1;")
    data = np.zeros(32, np.uint8)
    data.flags.writeable = False
    launch(source, "small", data, grid=1, block=32)
    assert not data.any()


def test_stores_reach_other_blocks_only_when_released(compiler, tmp_path):
    """A flag that does not release what it announces: late modes show the reader the old value."""
    body = """
      uint32_t* words = reinterpret_cast<uint32_t*>(data);
      if (blockIdx.x == 0 && threadIdx.x == 0) {
        st_global(words + 4, 42u);
        RELEASE;
        atomic_add(words, 1);
      }
      if (blockIdx.x == 1 && threadIdx.x == 0) {
        while (ld_acquire(words) == 0) {}
        st_global(words + 8, ld_global(words + 4));
      }"""

    def seen(release: str, mode: Mode) -> int:
        data = np.zeros(16, np.uint32)
        source = write(tmp_path, body.replace("RELEASE", release))
        launch(source, "small", data.view(np.uint8), grid=2, block=32, mode=mode)
        return int(data[8])

    assert [seen("fence_gpu()", mode) for mode in Mode] == [42] * 4
    assert seen("", Mode.LAZY) == 0


def test_blocks_beyond_the_multiprocessors_wait_their_turn(compiler, tmp_path):
    """Blocks that wait for later ones deadlock unless all fit at once, as on a GPU."""
    body = """
      uint32_t* flag = reinterpret_cast<uint32_t*>(data);
      if (blockIdx.x == 2) st_release(flag, 1);
      else while (ld_acquire(flag) == 0) {}"""
    source = write(tmp_path, body)
    launch(source, "small", np.zeros(4, np.uint8), grid=3, block=32, multiprocessors=3)
    with pytest.raises(KernelError, match="deadlock"):
        launch(source, "small", np.zeros(4, np.uint8), grid=3, block=32, multiprocessors=2)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"array": np.zeros((4, 24), np.uint8), "box": (4, 16)}, "not multiples of 16"),
        ({"array": np.zeros((4, 32), np.uint8), "box": (4, 8)}, "a box row of 8 bytes"),
        (
            {"array": np.zeros((4, 64), np.uint8), "box": (4, 64), "swizzle": Swizzle.BYTES_32},
            "with a 32-byte swizzle",
        ),
        ({"array": np.zeros((4, 512), np.uint8), "box": (4, 512)}, "1 to 256"),
        ({"array": np.zeros((4, 32), np.uint8), "box": (32,)}, "a box of 1 dimensions"),
        ({"array": np.zeros((4, 32), complex), "box": (4, 1)}, "no tensor map holds complex128"),
        ({"array": np.zeros((4, 32), np.uint8), "box": (4, 32), "shape": (5, 32)}, "spans 160 bytes"),
        ({"array": np.zeros((1,) * 6, np.uint8), "box": (1,) * 6}, "6 dimensions"),
    ],
)
def test_tensor_maps_that_the_driver_refuses_are_refused(options, complaint):
    with pytest.raises(KernelError, match=complaint):
        TensorMap(**options)


@given(
    st.tuples(*[st.integers(1, 2**20)] * 2),
    st.sampled_from([1, 16, 32]),
    st.sampled_from([Swizzle.NONE, Swizzle.BYTES_32]),
)
def test_an_encoded_map_is_128_bytes_and_depends_on_the_address(address, rows, swizzle):
    tensor_map = TensorMap(array=np.zeros((32, 32), np.uint8), box=(rows, 32), swizzle=swizzle)
    first, second = (tensor_map.encode(a * 16) for a in address)
    assert len(first) == len(second) == 128
    assert (first == second) == (address[0] == address[1])


def test_a_source_that_does_not_compile_says_where(compiler, tmp_path):
    with pytest.raises(KernelError, match=r"small\.cu:3:.*nonsense"):
        load(write(tmp_path, "nonsense();"), "small")


def test_a_kernel_that_is_not_exported_says_what_to_write(compiler):
    with pytest.raises(KernelError, match=r"end the source with QK_EXPORT\(absent\)"):
        load(SOURCE, "absent")


def test_a_cached_kernel_is_built_once_and_anew_when_anything_changes(compiler, tmp_path):
    source = write(tmp_path, "data[0] = VALUE;")
    library = build.build_library()
    (tmp_path / "cache").mkdir()
    shutil.copy(
        library, tmp_path / "cache" / library.name
    )  # it takes seconds to build, and is not the point here
    first = build.build_kernel(source, {"VALUE": 1}, tmp_path / "cache")
    stamp = first.stat().st_mtime_ns
    assert build.build_kernel(source, {"VALUE": 1}, tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == stamp
    assert build.build_kernel(source, {"VALUE": 2}, tmp_path / "cache") != first
    source.write_text(source.read_text() + "// changed\n")
    assert build.build_kernel(source, {"VALUE": 1}, tmp_path / "cache") != first


def test_a_kernel_runs_on_the_library_it_is_linked_with(compiler, tmp_path, monkeypatch):
    """Also when the emulator's sources are edited while a kernel is built."""
    library, asked = build.build_library(), []

    def once(cache):
        asked.append(cache)
        assert len(asked) == 1, "what is built now may be another library"
        return library

    for module in (build, importlib.import_module("quantkit.kernels.emulator.launch")):
        monkeypatch.setattr(module, "build_library", once)
    data = np.zeros(16, np.uint8)
    load(write(tmp_path, "data[0] = 9;"), "small").launch(data, grid=1, block=32)
    assert data[0] == 9


def test_what_is_edited_while_it_is_compiled_is_compiled_again(compiler, tmp_path, monkeypatch):
    source, run = write(tmp_path, "data[0] = 1;"), subprocess.run

    def edit_first(command, **options):
        monkeypatch.setattr(build.subprocess, "run", run)
        write(tmp_path, "data[0] = 2;")
        return run(command, **options)

    library = build.build_library()
    monkeypatch.setattr(build.subprocess, "run", edit_first)
    cache = tmp_path / "cache"
    built = build.build_kernel(source, cache=cache, library=library)
    assert [path.name for path in cache.iterdir()] == [built.name]
    assert build.build_kernel(source, cache=cache, library=library) == built


def test_a_cache_that_cannot_be_made_is_one_error(compiler, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file/cache: cannot be made \(not a directory\); choose"):
        build.build_library(tmp_path / "file" / "cache")


def test_processes_may_build_the_same_kernel_at_once(compiler, tmp_path):
    source = write(tmp_path, "data[0] = 7;")
    build.build_library(build.DEFAULT_CACHE)
    script = f"""
import sys
from pathlib import Path
import numpy as np
from quantkit.kernels.emulator import load
data = np.zeros(16, np.uint8)
load(Path({str(source)!r}), "small", {{"ROUND": {hash(str(tmp_path)) % 10**6}}}).launch(data, grid=1, block=32)
assert data[0] == 7
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_without_a_compiler_the_emulator_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match="no C\\+\\+ compiler"):
        load(SOURCE, "widths")


@pytest.mark.slow
def test_a_whole_gpu_of_blocks_may_be_resident(compiler, tmp_path):
    """More threads than Linux gives a process guard pages for."""
    source = write(tmp_path, "block_sync(); if (threadIdx.x == 0) atomic_add(out, 1);", "uint32_t* out")
    out = np.zeros(1, np.uint32)
    launch(source, "small", out, grid=48, block=1024, multiprocessors=48)
    assert out[0] == 48
