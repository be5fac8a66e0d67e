"""How much memory an export takes, beside the size of the model: weights are read, solved and written one by one.

    python benchmarks/export_memory.py
    python benchmarks/export_memory.py --gigabytes 2 --preset int4 nvfp4 --target tensorrt ort

A chain of MatMuls of 4096 × 4096 with external data is made in a temporary folder, and each export runs in a process of
its own. `peak` is what the process held at most beyond what it held with everything imported; `share` is that over the
model's bytes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

SIDE = 4096

_EXPORT = """
import sys
import onnxruntime, quantkit, quantkit.exporting

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

before = peak()
exported = quantkit.export_model(sys.argv[1], preset=sys.argv[2], target=sys.argv[3], out=sys.argv[4])
print(peak() - before, exported.size_bytes)
"""


def make_model(path: Path, layers: int) -> None:
    """Write a chain of MatMuls; no two weights are equal."""
    weight = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32) / np.sqrt(SIDE)
    shape = ir.Shape([SIDE, SIDE])
    value = ir.val("x", ir.DataType.FLOAT, ["batch", SIDE])
    inputs, nodes, initializers = [value], [], []
    for layer in range(layers):
        tensor = ir.LazyTensor(
            lambda layer=layer: ir.tensor(np.roll(weight, layer, axis=0)), ir.DataType.FLOAT, shape
        )
        stored = ir.Value(
            name=f"w{layer}", shape=shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor
        )
        initializers.append(stored)
        nodes.append(ir.node("MatMul", [value, stored], name=f"layers.{layer}.MatMul"))
        value = nodes[-1].outputs[0]
        value.name, value.type = f"h{layer}", ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(["batch", SIDE])
    graph = ir.Graph(
        inputs, [value], nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="chain"
    )
    ir.save(ir.Model(graph, ir_version=10), path, external_data=f"{path.name}.data")


def main() -> None:
    """Print one line an export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--preset", nargs="+", default=["int4"])
    parser.add_argument("--target", nargs="+", default=["tensorrt", "ort"])
    arguments = parser.parse_args()
    layers = max(1, round(arguments.gigabytes * 1e9 / (4 * SIDE * SIDE)))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "chain.onnx"
        make_model(model, layers)
        size = 4 * SIDE * SIDE * layers
        print(f"model: {layers} × {SIDE} × {SIDE}, {size / 1e9:.2f} GB of float32")
        for preset in arguments.preset:
            for target in arguments.target:
                words = [str(model), preset, target, str(Path(folder) / f"{preset}.{target}.onnx")]
                start = time.perf_counter()
                found = subprocess.run(
                    [sys.executable, "-c", _EXPORT, *words], check=True, capture_output=True, text=True
                )
                peak, written = map(int, found.stdout.split())
                print(
                    f"{preset:10} {target:10} peak {peak / 1e6:6.0f} MB, share {peak / size:.2f}, "
                    f"wrote {written / 1e6:.0f} MB in {time.perf_counter() - start:.0f} s"
                )


if __name__ == "__main__":
    main()
