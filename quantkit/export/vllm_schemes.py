"""How compressed-tensors writes down that a layer is quantized, and which of its schemes vLLM runs.

A scheme is the arguments of the weights, those of the input activations, and the format of what is stored: the
`config_groups` of a model's `quantization_config`. Each format here is the one in which vLLM looks for that scheme.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantkit.errors import SpecError
from quantkit.formats import E8M0, FP4_E2M1, FP8_E4M3, INT2, INT4, INT8, UINT2, UINT4, Format, QuantSpec
from quantkit.planning.presets import kind_of

_PACKED, _INT, _FLOAT = "pack-quantized", "int-quantized", "float-quantized"
_NVFP4, _MXFP4, _MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"

_ELEMENTS: Mapping[tuple[str, int, bool], Format] = {
    ("int", 8, True): INT8,
    ("int", 4, True): INT4,
    ("int", 4, False): UINT4,
    ("int", 2, True): INT2,
    ("int", 2, False): UINT2,
    ("float", 8, True): FP8_E4M3,
    ("float", 4, True): FP4_E2M1,
}

# Kind of the weights → kind of the activations ("" for float) → format.
FORMATS: Mapping[str, Mapping[str, str]] = {
    "int8": {"": _PACKED, "int8": _INT, "int8 token": _INT},
    "fp8": {"": _FLOAT, "fp8": _FLOAT, "fp8 token": _FLOAT},
    "fp8 tile": {"": _FLOAT, "fp8 block": _FLOAT},
    # vLLM's kernel of int4 by int8 takes its codes a byte each.
    "int4 block": {"": _PACKED, "int8 token": _INT, "fp8 token": _PACKED},
    "int4": {"": _PACKED, "int8 token": _INT},
    "uint4 block+zero": {"": _PACKED},
    "uint4+zero": {"": _PACKED},
    "int2 block": {"": _PACKED},
    "int2": {"": _PACKED},
    "uint2 block+zero": {"": _PACKED},
    "uint2+zero": {"": _PACKED},
    "nvfp4": {"": _NVFP4, "nvfp4": _NVFP4},
    "mxfp4": {"": _MXFP4, "mxfp4": _MXFP4},
    "mxfp8": {"": _MXFP8, "mxfp8": _MXFP8},
}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the layers of one group are quantized and stored."""

    weights: QuantSpec
    inputs: QuantSpec | None
    format: str

    @property
    def packed(self) -> bool:
        """Whether integers lie in words of 32 bits, rather than a byte each."""
        return self.format != _INT

    def to_dict(self) -> dict[str, Any]:
        """Return it as a group of `config_groups` has it, without the targets."""
        return {
            "format": self.format,
            "weights": _arguments(self.weights),
            "input_activations": None if self.inputs is None else _arguments(self.inputs),
            "output_activations": None,
        }


def scheme_of(node: str, weights: QuantSpec, inputs: QuantSpec | None) -> Scheme:
    """Return the scheme of a layer.

    Raises:
        SpecError: vLLM has none for these weights with these activations.
    """
    kind, by = kind_of(weights), "" if inputs is None else kind_of(inputs)
    known = FORMATS.get(kind, {})
    if by not in known:
        choices = " or ".join(other or "float" for other in known) or "none"
        raise SpecError(
            f"{node}: vllm has no {kind} weights with {by or 'float'} activations (with {choices}); choose another "
            "preset, or leave it in float with --exclude."
        )
    return Scheme(weights=weights, inputs=inputs, format=known[by])


def read_schemes(config: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Scheme]:
    """Return the schemes of the layers of these paths that a `quantization_config` of this package's quantizes.

    Raises:
        KeyError, ValueError: it is none.
    """
    found: dict[str, Scheme] = {}
    groups = [(_scheme(group), group["targets"]) for group in config["config_groups"].values()]
    for path in paths:
        for scheme, targets in groups:
            if path in targets or (targets == ["Linear"] and path not in config["ignore"]):
                found[path] = scheme
    return found


def _scheme(group: Mapping[str, Any]) -> Scheme:
    form, inputs = group["format"], group["input_activations"]
    return Scheme(
        weights=_spec(group["weights"], form, weights=True),
        inputs=None if inputs is None else _spec(inputs, form, weights=False),
        format=form,
    )


def _spec(arguments: Mapping[str, Any], form: str, *, weights: bool) -> QuantSpec:
    """The format that `_arguments` wrote down."""
    strategy, symmetric = arguments["strategy"], arguments["symmetric"]
    fmt = _ELEMENTS[arguments["type"], arguments["num_bits"], symmetric]
    tile = arguments["block_structure"]
    axis = {"channel": 0, "group": 1, "tensor_group": 1}.get(strategy) if weights else None
    dynamic: Literal["token", "block"] | None = None
    if arguments["dynamic"]:
        dynamic = "token" if strategy == "token" else "block"
        axis = None if dynamic == "token" else -1
    return QuantSpec(
        format=fmt,
        axis=axis,
        block_size=arguments["group_size"],
        block_shape=None if tile is None else (tile[0], tile[1]),
        symmetric=symmetric,
        scale_format={_NVFP4: FP8_E4M3, _MXFP4: E8M0, _MXFP8: E8M0}.get(form),
        dynamic=dynamic,
    )


def quantization_config(schemes: Mapping[str, Scheme], floats: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a model.

    Args:
        schemes: by the paths of the quantized layers.
        floats: the paths of linear layers that stay in float.
    """
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for path, scheme in schemes.items():
        found = scheme.to_dict()
        groups.setdefault(repr(found), (found, []))[1].append(path)
    formats = {found["format"] for found, _ in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            # Where all are alike, none need be named: a runtime that fuses layers finds its own too.
            f"group_{i}": {"targets": ["Linear"] if len(groups) == 1 else paths, **found}
            for i, (found, paths) in enumerate(groups.values())
        },
        "ignore": list(floats),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _arguments(spec: QuantSpec) -> dict[str, Any]:
    """One `QuantizationArgs`."""
    strategy = "tensor" if spec.axis is None else "channel"
    if spec.block_shape is not None:
        strategy = "block"
    elif spec.block_size is not None:
        strategy = "tensor_group" if spec.has_global_scale else "group"
    elif spec.dynamic == "token":
        strategy = "token"
    found: dict[str, Any] = {
        "num_bits": spec.format.bits,
        "type": "float" if spec.format.kind == "float" else "int",
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "group_size": spec.block_size,
        "block_structure": None if spec.block_shape is None else list(spec.block_shape),
        # The global scale of NVFP4 stays as it is while the model runs.
        "dynamic": "local" if spec.dynamic and spec.has_global_scale else spec.dynamic is not None,
        "actorder": None,
    }
    if spec.scale_format == E8M0 and spec.format.bits == 8:
        # All that tells MXFP8 from float8 in groups of 32.
        found["scale_dtype"] = "torch.uint8"
    return found
