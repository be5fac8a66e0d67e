"""What methods that protect accuracy save of a language model, and how long they take, beside ONNX Runtime's GPTQ.

    python benchmarks/protection.py model.onnx calib.npz eval.npz [int8 int4 …] [--peer]

The float model runs once for the statistics and once for the Gram matrices; each row then solves from those alone and
writes a file, as `quantkit export` does. Of each row: the seconds of solving, writing and checking, the perplexity, and
KL(float ‖ quantized) of the next token in milli-nats. Three bits, which no target stores, are solved and decoded in
place. `--peer` quantizes the same model with `onnxruntime.quantization`, whose GPTQ is the only one of its methods that
uses data.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

import quantkit
from quantkit.calibrators.weight_rounding import Rounding, round_weight
from quantkit.formats import INT3, QuantSpec, dequantize
from quantkit.gram_file import GramFile
from quantkit.graph import Graph, load_graph
from quantkit.graph.folding import apply_edits
from quantkit.graph.linears import find_linears
from quantkit.metrics import OutputComparison, OutputMetrics
from quantkit.pipeline import collect_grams
from quantkit.rescaling import Rescaled, layer_of
from quantkit.runtime import Session
from quantkit.statistics import GramMatrix

# The first word of a row's name, and what `export_model` is told.
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("int8 minmax", {"preset": "int8", "method": "minmax"}),
    ("int8 mse", {"preset": "int8", "method": "mse"}),
    ("int8 smoothquant, norms", {"preset": "int8", "method": "smoothquant", "folds": "norms"}),
    ("int8 smoothquant", {"preset": "int8", "method": "smoothquant"}),
    (
        "int8 smoothquant, products in float",
        {"preset": "int8", "method": "smoothquant", "exclude": "products"},
    ),
    ("int8 smoothquant, ort-cpu", {"preset": "int8", "method": "smoothquant", "target": "ort-cpu"}),
    ("int4 nearest", {"preset": "int4", "method": "amax"}),
    ("int4 mse", {"preset": "int4", "method": "mse"}),
    ("int4 weighted", {"preset": "int4", "method": "weighted"}),
    ("int4 awq", {"preset": "int4", "method": "awq"}),
    ("int4 gptq", {"preset": "int4", "method": "gptq"}),
    ("int4 awq+gptq", {"preset": "int4", "method": "awq+gptq"}),
    ("int4 g32 mse", {"preset": "int4", "group": 32, "method": "mse"}),
    ("int4 g32 gptq", {"preset": "int4", "group": 32, "method": "gptq"}),
    ("int3 nearest", {"rounding": "amax"}),
    ("int3 gptq", {"rounding": "gptq"}),
    ("int2 nearest", {"preset": "int2", "method": "amax"}),
    ("int2 gptq", {"preset": "int2", "method": "gptq"}),
    ("w4a8 smoothquant+gptq", {"preset": "w4a8", "method": "smoothquant+gptq"}),
)
_THREE_BITS = QuantSpec(format=INT3, axis=0, block_size=128)
_BATCH = 15


def decoded(graph: Graph, grams: Mapping[str, GramMatrix], rounding: Rounding) -> Graph:
    """The float model with every weight of a MatMul [K, N] rounded to three bits and decoded again."""
    found = apply_edits(graph, Rescaled().edits)
    for name, linear in find_linears(graph).items():
        if linear.op_type == "MatMul" and linear.in_axis == 0:
            layer = layer_of(graph, Rescaled(), linear, _THREE_BITS, grams)
            weight = found.node(name).inputs[linear.weight_index]
            assert weight is not None
            weight.const_value = ir.tensor(
                dequantize(round_weight(layer, rounding).qtensor), name=weight.name
            )
    return found


def products(graph: Graph) -> list[str]:
    """The MatMuls of two activations."""
    return [
        str(node.name)
        for node in graph.model.graph
        if node.op_type == "MatMul" and not any(v is not None and v.is_initializer() for v in node.inputs)
    ]


def logits(model: ir.Model | Path, name: str, output: str, ids: np.ndarray) -> Iterator[np.ndarray]:
    """The model's output, some rows at a time."""
    session = Session(model, optimize=False)
    for start in range(0, len(ids), _BATCH):
        yield session.run({name: ids[start : start + _BATCH]})[output]


