"""Where a tensor comes from, behind operators that only lay it out anew: is it quantized already, is it stored?"""

import onnx_ir as ir

# What comes out has the values that went in.
LAYOUT_OPS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def source_of(value: ir.Value) -> ir.Value:
    """Return the tensor that `value` is another layout or type of; `value` itself where it is computed."""
    producer = value.producer()
    while producer is not None and producer.domain == "" and producer.op_type in LAYOUT_OPS:
        first = producer.inputs[0]
        if first is None:
            break
        value, producer = first, first.producer()
    return value


def is_dequantized(value: ir.Value) -> bool:
    """Tell whether the model itself quantizes this tensor: it is what a DequantizeLinear puts out."""
    producer = source_of(value).producer()
    return producer is not None and producer.domain == "" and producer.op_type == "DequantizeLinear"


def is_stored(value: ir.Value) -> bool:
    """Tell whether a tensor is constant: an initializer, or one behind a Q/DQ pair or a DequantizeLinear alone."""
    if value.is_initializer() or not is_dequantized(value):
        return value.is_initializer()
    source = source_of(value)
    producer = source.producer()
    while producer is not None and producer.op_type in ("DequantizeLinear", "QuantizeLinear"):
        first = producer.inputs[0]
        if first is None:
            return False
        source = source_of(first)
        producer = source.producer()
    return source.is_initializer()
