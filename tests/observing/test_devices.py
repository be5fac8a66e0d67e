"""Calibrating on a GPU where there is none: ONNX Runtime's CPU provider lends its memory, the emulator counts there."""

import ctypes
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.cache import CalibrationCache
from quantkit.cli import main
from quantkit.data import open_data
from quantkit.errors import CacheError, KernelError, ModelError, UnknownNameError
from quantkit.graph import load_graph
from quantkit.graph.linears import find_linears
from quantkit.kernels import device as gpu
from quantkit.kernels import statistics as reducing
from quantkit.kernels.emulator import find_compiler
from quantkit.kernels.gram import DeviceGram, as_floats, device_patches
from quantkit.kernels.present import why_no_gpu
from quantkit.kernels.statistics import DeviceArray, device_array, observe_device_tensor
from quantkit.observing import devices
from quantkit.observing.grams import divide_grams, observe_grams
from quantkit.observing.observe import observe
from quantkit.runtime import CPU, CUDA, Provider, Session, host_array, upload
from quantkit.statistics import ChannelStats, FloatHistogram, GramMatrix
from quantkit.statistics.patches import patches
from quantkit.statistics.tensor import observe_tensor
from tests.kernels.fake_cupy import FakeCupy, install
from tests.models import MODELS, model_of


