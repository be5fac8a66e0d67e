"""ONNX Runtime sessions over onnx-ir models, without writing them to disk or copying their weights."""

import contextlib
import ctypes
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from quantkit.errors import ModelError

# Weights smaller than this travel inside the serialized graph, where shape inference can read them.
_INLINE_BYTES = 4096
# Protobuf refuses messages of 2 GiB.
_PROTOBUF_LIMIT = 2**31 - 1

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Provider:
    """What runs a model.

    Attributes:
        name: ONNX Runtime's.
        device: its memory, as ONNX Runtime calls it.
        options: what it is told.
    """

    name: str
    device: str
    options: Mapping[str, str] = field(default_factory=dict)


CPU = Provider(name="CPUExecutionProvider", device="cpu")
# Without TF32, which keeps ten bits of a float32; and without timing every algorithm of a convolution at its first run.
CUDA = Provider(
    name="CUDAExecutionProvider",
    device="cuda",
    options={"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
)


def require_provider(provider: Provider, what: str) -> None:
    """Raise ModelError, saying how to mend it, unless this ONNX Runtime has the provider."""
    import onnxruntime as ort

    if provider.name not in ort.get_available_providers():
        raise ModelError(
            f"{what}: this ONNX Runtime has no {provider.name} ({', '.join(ort.get_available_providers())}); "
            "pip install 'quantkit[gpu]'."
        )


class Session:
    """A model that runs on the CPU, or where another provider runs it.

    `optimize` chooses ONNX Runtime's graph optimizations. True (everything) is for float models. False is for judging
    a quantized file: above ORT_ENABLE_BASIC the CPU provider drops the Relu before a float8 or int4 QuantizeLinear,
    and `WeightBiasQuantization`, which runs even there, requantizes float weights behind a DequantizeLinear
    (mobilenetv2: 32.7 → 28.8 dB); so it is BASIC without that pass.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: ir.Model | Path | str,
        *,
        outputs: Sequence[str] | None = None,
        optimize: bool = True,
        threads: int = 0,
        provider: Provider = CPU,
    ) -> None:
        import onnxruntime as ort

        if provider.name == CUDA.name:
            _load_cuda()
        options = ort.SessionOptions()
        # Its errors come as exceptions; on the screen they would stand twice.
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        disabled: list[str] = []
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            disabled = ["WeightBiasQuantization"]
        what = str(model) if isinstance(model, Path | str) else "model"
        # The arrays must outlive the session: it reads weights where they lie.
        self._weights: dict[str, np.ndarray] = {}
        source: bytes | str
        if isinstance(model, ir.Model):
            source, self._weights = _serialized(model, outputs)
            values = [ort.OrtValue.ortvalue_from_numpy(a) for a in self._weights.values()]
            options.add_external_initializers(list(self._weights), values)
        else:
            source = str(model)
        try:
            self._session = ort.InferenceSession(
                source,
                options,
                providers=list(dict.fromkeys([provider.name, CPU.name])),
                provider_options=[dict(provider.options), {}] if provider != CPU else None,
                disabled_optimizers=disabled,
            )
        except Exception as error:
            # ONNX Runtime's exceptions share no base class but Exception.
            raise ModelError(
                f"{what}: ONNX Runtime cannot load it: {reason(error)}; check it with onnx.checker."
            ) from error
        if provider.name not in self._session.get_providers():
            # It falls back to the CPU without an error.
            raise ModelError(
                f"{what}: ONNX Runtime cannot start {provider.name}; it needs a GPU with its driver, CUDA and cuDNN."
            )
        self._what, self._provider = what, provider
        self.output_names: list[str] = [o.name for o in self._session.get_outputs()]

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Run once; return the outputs by name.

        Raises:
            ModelError: the model fails on this input.
        """
        names = list(outputs) if outputs is not None else self.output_names
        try:
            results = self._session.run_with_ort_values(names, {n: _ort_value(a) for n, a in feeds.items()})
            return dict(zip(names, [r.numpy() for r in results], strict=True))
        except Exception as error:
            shapes = ", ".join(f"{n} {a.dtype} {list(a.shape)}" for n, a in feeds.items())
            raise ModelError(f"{self._what}: fails when run on {shapes}: {reason(error)}.") from error

    def run_there(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run once on OrtValues, such as `upload` makes; return the outputs by name, as OrtValues where they were made.

        Nothing is copied to the host. The outputs are finished.

        Raises:
            ModelError: the model fails on this input.
        """
        try:
            binding = self._session.io_binding()
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, value)
            for name in self.output_names:
                binding.bind_output(name, self._provider.device)
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return dict(zip(self.output_names, binding.get_outputs(), strict=True))
        except Exception as error:
            shapes = ", ".join(f"{n} {v.data_type()} {list(v.shape())}" for n, v in feeds.items())
            raise ModelError(f"{self._what}: fails when run on {shapes}: {reason(error)}.") from error


def host_array(value: Any) -> np.ndarray:
    """Return what an OrtValue in the host's memory holds; bfloat16, which ONNX Runtime does not hand out, as a copy."""
    if value.data_type() != "tensor(bfloat16)":
        array: np.ndarray = value.numpy()
        return array
    shape = tuple(value.shape())
    words = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    copied: np.ndarray = np.array(words, np.uint16).view(ml_dtypes.bfloat16).reshape(shape)
    return copied


@cache
def _load_cuda() -> None:
    """Load CUDA and cuDNN from NVIDIA's packages, where pip installed them. If something lacks, the session tells."""
    import onnxruntime as ort

    # What a provider says as it fails to start stands in its own log, which is the screen.
    ort.set_default_logger_severity(4)
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def upload(feeds: Feeds, provider: Provider) -> dict[str, Any]:
    """Return arrays as OrtValues in the provider's memory; bfloat16, which has no way there, in the host's."""
    import onnxruntime as ort

    if provider.name == CUDA.name:
        _load_cuda()
    return {
        name: _ort_value(array)
        if array.dtype == ml_dtypes.bfloat16
        else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), provider.device)
        for name, array in feeds.items()
    }


