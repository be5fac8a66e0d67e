"""Models for ONNX Runtime's CPU provider: uint8 activations and int8 weights, so placed that its integer kernels fuse.

A convolution fuses to QLinearConv only when its output is quantized too, and fastest from uint8 activations and
int8 weights; the Q stands behind the Relu or Clip, which it then absorbs. Adds between convolutions become
QLinearAdd. MatMul and Gemm fuse with a float output, which keeps more of the accuracy. Biases are int32.
"""

from dataclasses import dataclass, replace

from quantkit.export.ort import TARGET as ORT
from quantkit.export.ort import OrtEmitter
from quantkit.formats import UINT8, QuantSpec
from quantkit.planning.presets import Target

TARGET = replace(ORT, name="ort-cpu", int8_activations=QuantSpec(format=UINT8, symmetric=False), outputs=True)


@dataclass(frozen=True)
class OrtCpuEmitter(OrtEmitter):
    """The emitter of `--target ort-cpu`; it writes as `ort` does."""

    target: Target = TARGET
