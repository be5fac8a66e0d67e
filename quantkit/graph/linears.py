"""Linear operators with a constant weight, as the one thing they are: y = W x over vectors of the input."""

from dataclasses import dataclass

import onnx_ir as ir

from quantkit.graph.model import Graph
from quantkit.graph.sites import find_sites


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which vectors of its input a convolution multiplies: ONNX's attributes, one number for every spatial axis.

    `pads` are None where `auto_pad` ("SAME_UPPER", "SAME_LOWER") makes them of the input's size.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    auto_pad: str = "NOTSET"
    groups: int = 1


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A Conv, MatMul or Gemm whose weight is constant.

    Attributes:
        node: the name of the node.
        op_type: its operator.
        tensor, input_index: the tensor that it reads, and as which of its inputs.
        input_axis: the axis of that tensor which is contracted (a convolution: of its channels).
        weight, weight_index: the weight's name, and which input it is.
        out_axis: the weight's axis of output channels.
        in_axis: the weight's axis of input channels, those of one group for a convolution.
        bias: the constant added by the node itself, "" where there is none.
        window: for a convolution; else None.
        size: K, the length of the vectors: channels per group · kernel size.
        channels: of the input: K, or channels of all groups.
    """

    node: str
    op_type: str
    tensor: str
    input_index: int
    input_axis: int
    weight: str
    weight_index: int
    out_axis: int
    in_axis: int
    bias: str
    window: Window | None
    size: int
    channels: int

    @property
    def groups(self) -> int:
        """The groups of a convolution; 1 of everything else."""
        return 1 if self.window is None else self.window.groups

    @property
    def output_axis(self) -> int:
        """The axis of the output's channels, negative; that of a convolution's input too."""
        if self.window is not None:
            return -1 - len(self.window.kernel)
        return self.input_axis

    @property
    def view(self) -> str:
        """A name for the vectors that it multiplies: linears of one view share a Gram matrix."""
        if self.window is None:
            return f"{self.tensor} axis {self.input_axis}"
        w = self.window
        words = [
            f"{name} {'x'.join(map(str, values))}"
            for name, values in (("kernel", w.kernel), ("strides", w.strides), ("dilations", w.dilations))
        ]
        pads = w.auto_pad if w.pads is None else "x".join(map(str, w.pads))
        return f"{self.tensor} {' '.join(words)} pads {pads} groups {w.groups}"


def find_linears(graph: Graph) -> dict[str, Linear]:
    """Return the linear operators that can be quantized and have one constant weight, by node, in graph order.

    A ConvTranspose is none of them (a vector of its input goes to many places of its output), nor is a MatMul with
    a stack of weights or a Gemm whose alpha is not 1.
    """
    found: dict[str, Linear] = {}
    for site in find_sites(graph)[0]:
        if site.role != "weight" or site.op_type == "ConvTranspose":
            continue
        node = graph.node(site.node)
        linear = _convolution(node) if site.op_type == "Conv" else _product(node, site.index)
        if linear is not None:
            found[site.node] = linear
    return found


def _convolution(node: ir.Node) -> Linear | None:
    data, weight = node.inputs[0], node.inputs[1]
    assert data is not None and weight is not None and weight.shape is not None
    shape = tuple(d for d in weight.shape if isinstance(d, int))
    spatial, groups = len(shape) - 2, _int(node, "group", 1)
    auto_pad = _text(node, "auto_pad", "NOTSET")
    fixed = auto_pad in ("NOTSET", "VALID")
    pads = _ints(node, "pads", (0,) * (2 * spatial)) if auto_pad == "NOTSET" else (0,) * (2 * spatial)
    window = Window(
        kernel=shape[2:],
        strides=_ints(node, "strides", (1,) * spatial),
        dilations=_ints(node, "dilations", (1,) * spatial),
        pads=pads if fixed else None,
        auto_pad="NOTSET" if fixed else auto_pad,
        groups=groups,
    )
    size = 1
    for length in shape[1:]:
        size *= length
    return Linear(
        node=str(node.name),
        op_type=node.op_type,
        tensor=str(data.name),
        input_index=0,
        input_axis=1,
        weight=str(weight.name),
        weight_index=1,
        out_axis=0,
        in_axis=1,
        bias=_bias(node),
        window=window,
        size=size,
        channels=shape[1] * groups,
    )


def _product(node: ir.Node, weight_index: int) -> Linear | None:
    data, weight = node.inputs[1 - weight_index], node.inputs[weight_index]
    assert data is not None and weight is not None and weight.shape is not None
    if len(weight.shape) != 2:
        return None
    if node.op_type == "Gemm":
        if _float(node, "alpha", 1.0) != 1.0 or _int(node, "transA", 0):
            return None
        in_axis = 1 if _int(node, "transB", 0) else 0
    else:
        # W @ X contracts the weight's columns and the last but one axis of X.
        in_axis = 0 if weight_index == 1 else 1
    size = weight.shape[in_axis]
    assert isinstance(size, int)
    return Linear(
        node=str(node.name),
        op_type=node.op_type,
        tensor=str(data.name),
        input_index=1 - weight_index,
        input_axis=-1 if weight_index == 1 else -2,
        weight=str(weight.name),
        weight_index=weight_index,
        out_axis=1 - in_axis,
        in_axis=in_axis,
        bias=_bias(node),
        window=None,
        size=size,
        channels=size,
    )


def _bias(node: ir.Node) -> str:
    value = node.inputs[2] if len(node.inputs) > 2 and node.op_type in ("Conv", "Gemm") else None
    return str(value.name) if value is not None and value.is_initializer() else ""


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _float(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return default if attribute is None else tuple(attribute.as_ints())


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()
