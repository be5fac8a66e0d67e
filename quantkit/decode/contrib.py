"""ONNX Runtime's own operators over packed weights, as the float weight that they stand for."""

import numpy as np
import onnx_ir as ir

from quantkit.decode.arithmetic import Arithmetic
from quantkit.decode.constants import Constant, stored
from quantkit.errors import ModelError
from quantkit.formats.packing import unpack_bits

_UINT8 = ir.DataType.UINT8


def decode_matmul_nbits(node: ir.Node, a: Arithmetic) -> None:
    """Write MatMulNBits as MatMul with a float weight [K, N], and an Add where it has a bias."""
    k, n, bits, size = (_int(node, name, 4) for name in ("K", "N", "bits", "block_size"))
    packed, scales, zero = _constants(node, (1, 2, 3))
    assert packed is not None and scales is not None
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise ModelError(
            f"{node.name}: MatMulNBits with g_idx, an order of its rows, which is not read here; "
            "export it without act-order."
        )
    blocks, dtype = -(-k // size), scales.dtype

    def read() -> np.ndarray:
        codes = unpack_bits(packed.read().reshape(n, blocks, -1), bits, size).astype(np.float32)
        if zero is None:
            codes -= np.float32(2 ** (bits - 1))
        elif zero.dtype == _UINT8:
            codes -= unpack_bits(zero.read().reshape(n, -1), bits, blocks).astype(np.float32)[..., None]
        else:
            codes -= zero.read().astype(np.float32).reshape(n, blocks, 1)
        codes *= scales.read().astype(np.float32).reshape(n, blocks, 1)
        return np.ascontiguousarray(codes.reshape(n, -1)[:, :k].T).astype(dtype.numpy(), copy=False)

    weight = a.stored(Constant(dtype=dtype, shape=(k, n), read=read).tensor())
    product = a.typed(a.op("MatMul", node.inputs[0], weight), dtype)
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    a.replace(product if bias is None else a.typed(a.op("Add", product, bias), dtype))


def decode_quantized_gather(node: ir.Node, a: Arithmetic) -> None:
    """Write GatherBlockQuantized as Gather from a float table."""
    axis, size = _int(node, "quantize_axis", 1), _int(node, "block_size", 128)
    bits = _int(node, "bits", 4)
    table, scales, zero = _constants(node, (0, 2, 3))
    assert table is not None and scales is not None
    # Bytes hold codes packed along the last axis, and are unsigned with the middle code for zero.
    packed = table.dtype == _UINT8
    shape = (*table.shape[:-1], table.shape[-1] * 8 // bits) if packed else table.shape
    dtype = scales.dtype

    def unpacked(constant: Constant, length: int) -> np.ndarray:
        codes = unpack_bits(constant.read(), bits, length) if packed else constant.read()
        return codes.astype(np.float32)

    def read() -> np.ndarray:
        codes, scale = unpacked(table, shape[-1]), scales.read().astype(np.float32)
        if zero is not None:
            codes -= _repeated(unpacked(zero, scale.shape[-1]), size, axis, shape[axis])
        elif packed:
            codes -= np.float32(2 ** (bits - 1))
        codes *= _repeated(scale, size, axis, shape[axis])
        return codes.astype(dtype.numpy(), copy=False)

    weight = a.stored(Constant(dtype=dtype, shape=shape, read=read).tensor())
    rows = a.op("Gather", weight, node.inputs[1], axis=_int(node, "gather_axis", 0))
    a.replace(a.typed(rows, dtype))


def _constants(node: ir.Node, indices: tuple[int, ...]) -> list[Constant | None]:
    found: list[Constant | None] = []
    for index in indices:
        value = node.inputs[index] if index < len(node.inputs) else None
        constant = None if value is None else stored(value)
        if constant is None and (value is not None or index < 3):
            raise ModelError(
                f"{node.name}: {node.op_type} whose input {index} is computed; only stored weights are read here."
            )
        found.append(constant)
    return found


def _repeated(values: np.ndarray, size: int, axis: int, length: int) -> np.ndarray:
    """One value an element, from one a block; the last block may be short."""
    return np.repeat(values, size, axis=axis).take(np.arange(length), axis=axis)


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
