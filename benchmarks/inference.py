"""How fast exported models run in ONNX Runtime's CPU provider, beside float and what `quantize_static` writes.

    python benchmarks/inference.py
    python benchmarks/inference.py --model model.onnx --data calib/ --batch-size 1 64 --mean 0.5 --std 0.25

Without --model it is the example that the repository ships. Every file is calibrated by true minimum and
maximum on the same samples and run with all of ONNX Runtime's optimizations, as users run it. `quantize_static`
writes QDQ, per channel, in its default types (int8 weights, int8 or uint8 activations), on a model that its own
`quant_pre_process` prepared.

The contenders take turns: in each round each runs for the same short while, in an order that changes from round
to round, so that a machine that slows down slows them all. A ratio is the median over the rounds of time /
float's time in the same round; sqnr is 10·log10(Σ ref² / Σ (q − ref)²) of the first output over the samples.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

Feed = dict[str, np.ndarray]

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
FLOAT = "float"
# Operators that show whether integer kernels were found.
_TELLING = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "QuantizeLinear", "DequantizeLinear")


# --- contenders: each writes a file ------------------------------------------------------------------------


def write_quantkit(model: str, feeds: list[Feed], folder: Path, target: str) -> Path:
    """What quantkit exports for `target`."""
    import quantkit

    cache = quantkit.calibrate_model(model, feeds, method="minmax")
    return quantkit.export_model(model, cache, target=target, out=folder / f"{target}.onnx").path


def write_quantize_static(model: str, feeds: list[Feed], folder: Path, activations: str) -> Path:
    """What ONNX Runtime's own quantizer writes."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[Feed] = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self._left, None)

    prepared, path = folder / "prepared.onnx", folder / f"quantize_static_{activations}.onnx"
    quant_pre_process(model, str(prepared))
    quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8 if activations == "s8" else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return path


WRITERS = {
    "quantkit ort-cpu": lambda m, f, d: write_quantkit(m, f, d, "ort-cpu"),
    "quantkit ort": lambda m, f, d: write_quantkit(m, f, d, "ort"),
    "quantize_static u8s8": lambda m, f, d: write_quantize_static(m, f, d, "u8"),
    "quantize_static s8s8": lambda m, f, d: write_quantize_static(m, f, d, "s8"),
}


# --- measuring ---------------------------------------------------------------------------------------------


def open_session(path: Path | str, threads: int, optimized: Path | None = None) -> ort.InferenceSession:
    """Open a model at ORT_ENABLE_ALL; write what the optimizer made of it to `optimized`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Idle threads that spin take the cores from whoever has the turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def time_per_run_s(session: ort.InferenceSession, feed: Feed, turn_s: float) -> float:
    """Run for about `turn_s`, at least twice, and return the median time of a run; the first warms up."""
    session.run(None, feed)
    times: list[float] = []
    while not times or sum(times) < turn_s:
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(
    sessions: dict[str, ort.InferenceSession], feed: Feed, rounds: int, turn_s: float
) -> list[dict[str, float]]:
    """Return, for every round, each contender's seconds per run."""
    found = []
    names = list(sessions)
    for number in range(rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        found.append({name: time_per_run_s(sessions[name], feed, turn_s) for name in order})
    return found


def summarize(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return each contender's median milliseconds, and its ratio to float: the median over the rounds."""
    return {
        name: {
            "time_ms": 1e3 * statistics.median(r[name] for r in rounds),
            "ratio": statistics.median(r[name] / r[FLOAT] for r in rounds),
        }
        for name in rounds[0]
    }


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    exact, found = reference.astype(np.float64), other.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()))


def operators(path: Path) -> Counter[str]:
    """Count the operators of an optimized model."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def joined(feeds: list[Feed], size: int) -> Feed:
    """Return the first `size` samples as one batch, from the start again where they do not suffice."""
    chosen = [feeds[i % len(feeds)] for i in range(size)]
    return {name: np.concatenate([f[name] for f in chosen]) for name in feeds[0]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="an ONNX model instead of the example; needs --data")
    parser.add_argument("--data", help="calibration data of it, as `quantkit calibrate --data` takes it")
    parser.add_argument("--samples", type=int, default=128, help="to calibrate with (default 128)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--turn", type=float, default=0.05, help="seconds of a turn (default 0.05)")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime; 0 for all cores (default 1)")
    parser.add_argument("--mean", type=float, nargs="+", help="of images, one value or one per channel")
    parser.add_argument("--std", type=float, nargs="+", help="likewise")
    parser.add_argument("--operators", action="store_true", help="count those of each optimized model")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together: calibration wants real inputs of the model")
    return args


def main() -> None:
    from quantkit.data import ImagePreprocessing, open_data
    from quantkit.graph import load_graph

    args = parse()
    model, data = args.model or str(DIGITS / "model.onnx"), args.data or str(DIGITS / "calib")
    image = {k: tuple(v) for k, v in {"mean": args.mean, "std": args.std}.items() if v is not None}
    preprocessing = ImagePreprocessing(**image) if image else None
    feeds = list(open_data(data, load_graph(model).inputs, image=preprocessing, samples=args.samples))
    report: dict[str, Any] = {"model": model, "cores": os.cpu_count(), "threads": args.threads}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = {FLOAT: Path(model)}
        paths |= {name: write(model, feeds, folder) for name, write in WRITERS.items()}
        sessions = {
            name: open_session(path, args.threads, folder / f"{number}.optimized.onnx")
            for number, (name, path) in enumerate(paths.items())
        }
        counts = {
            name: operators(folder / f"{number}.optimized.onnx") for number, name in enumerate(sessions)
        }
    quality = {name: [s.run(None, feed)[0] for feed in feeds] for name, s in sessions.items()}
    noise = {n: sqnr_db(np.stack(quality[FLOAT]), np.stack(q)) for n, q in quality.items() if n != FLOAT}
    for size in args.batch_size:
        rows = summarize(measure(sessions, joined(feeds, size), args.rounds, args.turn))
        report[f"batch {size}"] = rows
        print(f"\n{Path(model).name}, batch {size}, {args.rounds} rounds, {args.threads} threads")
        print(f"{'':22}{'ms':>9}{'/ float':>9}{'sqnr dB':>9}  left by the optimizer")
        for name, row in rows.items():
            left = ", ".join(f"{counts[name][o]} {o}" for o in _TELLING if counts[name][o])
            noisy = f"{noise[name]:.1f}" if name in noise else "–"
            print(f"{name:22}{row['time_ms']:9.3f}{row['ratio']:9.3f}{noisy:>9}  {left}")
    if args.operators:
        for name, found in counts.items():
            print(f"\n{name}: " + ", ".join(f"{count} {op}" for op, count in sorted(found.items())))
    report |= {"sqnr_db": noise, "operators": {name: dict(found) for name, found in counts.items()}}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
