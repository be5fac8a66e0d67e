"""Folders for vLLM, as compressed-tensors writes them: `model.safetensors`, `config.json`, and `names.json` besides.

Every parameter of the model is in it: linear weights as [out, in], quantized ones as their codes and scales, all others
in float under their own names (a name map moves them, and leaves out what the runtime makes itself). `config.json` is
that of the model's own folder, where one lies there, with the `quantization_config` added. `names.json` says what
everything is called: a name map to edit, and the way back to the ONNX model.

vLLM computes its own 8-bit scales for the inputs of 4-bit weights, token by token. Convolutions, products of two
activations and stacks of matrices stay in float.

Sources: https://github.com/neuralmagic/compressed-tensors, `compressors/` and `quantization/quant_args.py`; vLLM,
`model_executor/layers/quantization/compressed_tensors/`.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantkit.errors import ExportError
from quantkit.export.linear_layers import Parameters, find_parameters
from quantkit.export.module_names import NameMap, check_name_map, load_name_map
from quantkit.export.safetensors_file import (
    FILE,
    INDEX,
    ReadTensor,
    StoredTensor,
    read_safetensors,
    write_safetensors,
)
from quantkit.export.verify import Verification
from quantkit.export.vllm_schemes import FORMATS, quantization_config
from quantkit.export.vllm_tensors import QuantizedLayer, float_tensors, quantized_layers, slabs, tensors_of
from quantkit.formats import INT8, QuantSpec
from quantkit.formats.compressed_tensors import unpack_codes, unpack_qparams
from quantkit.formats.packing import code_bits
from quantkit.graph import Graph
from quantkit.planning.plan import Plan
from quantkit.planning.presets import Preset, Target, kind_of

CONFIG, NAMES = "config.json", "names.json"
# A reciprocal and back costs half a unit in the last place each way.
_RECIPROCAL = 2.0**-22


@dataclass(frozen=True, kw_only=True)
class _VllmTarget(Target):
    def activation_spec(self, preset: Preset) -> QuantSpec | None:
        """Return how vLLM quantizes the activations of a preset: of 4-bit weights per token, as the model runs."""
        found = super().activation_spec(preset)
        if found is not None and preset.weights.format.bits == 4 and kind_of(found) in ("int8", "fp8"):
            return QuantSpec(format=found.format, dynamic="token")
        return found


TARGET: Target = _VllmTarget(
    name="vllm",
    int8_activations=QuantSpec(format=INT8),
    outputs=False,
    integer_bias=False,
    whole_blocks=True,
    layers_only=True,
    matrices=frozenset(FORMATS),
    convolutions=frozenset(),
    activations=frozenset(kind for by in FORMATS.values() for kind in by if kind),
)


@dataclass(frozen=True)
class VllmEmitter:
    """The emitter of `--target vllm`.

    name_map: a name in the model → its name in the folder, or the path of a file with that; see `load_name_map`.

    Raises:
        SpecError: that is no name map.
    """

    target: Target = TARGET
    name_map: NameMap | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        given = self.name_map
        if isinstance(given, str | os.PathLike):
            # Read once, before long work.
            object.__setattr__(self, "name_map", load_name_map(given))
        elif given is not None:
            check_name_map(given)

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of the names that its files can have."""
        return (CONFIG, NAMES, FILE, INDEX, "model-*-of-*.safetensors")

    def write(self, graph: Graph, plan: Plan, folder: Path, *, floats: ir.DataType | None = None) -> None:
        """Write the files into an empty folder; one weight is in memory at a time.

        Args:
            graph, plan: the model and what becomes of it.
            folder: where to write.
            floats: the type of what is float32 and not quantized; None for float32.

        Raises:
            PlanError: the plan does not fit the graph, or the graph is quantized already.
            SpecError: vLLM has no such layers, or the name map does not fit the model.
        """
        parameters = self._parameters(graph, plan)
        quantized = quantized_layers(graph, plan, parameters)
        others = list(float_tensors(graph, parameters, floats))
        codes = chain.from_iterable(tensors_of(layer, graph) for layer in quantized)
        write_safetensors(sorted(chain(codes, others), key=lambda t: t.name), folder)
        config = _config(graph, parameters, quantized, others)
        _write_json(folder / CONFIG, config)
        _write_json(folder / NAMES, parameters.name_map())

    def verify(
        self, folder: Path, graph: Graph, plan: Plan, *, floats: ir.DataType | None = None
    ) -> Verification:
        """Read the folder back: every code, scale and float is the plan's, and nothing else is there.

        Raises:
            ExportError: it is not.
        """
        parameters = self._parameters(graph, plan)
        quantized = quantized_layers(graph, plan, parameters)
        try:
            found = read_safetensors(folder)
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError) as error:
            raise ExportError(
                f"{folder.name}: what was written cannot be read ({error}); report this."
            ) from error
        groups = config["quantization_config"]["config_groups"].values()
        for layer in quantized:
            if not _is_written(found, layer, graph):
                raise _differs(folder, f"weight {layer.layer.path}")
            targets = [g["targets"] for g in groups if g["format"] == layer.scheme.format]
            if not any(t == ["Linear"] or layer.layer.path in t for t in targets):
                raise _differs(folder, f"the group of {layer.layer.path}")
        for tensor in float_tensors(graph, parameters, floats):
            if not _is_same(found.pop(tensor.name, None), tensor):
                raise _differs(folder, tensor.name)
        if found:
            raise _differs(folder, min(found))
        return Verification(tensor=quantized[0].layer.weight if quantized else "", plan_sqnr_db=float("inf"))

    def _parameters(self, graph: Graph, plan: Plan) -> Parameters:
        names = self.name_map
        assert not isinstance(names, str | os.PathLike)
        return find_parameters(graph, plan.weights, names)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_written(found: dict[str, ReadTensor], quantized: QuantizedLayer, graph: Graph) -> bool:
    """Whether the tensors of a quantized layer say what the plan does; they are taken out of `found`."""
    prefix, scheme = f"{quantized.layer.path}.", quantized.scheme
    names = {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale"}
    names |= {"weight_shape", "input_scale", "input_global_scale"}
    held = {name: found.pop(prefix + name).array() for name in names if prefix + name in found}
    spec, planned = scheme.weights, quantized.qparams
    codes = quantized.codes(graph)
    rows, columns = codes.shape
    stored = held.get("weight_packed", held.get("weight"))
    if stored is None or stored.shape[0] != rows or "weight_scale" not in held:
        return False
    if "weight_shape" in held and held["weight_shape"].tolist() != [rows, columns]:
        return False
    for piece in slabs(codes.shape):
        part = unpack_codes(stored[piece], spec, columns, packed=scheme.packed)
        if part.shape != codes[piece].shape or np.any(
            code_bits(part, spec.format) != code_bits(codes[piece], spec.format)
        ):
            return False
    qparams = unpack_qparams(held, spec, codes.shape, packed=scheme.packed)
    if not np.array_equal(qparams.scale, planned.scale):
        return False
    if planned.zero_point is not None and not _equal(qparams.zero_point, planned.zero_point):
        return False
    if spec.has_global_scale and not _is_near(qparams.global_scale, planned.global_scale):
        return False
    inputs = quantized.input_scales()
    return all(_equal(held.get(name), scale) for name, scale in inputs.items())


def _equal(found: NDArray[Any] | None, planned: NDArray[Any]) -> bool:
    return found is not None and np.array_equal(found, planned)


def _is_near(found: NDArray[np.float32] | None, planned: NDArray[np.float32] | None) -> bool:
    return found is not None and planned is not None and bool(np.abs(found / planned - 1) <= _RECIPROCAL)


def _is_same(found: ReadTensor | None, tensor: StoredTensor) -> bool:
    """Whether a tensor in float is in the folder bit for bit."""
    if found is None or found.dtype != tensor.dtype or found.shape != tensor.shape:
        return False
    held, at = found.array().reshape(-1).view(np.uint8), 0
    for part in tensor.parts():
        wanted = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        if not np.array_equal(held[at : at + wanted.size], wanted):
            return False
        at += wanted.size
    return at == held.size


def _differs(folder: Path, what: str) -> ExportError:
    return ExportError(
        f"{folder.name}: {what} is not what the plan has; the folder was not kept; report this."
    )


def _config(
    graph: Graph, parameters: Parameters, quantized: list[QuantizedLayer], others: list[StoredTensor]
) -> dict[str, Any]:
    """What `config.json` holds: the model's own, and how its layers are quantized."""
    config = _own_config(graph)
    sizes: Counter[str] = Counter()
    for tensor in others:
        sizes[str(tensor.dtype)] += tensor.nbytes
    if sizes:
        # transformers renamed it; where a model has one already, that is the one.
        config["dtype" if "dtype" in config else "torch_dtype"] = max(sorted(sizes), key=lambda d: sizes[d])
    left = [layer.path for layer in parameters.layers if layer.linear and layer.plan is None]
    schemes = {layer.layer.path: layer.scheme for layer in quantized}
    config["quantization_config"] = quantization_config(schemes, left)
    return config


def _own_config(graph: Graph) -> dict[str, Any]:
    """The `config.json` beside the model, where it is a language model's; {} without one."""
    path = None if graph.path is None else graph.path.parent / CONFIG
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and {"model_type", "architectures"} & found.keys() else {}