def _ort_value(array: np.ndarray) -> Any:
    import onnxruntime as ort

    if array.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            np.ascontiguousarray(array).view(np.uint16), onnx.TensorProto.BFLOAT16
        )
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def with_outputs(model: ir.Model, outputs: Sequence[str]) -> ir.Model:
    """Return a copy of `model` (weights shared) that computes exactly these tensors, in this order."""
    copy = model.clone()
    graph = copy.graph
    values = {str(v.name): v for node in graph for v in node.outputs}
    values.update({str(v.name): v for v in graph.inputs})
    values.update(graph.initializers)
    graph.outputs[:] = [values[name] for name in outputs]
    return copy


def reason(error: BaseException) -> str:
    """What ONNX Runtime complains of, in one line without its error codes and source paths."""
    text = re.sub(r"/onnxruntime_src/\S+ ", "", " ".join(str(error).split()))
    text = text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
    return text[:300].rstrip(". ")


def _serialized(model: ir.Model, outputs: Sequence[str] | None) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return the graph as bytes with its large weights taken out, and those weights as arrays."""
    copy = with_outputs(model, outputs) if outputs is not None else model.clone()
    weights: dict[str, np.ndarray] = {}
    for name, value in list(copy.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        if not value.uses() and not value.is_graph_output():
            del copy.graph.initializers[name]
            continue
        # ONNX Runtime does not find a weight again that it takes out of the graph because no node reads it.
        if tensor.nbytes < _INLINE_BYTES or tensor.dtype not in _PLAIN or not value.uses():
            if isinstance(tensor, ir.ExternalTensor):
                # A graph given as bytes has no folder to look for other files in.
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
            continue
        weights[name] = np.ascontiguousarray(tensor.numpy())
        value.const_value = ir.ExternalTensor(
            "weights",
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(weights[name].shape),
            name=name,
            base_dir="",
        )
    proto = ir.serde.serialize_model(copy)
    if proto.ByteSize() > _PROTOBUF_LIMIT:
        raise ModelError(
            f"model: its graph alone takes {proto.ByteSize()} bytes, more than protobuf holds; split it."
        )
    return proto.SerializeToString(), weights


# Element types that NumPy has itself; others stay in the graph's bytes.
_PLAIN = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.DOUBLE,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT16,
        ir.DataType.UINT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
    }
)
