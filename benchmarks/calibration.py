"""What calibration costs: quantkit beside plain inference and ONNX Runtime's own calibrators.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --samples 512 --only plain quantkit
    python benchmarks/calibration.py --model model.onnx --data calib/ --batch-size 32 --mean 0.5 --std 0.25

Without --model the network is ten 3 × 3 convolutions of 64 channels at 112 × 112 with a Relu behind each.

Every run is a process of its own, so that its peak memory is its own; the contenders take turns, round
after round, so that a machine that slows down slows them all. The clock runs around the work alone:
importing, loading the model and one batch to warm up are reported as set-up. quantkit's time is the whole
of `calibrate_model`, which loads and cleans the model a second time; that of ONNX Runtime's calibrators
is `collect_data` and, apart, the search for ranges (`compute_data`). A ratio is the median over the
rounds of time / plain inference's time in the same round. "best" is the quickest round, which a machine
that others use at the same time disturbs least.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, np.ndarray]

LAYERS, CHANNELS, SIZE = 10, 64, 112


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every contender is given.

    `folder` holds one .npz a sample; without it, samples are made up for the built-in network.
    """

    model: str
    folder: str | None
    samples: int
    batch_size: int


# --- model and data -----------------------------------------------------------------------------------------


def write_network(path: Path) -> None:
    """Write the built-in network: input [batch, 64, 112, 112]; weights N(0, 2 / fan-in) keep the scale."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "input"
    for i in range(LAYERS):
        weight = rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) * np.sqrt(2 / (CHANNELS * 9))
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"conv{i}.weight"))
        weights.append(numpy_helper.from_array(np.zeros(CHANNELS, np.float32), f"conv{i}.bias"))
        inputs = [x, f"conv{i}.weight", f"conv{i}.bias"]
        nodes.append(helper.make_node("Conv", inputs, [f"conv{i}"], name=f"conv{i}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"conv{i}"], [f"relu{i}"], name=f"relu{i}"))
        x = f"relu{i}"
    shape = ["batch", CHANNELS, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "ten_convolutions",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


def write_samples(model: str, data: str, folder: Path, count: int, image: dict[str, Any] | None) -> int:
    """Write up to `count` samples of `data`, ready to be fed, as .npz files; return how many there were."""
    from quantkit.data import ImagePreprocessing, open_data
    from quantkit.graph import load_graph

    preprocessing = None if image is None else ImagePreprocessing(**image)
    source = open_data(data, load_graph(model).inputs, image=preprocessing, samples=count)
    number = 0
    for number, sample in enumerate(source, start=1):
        np.savez(folder / f"{number:06}.npz", **sample)
    return number


class Samples:
    """The samples of a job, one at a time and as often as one likes.

    Those of the built-in network are a few arrays times a factor that differs from sample to sample:
    distinct, quick to make, and the memory they take does not grow with their number.
    """

    def __init__(self, job: Job) -> None:
        self._count = job.samples
        if job.folder is None:
            rng = np.random.default_rng(1)
            shape = (1, CHANNELS, SIZE, SIZE)
            self._stored: list[Feed] = [{"input": rng.standard_normal(shape, np.float32)} for _ in range(4)]
        else:
            self._stored = [dict(np.load(path)) for path in sorted(Path(job.folder).glob("*.npz"))]

    def __iter__(self) -> Iterator[Feed]:
        stored = len(self._stored)
        for i in range(self._count):
            sample = self._stored[i % stored]
            yield sample if i < stored else {k: v * np.float32(1 + i / 1024) for k, v in sample.items()}

    def batches(self, size: int) -> Iterator[Feed]:
        """Samples joined along their first axis."""
        waiting: list[Feed] = []
        for sample in self:
            waiting.append(sample)
            if len(waiting) == size:
                yield _joined(waiting)
                waiting = []
        if waiting:
            yield _joined(waiting)


def _joined(samples: list[Feed]) -> Feed:
    return {name: np.concatenate([s[name] for s in samples]) for name in samples[0]}


# --- contenders: each returns {"setup_s": …, "work_s": …, "search_s": …} ------------------------------------


def run_plain(job: Job) -> dict[str, float]:
    """ONNX Runtime inference, results thrown away."""
    start = time.perf_counter()
    import onnxruntime as ort

    samples = Samples(job)
    session = ort.InferenceSession(job.model, providers=["CPUExecutionProvider"])
    session.run(None, next(samples.batches(job.batch_size)))
    ready = time.perf_counter()
    for batch in samples.batches(job.batch_size):
        session.run(None, batch)
    return {"setup_s": ready - start, "work_s": time.perf_counter() - ready, "search_s": 0.0}


def run_quantkit(job: Job) -> dict[str, float]:
    """quantkit gathering the statistics that serve every method, format and target."""
    start = time.perf_counter()
    import quantkit

    samples = Samples(job)
    warm_up = [sample for sample, _ in zip(samples, range(job.batch_size), strict=False)]
    quantkit.calibrate_model(job.model, warm_up, batch_size=job.batch_size, progress=False)
    ready = time.perf_counter()
    quantkit.calibrate_model(job.model, samples, batch_size=job.batch_size, progress=False)
    return {"setup_s": ready - start, "work_s": time.perf_counter() - ready, "search_s": 0.0}


def run_onnxruntime(job: Job, *, method: str, **options: Any) -> dict[str, float]:
    """One of ONNX Runtime's calibrators."""
    start = time.perf_counter()
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self, batches: Iterator[Feed]) -> None:
            self._batches = batches

        def get_next(self) -> Feed | None:
            return next(self._batches, None)

    samples = Samples(job)
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            job.model,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod[method],
            providers=["CPUExecutionProvider"],
            extra_options=options,
        )
        calibrator.infer_session.run(None, next(samples.batches(job.batch_size)))
        ready = time.perf_counter()
        calibrator.collect_data(Reader(samples.batches(job.batch_size)))
        collected = time.perf_counter()
        calibrator.compute_data()
        done = time.perf_counter()
    return {"setup_s": ready - start, "work_s": collected - ready, "search_s": done - collected}