class Lent(FakeCupy):
    """CuPy, reading arrays of others where they lie; remembers their addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []
        self.waits = 0
        self.cuda.get_current_stream = lambda: SimpleNamespace(synchronize=self.wait)
        self.cuda.UnownedMemory = lambda address, size, owner: (address, size)
        self.cuda.MemoryPointer = lambda memory, offset: memory

    def wait(self) -> None:
        self.waits += 1

    def ndarray(self, shape: tuple[int, ...], dtype: Any, memptr: tuple[int, int]) -> np.ndarray:
        array = np.frombuffer((ctypes.c_char * memptr[1]).from_address(memptr[0]), dtype).reshape(shape)
        return self._lent(array)

    def _lent(self, array: np.ndarray) -> np.ndarray:
        """What lay there before is gone: its owner has given the memory to another."""
        at = int(array.ctypes.data)
        self.read.append(at)
        held = self.memory._held
        for start in [s for s, old in held.items() if s < at + array.nbytes and at < s + old.nbytes]:
            del held[start]
        held[at] = array
        return self.memory.shown(array)

    def from_dlpack(self, value: Any) -> np.ndarray:
        if value.data_type() == "tensor(bfloat16)":
            raise NotImplementedError("CuPy does not support bfloat16 yet")
        return self._lent(np.from_dlpack(value))

    @staticmethod
    def pad(array: np.ndarray, width: Any) -> np.ndarray:
        return np.pad(array, width)

    def ascontiguousarray(self, array: np.ndarray) -> np.ndarray:
        return array if array.flags.c_contiguous else self.memory.new(array)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Lent:
    if find_compiler() is None:
        pytest.skip("the emulator needs a C++ compiler")
    fake = Lent()
    install(monkeypatch, "sm_90a")
    monkeypatch.setattr(gpu, "cupy", lambda: fake)
    monkeypatch.setattr(gpu, "function_of", fake.function_of)
    monkeypatch.setattr(reducing, "_above", reducing._above.__wrapped__)
    monkeypatch.setattr(reducing, "require_gpu", lambda what: None)
    # The very memory of ONNX Runtime, under another name.
    monkeypatch.setattr(devices.Gpu, "provider", Provider(name=CPU.name, device=CPU.device))
    # As many as on the CPU: the bits of a convolution may depend on them.
    monkeypatch.setattr(devices.Gpu, "threads", lambda self, workers: 1)
    monkeypatch.setattr(devices.Processors, "threads", lambda self, workers: 1)
    return fake


def on_gpu(cupy: Lent, x: np.ndarray) -> DeviceArray:
    plain = x.dtype == ml_dtypes.bfloat16
    return DeviceArray(array=cupy.asarray(x.view(np.uint16) if plain else x), dtype=x.dtype.name)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 6, 5, 7), 1), ((9, 64), -1), ((3, 5, 8), 2), ((50,), None)], ids=str
)
def test_a_tensor_on_the_gpu_is_observed_as_on_the_cpu(cupy, shape, axis, dtype):
    rng = np.random.default_rng(1)
    mine, theirs = FloatHistogram(), FloatHistogram()
    here, there = (None, None) if axis is None else (ChannelStats(axis), ChannelStats(axis))
    for scale in (1.0, 0.01, 300.0):
        x = (scale * rng.standard_normal(shape)).astype(dtype)
        for histogram, channels, tensor, take in (
            (mine, here, x, observe_tensor),
            (theirs, there, on_gpu(cupy, x), observe_device_tensor),
        ):
            counts = take(tensor, channels, exponent=histogram.exponent)
            histogram.include(counts)
    assert mine == theirs
    if here is not None:
        assert (here.count, here.min.tobytes(), here.max.tobytes()) == (
            there.count,
            there.min.tobytes(),
            there.max.tobytes(),
        )
        np.testing.assert_allclose(there.abs_sum, here.abs_sum, rtol=1e-12)


def test_nothing_is_launched_for_an_empty_tensor(cupy):
    assert (
        observe_device_tensor(on_gpu(cupy, np.zeros((0, 4), np.float32)), ChannelStats(1), exponent=-100)
        is None
    )
    assert cupy.launches == []


def test_counts_beyond_the_keys_do_not_leak_into_the_next_tensor(cupy, monkeypatch):
    above = cupy.zeros(1 << 20, np.int32)
    monkeypatch.setattr(reducing, "_above", lambda device: above)
    x = np.linspace(-1, 1, 3000, dtype=np.float32)
    x[1] = 1e30  # not in the sample
    for tensor in (x, np.linspace(0, 1, 3000, dtype=np.float32)):
        histogram, want = FloatHistogram(), FloatHistogram()
        histogram.include(observe_device_tensor(on_gpu(cupy, tensor), None, exponent=-100))
        want.observe(tensor)
        assert histogram == want
    assert not np.asarray(above).any()


def test_what_onnx_runtime_made_is_read_where_it_lies(cupy):
    graph = load_graph(MODELS["conv_relu"].build())
    feeds = MODELS["conv_relu"].feeds(1)[0]
    session = Session(graph.model, outputs=["a", "r", "y"], provider=devices.Gpu.provider)
    values = session.run_there(upload(feeds, devices.Gpu.provider))
    assert list(values) == ["a", "r", "y"]
    for name, value in values.items():
        found = device_array(value)
        assert found.array.ctypes.data == value.data_ptr() == cupy.read[-1]
        assert found.dtype == "float32"
        np.testing.assert_array_equal(np.from_dlpack(value), session.run(feeds)[name])


def test_a_type_that_cupy_lacks_is_read_where_it_lies_too(cupy):
    model = load_graph(model_of("(float[N,8] x) => (bfloat16[N,8] y) { y = Cast <to = 16> (x) }"))
    x = np.linspace(-3, 3, 40).reshape(5, 8).astype(np.float32)
    session = Session(model.model, provider=devices.Gpu.provider)
    (value,) = session.run_there(upload({"x": x}, devices.Gpu.provider)).values()
    tensor = device_array(value)
    assert (tensor.dtype, tensor.array.dtype) == ("bfloat16", np.uint16)
    assert cupy.read == [value.data_ptr()]
    histogram, want = FloatHistogram(), FloatHistogram()
    histogram.include(observe_device_tensor(tensor, None, exponent=-100))
    want.observe(x.astype(ml_dtypes.bfloat16))
    assert histogram == want
    np.testing.assert_array_equal(
        np.asarray(as_floats(tensor.array)), x.astype(ml_dtypes.bfloat16).astype(np.float32)
    )


def test_an_empty_tensor_of_onnx_runtime_has_no_address_to_read(cupy):
    value = upload({"x": np.zeros((0, 3), np.float32)}, devices.Gpu.provider)["x"]
    tensor = device_array(value)
    assert (tensor.array.shape, tensor.array.dtype, cupy.read) == ((0, 3), np.float32, [])
    assert devices.Gpu().array(value).shape == (0, 3)


def test_what_are_no_floats_is_refused(cupy):
    value = upload({"x": np.arange(3)}, devices.Gpu.provider)["x"]
    with pytest.raises(KernelError, match=r"a tensor\(int64\) is no tensor of floats"):
        device_array(value)


# --- observing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv_relu", "layernorm_mlp", "conv_grouped"])
def test_a_model_is_observed_on_the_gpu_as_on_the_cpu(cupy, name):
    tiny = MODELS[name]
    graph = load_graph(tiny.build())
    source = open_data(tiny.feeds(6), graph.inputs)
    here, there = (observe(graph, source, batch_size=2, device=device) for device in ("cpu", "cuda"))
    assert here.statistics.keys() == there.statistics.keys()
    assert (here.fingerprints == there.fingerprints).all() and here.probe.keys() == there.probe.keys()
    for tensor, want in here.statistics.items():
        found = there.statistics[tensor]
        assert found.histogram == want.histogram
        if want.channels is not None:
            assert found.channels.min.tobytes() == want.channels.min.tobytes()
            assert found.channels.max.tobytes() == want.channels.max.tobytes()
            np.testing.assert_allclose(found.channels.abs_sum, want.channels.abs_sum, rtol=1e-12)
            assert found.channels.count == want.channels.count
    assert len(cupy.read) >= len(here.statistics)


def test_tensors_that_do_not_fit_together_are_made_in_several_runs(cupy):
    tiny = MODELS["layernorm_mlp"]
    graph = load_graph(tiny.build())
    source = open_data(tiny.feeds(4), graph.inputs)
    whole = observe(graph, source, device="cuda")
    parts = observe(graph, source, device="cuda", max_memory=1)
    assert parts.passes > whole.passes == 1
    for name, want in whole.statistics.items():
        assert parts.statistics[name].histogram.count == want.histogram.count


def test_bfloat16_inputs_are_counted_on_the_host(cupy):
    model = load_graph(
        model_of(
            "(bfloat16[N,8] x) => (float[N,5] y) <float[8,5] w> { c = Cast <to = 1> (x) y = MatMul (c, w) }"
        )
    )
    x = np.linspace(-2, 2, 24).reshape(3, 8).astype(ml_dtypes.bfloat16)
    value = upload({"x": x}, CPU)["x"]
    np.testing.assert_array_equal(host_array(value), x)
    found = observe(model, open_data({"x": x}, model.inputs), device="cuda")
    assert found.statistics["c"].histogram.count == 24


# --- Gram matrices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["conv_relu", "conv_grouped", "layernorm_mlp", "gemm", "shared_weight", "nan_activation"]
)
def test_gram_matrices_from_the_gpu_are_those_of_the_cpu(cupy, name):
    tiny = MODELS[name]
    graph = load_graph(tiny.build())
    linears = find_linears(graph)
    source = open_data(tiny.feeds(3), graph.inputs)
    work = divide_grams(graph, source, linears.values())
    here, there = (dict(observe_grams(graph, source, work, device=device)) for device in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    # Before a tensor's memory is given to the next run.
    tensors = {linear.tensor for linear in linears.values()}
    assert cupy.waits == len(tensors) * -(-3 // work.batch_size)
    for view, want in here.items():
        found = there[view]
        assert (found.count, found.products.dtype) == (want.count, np.float64)
        assert found.is_finite == want.is_finite
        if not want.is_finite:
            continue
        # √(Gᵢᵢ Gⱼⱼ): what a product of two vectors is at most.
        most = np.sqrt(want.products.diagonal(axis1=1, axis2=2))
        # Threads may move the last bits of what the model computes.
        assert np.all(
            np.abs(found.products - want.products) <= 1e-6 * most[:, :, None] * most[:, None, :] + 1e-12
        )
        np.testing.assert_allclose(found.sums, want.sums, atol=1e-4 * max(want.count, 1))


def test_sums_of_float64_are_those_of_the_cpu_to_twelve_digits(cupy, monkeypatch):
    monkeypatch.setattr("quantkit.kernels.gram._PIECE", 7 * 40)
    rows = np.random.default_rng(2).standard_normal((2, 300, 40)).astype(np.float32)
    mine, theirs = GramMatrix(40, 2), DeviceGram(40, 2)
    for part in (rows[:, :200], rows[:, 200:]):
        mine.observe(part)
        theirs.observe(cupy.asarray(part))
    found = theirs.result()
    np.testing.assert_allclose(found.products, mine.products, rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(found.sums, mine.sums, rtol=1e-12, atol=1e-11)
    assert found.count == mine.count == 300


@given(
    rows=hnp.arrays(
        np.float32,
        st.tuples(st.just(1), st.integers(1, 60), st.integers(1, 9)),
        elements=st.floats(-1000, 1000, width=16),
    ),
    block=st.integers(1, 70),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sums_of_float32_keep_the_bound_that_is_stated(cupy, monkeypatch, rows, block):
    monkeypatch.setattr("quantkit.kernels.gram.FLOAT32_BLOCK", block)
    exact, gram = GramMatrix(rows.shape[2]), DeviceGram(rows.shape[2], float64=False)
    exact.observe(rows)
    gram.observe(cupy.asarray(rows))
    most = np.sqrt(exact.products.diagonal(axis1=1, axis2=2))
    error = np.abs(gram.result().products - exact.products)
    bound = (min(block, rows.shape[1]) + 1) * 2.0**-24 * most[:, :, None] * most[:, None, :]
    # A product of two subnormal numbers may vanish.
    assert np.all(error <= bound + rows.shape[1] * 2.0**-149)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("size", [264, 300])
def test_vectors_of_16_bits_are_multiplied_on_the_tensor_cores(cupy, monkeypatch, size, dtype):
    monkeypatch.setattr("quantkit.kernels.gram.TENSOR_CORE_BLOCK", 40)
    rows = np.random.default_rng(4).standard_normal((2, 70, size)).astype(dtype)
    mine, theirs = GramMatrix(size, 2), DeviceGram(size, 2)
    mine.observe(rows)
    theirs.observe(cupy.asarray(rows if dtype == np.float16 else rows.view(np.uint16)))
    assert [name for name, *_ in cupy.launches] == ["gram"] * 4
    found = theirs.result()
    most = np.sqrt(mine.products.diagonal(axis1=1, axis2=2))
    error = np.abs(found.products - mine.products)
    assert np.all(error <= 40 * 2.0**-23 * most[:, :, None] * most[:, None, :])
    np.testing.assert_array_equal(found.products, found.products.transpose(0, 2, 1))
    np.testing.assert_allclose(found.sums, mine.sums, rtol=1e-12, atol=1e-10)


def test_parts_of_a_larger_tensor_are_vectors_too(cupy):
    whole = np.random.default_rng(5).integers(-5, 6, (1, 30, 520)).astype(np.float16)
    there, gram, want = cupy.asarray(whole), DeviceGram(256), GramMatrix(256)
    # Out of line, every other row, and in line but not in one piece.
    for part in (np.s_[:, :, 3:259], np.s_[:, ::2, 8:264], np.s_[:, :7, :256]):
        gram.observe(there[part])
        want.observe(whole[part])
    np.testing.assert_array_equal(gram.result().products, want.products)


@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", 8), ("sm_90a", 8), ("sm_89", 4), ("sm_120a", 4)])
def test_float64_is_multiplied_where_tensor_cores_do(cupy, monkeypatch, arch, dtype):
    monkeypatch.setattr(gpu, "architecture", lambda device: arch)
    assert np.dtype(DeviceGram(3)._type).itemsize == dtype


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_patches_cut_by_slices_are_those_of_windows(cupy, monkeypatch, data):
    spatial = data.draw(st.integers(1, 2))
    many = lambda low, high: data.draw(st.lists(st.integers(low, high), min_size=spatial, max_size=spatial))  # noqa: E731
    groups = data.draw(st.sampled_from([1, 2]))
    window = {"kernel": many(1, 3), "strides": many(1, 3), "dilations": many(1, 2), "groups": groups}
    window["pads"] = [*many(0, 2), *many(0, 2)]
    shape = (data.draw(st.integers(1, 3)), 2 * groups, *many(5, 8))
    monkeypatch.setattr("quantkit.kernels.gram._PIECE", data.draw(st.sampled_from([1, 10**6])))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    want = np.concatenate(list(patches(x, **window)), axis=1)
    found = np.concatenate([np.asarray(rows) for rows in device_patches(cupy.asarray(x), **window)], axis=1)
    np.testing.assert_array_equal(found, want)


# --- refusals -----------------------------------------------------------------------------------------------


def test_without_a_gpu_or_cupy_one_line_says_so(monkeypatch):
    monkeypatch.setattr(
        "quantkit.kernels.statistics.why_no_gpu", lambda: "CuPy is not installed: pip install it"
    )
    with pytest.raises(
        KernelError, match=r"^--device cuda: no GPU here \(CuPy is not installed: pip install it\); leave"
    ):
        devices.device_of("cuda")


def test_without_the_cuda_provider_one_line_says_so(monkeypatch):
    monkeypatch.setattr("quantkit.kernels.statistics.why_no_gpu", lambda: None)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        ModelError, match=r"--device cuda: this ONNX Runtime has no CUDAExecutionProvider \(CPU"
    ):
        devices.device_of("cuda")


@pytest.mark.skipif(why_no_gpu() is None, reason="it can start here")
def test_a_provider_that_cannot_start_is_an_error_not_the_cpu(capfd):
    with pytest.raises(ModelError, match=r"cannot start CUDAExecutionProvider; it needs a GPU"):
        Session(load_graph(MODELS["gemm"].build()).model, provider=CUDA)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_device_is_refused():
    with pytest.raises(UnknownNameError, match=r"--device tpu: there are cpu and cuda"):
        devices.device_of("tpu")


def test_the_command_says_what_lacks_and_writes_nothing(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("quantkit.kernels.statistics.why_no_gpu", lambda: "CUDA counts none")
    monkeypatch.chdir(tmp_path)
    arguments = ["quantkit", "calibrate", str(digits.model), "--data", str(digits.calib), "--device", "cuda"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "--device cuda: no GPU here (CUDA counts none); leave it out to run on the CPU." in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_same_cache_from_a_gpu(cupy, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    caches = []
    for device in ("cpu", "cuda"):
        arguments = [
            "quantkit",
            "calibrate",
            str(digits.model),
            "--data",
            str(digits.calib),
            "--samples",
            "3",
        ]
        monkeypatch.setattr("sys.argv", [*arguments, "--out", f"{device}.calib", "--device", device])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 0, capsys.readouterr().err
        caches.append(CalibrationCache.load(f"{device}.calib"))
    here, there = caches
    assert here.statistics.keys() == there.statistics.keys()
    assert all(s.histogram == there.statistics[n].histogram for n, s in here.statistics.items())
    # One run of the data, seen twice.
    with pytest.raises(CacheError):
        here.merge(there)
