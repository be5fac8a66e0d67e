"""What AWQ and GPTQ save of a language model in few bits, and how long they take, beside ONNX Runtime's GPTQ.

    python benchmarks/protection.py model.onnx calib.npz eval.npz [int4 int3 …] [--peer]

Calibration runs the float model once for the Gram matrices of all layers; each row then solves from those alone. Of
each row: the seconds of solving, the perplexity, and KL(float ‖ quantized) of the next token in milli-nats. `--peer`
quantizes the same model with `onnxruntime.quantization`, whose GPTQ is the only one of its methods that uses data.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from quantkit.calibrators.weight_rounding import Rounding, round_weight
from quantkit.data import open_data
from quantkit.formats import INT3, QuantSpec, dequantize
from quantkit.formats.presets import weight_spec
from quantkit.graph import Graph, load_graph
from quantkit.graph.folding import apply_edits
from quantkit.graph.groups import find_groups
from quantkit.graph.linears import find_linears
from quantkit.metrics import OutputComparison, OutputMetrics
from quantkit.observe_gram import divide_grams, observe_grams
from quantkit.rescaling import Rescaled, layer_of, scale_for_awq
from quantkit.runtime import Session
from quantkit.statistics import GramMatrix

SPECS = {
    "int4 g128": weight_spec("int4", channel_axis=1, contraction_axis=0),
    "int4 g32": weight_spec("int4", channel_axis=1, contraction_axis=0, block_size=32),
    "int3 g128": QuantSpec(format=INT3, axis=0, block_size=128),
    "int2 g32": weight_spec("int2", channel_axis=1, contraction_axis=0),
    "nvfp4": weight_spec("nvfp4", channel_axis=1, contraction_axis=0),
    "mxfp4": weight_spec("mxfp4", channel_axis=1, contraction_axis=0),
}
# Name of the row, whether AWQ's scales come first, and the rounding.
METHODS: tuple[tuple[str, bool, Rounding], ...] = (
    ("nearest", False, "amax"),
    ("mse", False, "mse"),
    ("mse weighted", False, "weighted"),
    ("output", False, "output"),
    ("awq", True, "output"),
    ("gptq", False, "gptq"),
    ("awq+gptq", True, "gptq"),
)
_BATCH = 15


def solved(
    graph: Graph, grams: Mapping[str, GramMatrix], spec: QuantSpec, scaled: bool, rounding: Rounding
) -> Graph:
    """The float model with every weight of a MatMul [K, N] rounded and decoded again."""
    linears = {
        name: linear
        for name, linear in find_linears(graph).items()
        if linear.op_type == "MatMul" and linear.in_axis == 0
    }
    rescaled = Rescaled()
    if scaled:
        specs = dict.fromkeys(linears, spec)
        least = 0.25 if rounding == "gptq" else 0.0
        rescaled = scale_for_awq(graph, find_groups(graph), specs, grams, least_gain=least)
    found = apply_edits(graph, rescaled.edits)
    for name, linear in linears.items():
        layer = layer_of(graph, rescaled, linear, spec, grams)
        rounded = dequantize(round_weight(layer, rounding, signed_scales=spec.scale_format is None).qtensor)
        weight = found.node(name).inputs[linear.weight_index]
        assert weight is not None
        weight.const_value = ir.tensor(rounded, name=weight.name)
    return found


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
    parser = argparse.ArgumentParser(description="Accuracy of a language model under AWQ and GPTQ.")
    parser.add_argument("model", type=Path, help="the float model")
    parser.add_argument("calib", type=Path, help=".npz with `input_ids`, integers of shape (rows, tokens)")
    parser.add_argument("data", type=Path, help=".npz alike, to judge with")
    parser.add_argument("names", nargs="*", help="formats by the beginning of their names; all unless given")
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
    start = time.perf_counter()
    source = open_data(given.calib, graph.inputs, samples=given.calib_rows)
    work = divide_grams(graph, source, find_linears(graph).values())
    grams = dict(observe_grams(graph, source, work))
    print(
        f"{given.model.name}: {len(grams)} Gram matrices in {time.perf_counter() - start:.1f} s; {len(ids)} rows"
    )
    print(f"{'weights':<12}{'method':<16}{'solve s':>9}{'perplexity':>12}{'KL mnat':>9}")

    def show(weights: str, method: str, time_s: float, model: ir.Model | Path) -> None:
        found = compare(reference, logits(model, fed, output, ids), output, ids)
        print(
            f"{weights:<12}{method:<16}{time_s:>9.2f}{found.perplexity_quantized:>12.4f}{found.kl_mnat:>9.2f}",
            flush=True,
        )

    for name, spec in SPECS.items():
        if given.names and not name.startswith(tuple(given.names)):
            continue
        for method, scaled, rounding in METHODS:
            start = time.perf_counter()
            made = solved(graph, grams, spec, scaled, rounding)
            show(name, method, time.perf_counter() - start, made.model)
    if given.peer:
        rows = np.load(given.calib)["input_ids"][: given.calib_rows]
        start = time.perf_counter()
        quantized = peer_gptq(given.model, rows)
        show(
            "int4 g128",
            "onnxruntime gptq",
            time.perf_counter() - start,
            ir.serde.deserialize_model(quantized),
        )


if __name__ == "__main__":
    main()