def compare(
    reference: list[np.ndarray], found: Iterator[np.ndarray], output: str, ids: np.ndarray
) -> OutputMetrics:
    """How far the outputs are from the reference."""
    comparison = OutputComparison(output)
    following = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -100)], axis=1)
    for index, (exact, other) in enumerate(zip(reference, found, strict=True)):
        comparison.update(exact, other, following[index * _BATCH : index * _BATCH + len(exact)])
    return comparison.result()


def peer_gptq(path: Path, ids: np.ndarray) -> onnx.ModelProto:
    """The model as ONNX Runtime's GPTQ quantizes it: INT4, blocks of 128, symmetric."""
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        GPTQWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.row = 0

        def get_next(self) -> np.ndarray | None:
            self.row += 1
            # Rows as they are: of a dict it would look at every array with torch.
            return ids[self.row - 1 : self.row] if self.row <= len(ids) else None

    quantizer = MatMulNBitsQuantizer(
        onnx.load(path),
        bits=4,
        block_size=128,
        is_symmetric=True,
        algo_config=GPTQWeightOnlyQuantConfig(calibration_data_reader=Reader(), block_size=128),
    )
    quantizer.process()
    return quantizer.model.model


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Accuracy of a language model under the methods that protect it."
    )
    parser.add_argument("model", type=Path, help="the float model")
    parser.add_argument("calib", type=Path, help=".npz with `input_ids`, integers of shape (rows, tokens)")
    parser.add_argument("data", type=Path, help=".npz alike, to judge with")
    parser.add_argument("names", nargs="*", help="rows by the beginning of their names; all unless given")
    parser.add_argument("--calib-rows", type=int, default=64, help="rows of calibration data (64)")
    parser.add_argument("--rows", type=int, default=150, help="rows to judge with (150)")
    parser.add_argument(
        "--peer", action="store_true", help="also run ONNX Runtime's GPTQ (INT4, blocks of 128)"
    )
    given = parser.parse_args()

    graph = load_graph(given.model)
    fed, output = graph.inputs[0].name, graph.outputs[0]
    ids = np.load(given.data)["input_ids"][: given.rows]
    reference = list(logits(graph.model, fed, output, ids))
    with tempfile.TemporaryDirectory() as folder:
        cache, file = Path(folder) / "model.calib", Path(folder) / "model.onnx"
        start = time.perf_counter()
        quantkit.calibrate_model(graph, given.calib, samples=given.calib_rows).save(cache)
        observed = time.perf_counter() - start
        work = collect_grams(graph, given.calib, cache.with_suffix(".gram"), samples=given.calib_rows)
        print(
            f"{given.model.name}: statistics in {observed:.1f} s, {len(work.views)} Gram matrices in "
            f"{time.perf_counter() - start - observed:.1f} s; {len(ids)} rows"
        )
        print(f"{'':<38}{'solve s':>9}{'perplexity':>12}{'KL mnat':>9}")

        def show(name: str, time_s: float, model: ir.Model | Path) -> None:
            found = compare(reference, logits(model, fed, output, ids), output, ids)
            print(
                f"{name:<38}{time_s:>9.1f}{found.perplexity_quantized:>12.4f}{found.kl_mnat:>9.2f}",
                flush=True,
            )

        for name, options in ROWS:
            if given.names and not name.startswith(tuple(given.names)):
                continue
            start = time.perf_counter()
            if "rounding" in options:
                model = decoded(graph, GramFile(cache.with_suffix(".gram")), options["rounding"])
                show(name, time.perf_counter() - start, model.model)
                continue
            told = {"target": "ort", **options}
            told["exclude"] = products(graph) if "exclude" in options else ()
            quantkit.export_model(graph, cache, out=file, **told)
            show(name, time.perf_counter() - start, file)
    if given.peer:
        rows = np.load(given.calib)["input_ids"][: given.calib_rows]
        start = time.perf_counter()
        quantized = peer_gptq(given.model, rows)
        show("int4 onnxruntime gptq", time.perf_counter() - start, ir.serde.deserialize_model(quantized))


if __name__ == "__main__":
    main()
