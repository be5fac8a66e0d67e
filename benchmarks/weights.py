"""What quantizing the weights of a language model costs in accuracy, for every preset and rule.

    python benchmarks/weights.py model.onnx eval.npz [int4 nvfp4 …]

Every constant matrix of a MatMul is rounded and decoded again; all else stays in float and the model runs in float.
Of each row: Σ error² / Σ w², the seconds that solving took, what the weights take per element (codes and scales), the
perplexity and KL(float ‖ quantized) of the next token in milli-nats. Trust the last: perplexity falls below the float
model's by chance.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quantkit.calibrators import WeightMethod, weight_qparams
from quantkit.formats import INT3, QuantSpec, fake_quantize, size_bytes
from quantkit.formats.presets import weight_spec
from quantkit.graph import Graph, load_graph
from quantkit.metrics.outputs import OutputComparison, OutputMetrics
from quantkit.runtime import Session


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    spec: QuantSpec
    method: WeightMethod
    signed_scales: bool = False


def cases() -> Iterator[Case]:
    """Every preset with the rules that it can be solved by, for weights [K, N]."""

    def spec(name: str, **options: object) -> QuantSpec:
        return weight_spec(name, channel_axis=1, contraction_axis=0, **options)  # type: ignore[arg-type]

    yield Case(name="int8", spec=spec("int8"), method="amax")
    yield Case(name="fp8", spec=spec("fp8"), method="amax")
    yield Case(name="fp8 mse", spec=spec("fp8"), method="mse")
    yield Case(name="fp8 per tensor", spec=spec("fp8", per_tensor=True), method="amax")
    yield Case(name="fp8-block", spec=spec("fp8-block"), method="amax")
    for size in (32, 64, 128, 256, "channel"):
        for method in ("amax", "mse"):
            g = f"int4 {size} {method}"
            yield Case(name=g, spec=spec("int4", block_size=size), method=method)
            yield Case(
                name=f"{g} signed", spec=spec("int4", block_size=size), method=method, signed_scales=True
            )
            yield Case(
                name=f"{g} asymmetric",
                spec=spec("int4", block_size=size, symmetric=False),
                method=method,
            )
    for method in ("amax", "mse"):
        yield Case(name=f"nvfp4 {method}", spec=spec("nvfp4"), method=method)
    for name in ("mxfp4", "mxfp8"):
        for rule in ("ocp", "rceil", "even"):
            yield Case(name=f"{name} {rule}", spec=spec(name, scale_rule=rule), method="amax")
        yield Case(name=f"{name} mse", spec=spec(name), method="mse")
    yield Case(name="int3 128 mse", spec=QuantSpec(format=INT3, axis=0, block_size=128), method="mse")
    yield Case(name="int2 32 mse", spec=spec("int2"), method="mse")
    yield Case(name="int2 32 mse signed", spec=spec("int2"), method="mse", signed_scales=True)
    yield Case(name="int2 32 mse asymmetric", spec=spec("int2", symmetric=False), method="mse")


def matrices(graph: Graph) -> dict[str, np.ndarray]:
    """The constant right-hand sides of the model's MatMuls, by name."""
    names = {
        str(node.inputs[1].name)
        for node in graph.model.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].is_initializer()
    }
    return {name: graph.array(name).astype(np.float32) for name in sorted(names)}


def logits(graph: Graph, weights: dict[str, np.ndarray], ids: np.ndarray) -> Iterator[np.ndarray]:
    """The model's output, 15 rows at a time, with these weights in place of its own."""
    model = graph.model.clone()
    for name, array in weights.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    session = Session(model)
    for start in range(0, len(ids), 15):
        feeds = {graph.inputs[0].name: ids[start : start + 15]}
        yield session.run(feeds)[graph.outputs[0]]


def compare(
    graph: Graph, weights: dict[str, np.ndarray], reference: list[np.ndarray], ids: np.ndarray
) -> OutputMetrics:
    """How far the model with these weights is from the reference."""
    comparison = OutputComparison(graph.outputs[0])
    following = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -100)], axis=1)
    start = 0
    for exact, found in zip(reference, logits(graph, weights, ids), strict=True):
        comparison.update(exact, found, following[start : start + len(exact)])
        start += len(exact)
    return comparison.result()


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of a language model with quantized weights.")
    parser.add_argument("model", type=Path, help="the float model")
    parser.add_argument("data", type=Path, help=".npz with `input_ids`, integers of shape (rows, tokens)")
    parser.add_argument(
        "names", nargs="*", help="rows of the table by the beginning of their names; all unless given"
    )
    parser.add_argument("--rows", type=int, help="rows of the data to use; all unless given")
    given = parser.parse_args()

    graph = load_graph(given.model)
    ids = np.load(given.data)["input_ids"][: given.rows]
    floats = matrices(graph)
    count = sum(w.size for w in floats.values())
    reference = list(logits(graph, {}, ids))
    print(f"{given.model.name}: {len(floats)} matrices, {count:,} weights; {len(ids)} rows")
    print(f"{'weights':<26}{'bits':>6}{'error':>11}{'solve s':>9}{'perplexity':>12}{'KL mnat':>9}")
    print(
        f"{'float':<26}{32:>6}{0:>11}{'':>9}{compare(graph, {}, reference, ids).perplexity_float:>12.4f}{0:>9}"
    )
    for case in cases():
        if given.names and not case.name.startswith(tuple(given.names)):
            continue
        start = time.perf_counter()
        qparams = {
            name: weight_qparams(
                w, case.spec, method=case.method, signed_scales=case.signed_scales, name=name
            )
            for name, w in floats.items()
        }
        time_s = time.perf_counter() - start
        decoded = {name: fake_quantize(w, qparams[name], case.spec) for name, w in floats.items()}
        lost = sum(float(np.sum((w - decoded[name]) ** 2, dtype=np.float64)) for name, w in floats.items())
        squares = sum(float(np.sum(w**2, dtype=np.float64)) for w in floats.values())
        bits = 8 * sum(size_bytes(w.shape, case.spec) for w in floats.values()) / count
        found = compare(graph, decoded, reference, ids)
        print(
            f"{case.name:<26}{bits:>6.2f}{lost / squares:>11.3e}{time_s:>9.2f}"
            f"{found.perplexity_quantized:>12.4f}{found.kl_mnat:>9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
