"""What one QuantizeLinear or DequantizeLinear node says: the type of its codes, its scales, zero points and blocks."""

import numpy as np
import onnx_ir as ir

from quantkit.errors import SpecError
from quantkit.formats import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    INT2,
    INT4,
    INT8,
    INT16,
    UINT2,
    UINT4,
    UINT8,
    UINT16,
    Format,
    QParams,
    QuantSpec,
)

CODE_FORMATS = {
    ir.DataType.from_numpy(f.dtype): f
    for f in (
        *(INT2, UINT2, INT4, UINT4, INT8, UINT8, INT16, UINT16),
        *(FP4_E2M1, FP8_E4M3, FP8_E5M2),
    )
}


def code_type(node: ir.Node) -> ir.DataType:
    """Return the type of the codes."""
    if node.op_type == "DequantizeLinear":
        codes = node.inputs[0]
        assert codes is not None and codes.dtype is not None
        return codes.dtype
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    named = _int(node, "output_dtype", 0)
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    # ONNX's own default.
    return ir.DataType(named) if named else ir.DataType.UINT8


def stored_parameters(node: ir.Node) -> tuple[QuantSpec, QParams] | str:
    """Return how the node quantizes, or why that cannot be told, in words that follow its name."""
    parameters = _parameters(node)
    if isinstance(parameters, str):
        return parameters
    scale, zero, global_scale, scale_format = parameters
    fmt = CODE_FORMATS.get(code_type(node))
    if fmt is None:
        return f"its codes are {code_type(node).name.lower()}"
    data = node.inputs[0]
    assert data is not None
    rank = None if data.shape is None else len(data.shape)
    spec = _spec(node, fmt, scale, zero, scale_format, rank)
    if isinstance(spec, str):
        return spec
    if spec.axis is None:
        scale = scale.reshape(())
    held = None
    if fmt.kind == "integer":
        held = np.zeros(scale.shape, fmt.dtype) if zero is None else zero.reshape(scale.shape)
    return spec, QParams(scale, held, global_scale)


def stored_scale(node: ir.Node) -> np.ndarray | None:
    """Return the scales as float32 where they are stored."""
    array = _array(node.inputs[1])
    return None if array is None else array.astype(np.float32)


def same_parameters(node: ir.Node, other: ir.Node) -> bool:
    """Tell whether two nodes have the same scales, zero points and blocks."""
    if node is other:
        return True
    for index in (1, 2):
        values = [n.inputs[index] if index < len(n.inputs) else None for n in (node, other)]
        if values[0] is values[1]:
            continue
        arrays = [_array(v) for v in values]
        if any(v is not None and a is None for v, a in zip(values, arrays, strict=True)):
            return False
        # A zero point that is left out is 0.
        first, second = (np.zeros(1) if a is None else a.astype(np.float32).reshape(-1) for a in arrays)
        if not (first.size == second.size or 1 in (first.size, second.size)) or np.any(first != second):
            return False
    return _int(node, "block_size", 0) == _int(other, "block_size", 0)


def _parameters(
    node: ir.Node,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, Format | None] | str:
    """Scales, zero points, the scale of scales and the type of scales; or why they are not known."""
    scale, global_scale, scale_format = node.inputs[1], None, None
    assert scale is not None
    producer = scale.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        outer, codes = _array(producer.inputs[1]), _array(producer.inputs[0])
        if outer is None or codes is None or outer.size != 1 or codes.dtype != FP8_E4M3.dtype:
            return "its scales are computed"
        array: np.ndarray | None = codes
        global_scale, scale_format = outer.astype(np.float32).reshape(()), FP8_E4M3
    else:
        array = _array(scale)
        if array is not None and array.dtype == E8M0.dtype:
            scale_format = E8M0
    if array is None:
        return "its scales are computed"
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    points = None if zero is None else _array(zero)
    if zero is not None and points is None:
        return "its zero points are computed"
    return array.astype(np.float32), points, global_scale, scale_format


def _spec(
    node: ir.Node,
    fmt: Format,
    scale: np.ndarray,
    zero: np.ndarray | None,
    scale_format: Format | None,
    rank: int | None,
) -> QuantSpec | str:
    middle = fmt.middle if fmt.kind == "integer" else 0
    symmetric = fmt.kind == "float" or bool(np.all((0 if zero is None else zero.astype(np.int32)) == middle))
    size = _int(node, "block_size", 0)
    axis: int | None = None
    if size or scale.size > 1:
        axis = _int(node, "axis", 1)
        axis = axis % rank if rank else axis
    try:
        return QuantSpec(
            format=fmt,
            axis=axis,
            block_size=size or None,
            symmetric=symmetric,
            scale_format=scale_format,
        )
    except SpecError as error:
        return str(error).rstrip(".")


def _array(value: ir.Value | None) -> np.ndarray | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