CONTENDERS: dict[str, Callable[[Job], dict[str, float]]] = {
    "plain": run_plain,
    "quantkit": run_quantkit,
    "ort-minmax": lambda job: run_onnxruntime(job, method="MinMax"),
    "ort-entropy": lambda job: run_onnxruntime(job, method="Entropy"),
    "ort-percentile": lambda job: run_onnxruntime(job, method="Percentile"),
    # Entropy with as many bins as its paper's threshold search asks for; ONNX Runtime's default is 128.
    "ort-entropy-2048": lambda job: run_onnxruntime(job, method="Entropy", num_bins=2048),
}
DEFAULT = ["plain", "quantkit", "ort-minmax", "ort-entropy", "ort-percentile"]


# --- measuring ----------------------------------------------------------------------------------------------


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a child's starts at what its parent held when it was started.
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(name: str, job: Job) -> dict[str, float]:
    """Run one contender in a process of its own.

    Raises:
        RuntimeError: it failed; the message is the last line that it wrote.
    """
    command = [sys.executable, __file__, "--worker", name, json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}, without a word"]
        raise RuntimeError(f"{name}: {lines[-1]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def summarize(rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Return a row for each contender: medians over the rounds, ratios within them."""
    rows = []
    for name in rounds[0]:
        runs = [r[name] for r in rounds]
        row: dict[str, Any] = {"name": name}
        for key in ("setup_s", "work_s", "search_s"):
            row[key] = statistics.median(run[key] for run in runs)
        row["best_s"] = min(run["work_s"] + run["search_s"] for run in runs)
        row["peak_bytes"] = statistics.median(run["peak_bytes"] for run in runs)
        if "plain" in rounds[0]:
            row["ratio"] = statistics.median(
                (r[name]["work_s"] + r[name]["search_s"]) / r["plain"]["work_s"] for r in rounds
            )
            row["best_ratio"] = row["best_s"] / min(r["plain"]["work_s"] for r in rounds)
            row["above_plain_bytes"] = statistics.median(
                r[name]["peak_bytes"] - r["plain"]["peak_bytes"] for r in rounds
            )
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows for reading: seconds, megabytes (10⁶ bytes)."""
    heads = ["set-up s", "work s", "search s", "/ plain", "best s", "/ plain", "peak MB", "+ plain MB"]
    lines = [" " * 18 + "".join(f"{head:>11}" for head in heads)]
    for row in rows:
        seconds = [f"{row[key]:.2f}" for key in ("setup_s", "work_s", "search_s")]
        ratio, best, above = "–", "–", "–"
        if "ratio" in row:
            ratio, best = f"{row['ratio']:.2f}", f"{row['best_ratio']:.2f}"
            above = f"{row['above_plain_bytes'] / 1e6:.0f}"
        cells = [*seconds, ratio, f"{row['best_s']:.2f}", best, f"{row['peak_bytes'] / 1e6:.0f}", above]
        lines.append(f"{row['name']:18}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    names = ["numpy", "onnxruntime", "onnxruntime-gpu", "quantkit"]
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    versions = {name: installed[name] for name in names if name in installed}
    return {"cores": os.cpu_count(), "platform": platform.platform(), "versions": versions}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="an ONNX model instead of the ten convolutions; needs --data")
    parser.add_argument(
        "--data", help="calibration data of that model, as `quantkit calibrate --data` takes it"
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=DEFAULT, metavar="NAME")
    parser.add_argument("--mean", type=float, nargs="+", help="of images, one value or one per channel")
    parser.add_argument("--std", type=float, nargs="+", help="likewise")
    parser.add_argument("--json", metavar="FILE", help="write the figures of every round there")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "JOB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together: calibration wants real inputs of the model")
    return args


def main() -> None:
    args = parse()
    if args.worker:
        name, job = args.worker
        result = CONTENDERS[name](Job(**json.loads(job)))
        print(json.dumps(result | {"peak_bytes": peak_memory_bytes()}))
        return

    with tempfile.TemporaryDirectory() as scratch:
        model, folder, samples = args.model, None, args.samples
        if model is None:
            model = str(Path(scratch) / "ten_convolutions.onnx")
            write_network(Path(model))
        else:
            folder = str(Path(scratch) / "samples")
            Path(folder).mkdir()
            image = {k: tuple(v) for k, v in {"mean": args.mean, "std": args.std}.items() if v is not None}
            samples = write_samples(model, args.data, Path(folder), samples, image or None)
        job = Job(model=model, folder=folder, samples=samples, batch_size=args.batch_size)
        print(f"{Path(model).name}: {samples} samples, batch size {args.batch_size}, {args.repeats} rounds")
        rounds: list[dict[str, dict[str, float]]] = []
        failed: set[str] = set()
        for number in range(args.repeats):
            found = {}
            for name in args.only:
                print(f"round {number + 1}: {name}", end=" … ", flush=True)
                if name in failed:
                    continue
                try:
                    found[name] = measure(name, job)
                    print(f"{found[name]['work_s'] + found[name]['search_s']:.2f} s")
                except RuntimeError as error:
                    failed.add(name)
                    print(f"failed\n{error}", file=sys.stderr)
            rounds.append(found)
    rounds = [{n: run for n, run in found.items() if n not in failed} for found in rounds]
    rows = summarize(rounds)
    print("\n" + table(rows))
    if args.json:
        report = {"job": asdict(job), "machine": machine(), "summary": rows, "rounds": rounds}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
