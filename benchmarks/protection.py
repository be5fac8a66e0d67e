"""What methods that protect accuracy save, and how long they take: the tables of docs/methods.md.

    python benchmarks/protection.py --shared ../shared [names …] [--peer] [--out docs/methods.md]

Two language models, one of them with the outlier channels of large ones (the script beside the models makes it), by the
perplexity and KL(float ‖ quantized) of the next token in milli-nats; a mobile network on CIFAR-10 by its accuracy and
SQNR. A float model runs once for the statistics and once for the Gram matrices; each row then solves from those alone
and writes a file, as `quantkit export` does; its seconds are those of solving, writing and checking. Three bits, which
no target stores, are solved and decoded in place. `--peer` quantizes the same models with `onnxruntime.quantization`,
whose GPTQ is the only one of its methods for weights that uses data.
"""

import argparse
import os
import runpy
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

import quantkit
from quantkit.cache.gram_file import GramFile
from quantkit.calibrators.weight_rounding import Rounding, round_weight
from quantkit.formats import INT3, QuantSpec, dequantize
from quantkit.graph import Graph, load_graph
from quantkit.graph.folding import apply_edits
from quantkit.graph.linears import find_linears
from quantkit.metrics.outputs import OutputComparison, OutputMetrics
from quantkit.pipeline import collect_grams
from quantkit.planning.rescaling import Rescaled, layer_of
from quantkit.runtime import Session
from quantkit.statistics import GramMatrix

BEGIN, END = "<!-- benchmarks/protection.py writes from here -->", "<!-- to here -->"
# How the mobile network was trained to see pixels.
CIFAR10 = quantkit.ImagePreprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
LANGUAGE = ("tiny_llama", "tiny_llama_outliers")
CALIBRATED = 64
_THREE_BITS = QuantSpec(format=INT3, axis=0, block_size=128)
_BATCH = 15


@dataclass(frozen=True)
class Row:
    """A format with a method, and what else `export_model` is told."""

    preset: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"--{self.preset}", "--method", self.method]
        for name, value in self.options.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words)


TEXT_ROWS = (
    Row("int8", "minmax"),
    Row("int8", "mse"),
    Row("int8", "smoothquant", {"folds": "norms"}),
    Row("int8", "smoothquant"),
    Row("int8", "smoothquant", {"alpha": "auto"}),
    Row("int8", "smoothquant", {"target": "ort-cpu"}),
    Row("int4", "amax"),
    Row("int4", "mse"),
    Row("int4", "weighted"),
    Row("int4", "output"),
    Row("int4", "awq"),
    Row("int4", "gptq"),
    Row("int4", "awq+gptq"),
    Row("int4", "mse", {"group": 32}),
    Row("int4", "gptq", {"group": 32}),
    Row("3 bits", "amax"),
    Row("3 bits", "gptq"),
    Row("int2", "amax"),
    Row("int2", "mse"),
    Row("int2", "gptq"),
    Row("w4a8", "mse"),
    Row("w4a8", "smoothquant+gptq"),
)
_PER_CHANNEL = {"group": "channel"}
PICTURE_ROWS = (
    Row("int4", "amax", _PER_CHANNEL),
    Row("int4", "mse", _PER_CHANNEL),
    Row("int4", "mse+bias", _PER_CHANNEL),
    Row("int4", "equalize+mse+bias", _PER_CHANNEL),
    Row("int4", "awq+bias", _PER_CHANNEL),
    Row("int4", "gptq", _PER_CHANNEL),
    Row("int4", "gptq+bias", _PER_CHANNEL),
    Row("int4", "equalize+gptq+bias", _PER_CHANNEL),
    Row("w4a8", "minmax", _PER_CHANNEL),
    Row("w4a8", "gptq+minmax+bias", _PER_CHANNEL),
    Row("w4a8", "equalize+gptq+minmax+bias", _PER_CHANNEL),
)


@dataclass(frozen=True)
class Prepared:
    """A float model with its cache and its Gram matrices."""

    path: Path
    graph: Graph
    cache: Path

    @property
    def grams(self) -> Path:
        """Beside the cache."""
        return self.cache.with_suffix(".gram")

    def export(self, row: Row) -> tuple[Path, float]:
        """The file of a row, and the seconds that it took."""
        out = self.cache.with_suffix(".quantized.onnx")
        start = time.perf_counter()
        told = {"target": "ort", **row.options}
        quantkit.export_model(self.path, self.cache, preset=row.preset, method=row.method, out=out, **told)
        return out, time.perf_counter() - start


def prepare(
    path: Path, data: Path, folder: Path, image: quantkit.ImagePreprocessing | None = None
) -> Prepared:
    """Calibrate, and say how long that took."""
    graph, cache, start = load_graph(path), folder / f"{path.stem}.calib", time.perf_counter()
    quantkit.calibrate_model(graph, data, samples=CALIBRATED, image=image).save(cache)
    observed = time.perf_counter() - start
    work = collect_grams(graph, data, cache.with_suffix(".gram"), samples=CALIBRATED, image=image)
    collected = time.perf_counter() - start - observed
    print(
        f"{path.stem}: statistics {observed:.1f} s, {len(work.views)} Gram matrices {collected:.1f} s",
        flush=True,
    )
    return Prepared(path, graph, cache)


# --- language models ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """What the float model makes of the text that it is judged on."""

    graph: Graph
    ids: np.ndarray
    exact: list[np.ndarray]

    @classmethod
    def of(cls, graph: Graph, ids: np.ndarray) -> "Judge":
        """Run the float model once."""
        return cls(graph, ids, list(_logits(graph.model, graph, ids)))

    def compare(self, model: ir.Model | Path) -> OutputMetrics:
        """How far another model is from it."""
        comparison = OutputComparison(self.graph.outputs[0])
        following = np.concatenate([self.ids[:, 1:], np.full((len(self.ids), 1), -100)], axis=1)
        for index, found in enumerate(_logits(model, self.graph, self.ids)):
            rows = slice(index * _BATCH, index * _BATCH + len(found))
            comparison.update(self.exact[index], found, following[rows])
        return comparison.result()


def _logits(model: ir.Model | Path, graph: Graph, ids: np.ndarray) -> Iterator[np.ndarray]:
    session = Session(model, optimize=False)
    for start in range(0, len(ids), _BATCH):
        yield session.run({graph.inputs[0].name: ids[start : start + _BATCH]})[graph.outputs[0]]


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


def language_table(
    models: Path, data: Path, folder: Path, rows: list[Row], peer: bool, count: int
) -> Iterator[str]:
    """Yield the lines of the language models' table."""
    shutil.copy(models / "tiny_llama.onnx", folder)
    runpy.run_path(str(shutil.copy(models / "make_outliers.py", folder)))
    made = [prepare(folder / f"{name}.onnx", data / "calib.npz", folder) for name in LANGUAGE]
    judges = [Judge.of(model.graph, np.load(data / "eval.npz")["input_ids"][:count]) for model in made]
    yield f"| `quantkit export … --target ort` | {' | '.join(f'{n}: KL | perplexity | s' for n in LANGUAGE)} |"
    yield "|---|" + "---|" * 3 * len(LANGUAGE)
    floats = [judge.compare(model.graph.model) for model, judge in zip(made, judges, strict=True)]
    yield f"| float | {' | '.join(f'0 | {found.perplexity_quantized:.4f} | ' for found in floats)} |"
    for row in rows:
        cells = []
        for model, judge in zip(made, judges, strict=True):
            if row.preset == "3 bits":
                start = time.perf_counter()
                assert row.method in ("amax", "gptq")
                rounded = decoded(model.graph, GramFile(model.grams), row.method)  # type: ignore[arg-type]
                cells.append(_text_cells(judge.compare(rounded.model), time.perf_counter() - start))
            else:
                path, seconds = model.export(row)
                cells.append(_text_cells(judge.compare(path), seconds))
        name = f"3 bits in groups of 128, {row.method}" if row.preset == "3 bits" else f"`{row}`"
        yield f"| {name} | {' | '.join(cells)} |"
    if peer:
        ids = np.load(data / "calib.npz")["input_ids"][:CALIBRATED]
        cells = []
        for model, judge in zip(made, judges, strict=True):
            start = time.perf_counter()
            found = peer_gptq(model.path, ids)
            seconds = time.perf_counter() - start
            cells.append(_text_cells(judge.compare(ir.serde.deserialize_model(found)), seconds))
        yield f"| ONNX Runtime's GPTQ, INT4 in blocks of 128 | {' | '.join(cells)} |"


def _text_cells(found: OutputMetrics, seconds: float) -> str:
    return f"{found.kl_mnat:.2f} | {found.perplexity_quantized:.4f} | {seconds:.1f}"


# --- a mobile network ---------------------------------------------------------------------------------------------


def picture_table(model: Path, data: Path, folder: Path, rows: list[Row]) -> Iterator[str]:
    """Yield the lines of the mobile network's table."""
    made = prepare(model, data / "calib", folder, CIFAR10)
    yield "| `quantkit export … --target ort` | top-1 | SQNR | same top-1 | s |"
    yield "|---|---|---|---|---|"
    for index, row in enumerate(rows):
        path, seconds = made.export(row)
        found = quantkit.evaluate_model(
            model, path, data / "eval.npz", labels=data / "eval.npz", image=CIFAR10
        )
        (metrics,) = found.outputs.values()
        if index == 0:
            yield f"| float | {metrics.accuracy_float:.2%} | | | |"
        yield (
            f"| `{row}` | {metrics.accuracy_quantized:.2%} | {metrics.sqnr_db:.1f} dB | "
            f"{metrics.top1_agreement:.2%} | {seconds:.1f} |"
        )


def main() -> None:
    """Print the tables, and put them into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        help="rows by format and beginning of the method, such as 'int4 gptq'; all unless given",
    )
    parser.add_argument("--shared", type=Path, required=True, help="folder that holds models/ and data/")
    parser.add_argument(
        "--peer", action="store_true", help="also run ONNX Runtime's GPTQ (INT4, blocks of 128)"
    )
    parser.add_argument("--rows", type=int, default=435, help="rows of text to judge with (435, all)")
    parser.add_argument(
        "--only", choices=("text", "pictures"), help="the language models or the mobile network alone"
    )
    parser.add_argument("--out", type=Path, help="the Markdown page whose tables are replaced")
    given = parser.parse_args()
    models, data = given.shared / "models", given.shared / "data"

    def wanted(rows: tuple[Row, ...]) -> list[Row]:
        names = tuple(given.names)
        return [row for row in rows if not names or f"{row.preset} {row.method}".startswith(names)]

    lines = []
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as made:
        tables = [
            language_table(
                models, data / "shakespeare", Path(made), wanted(TEXT_ROWS), given.peer, given.rows
            ),
            picture_table(models / "mobilenetv2.onnx", data / "cifar10", Path(made), wanted(PICTURE_ROWS)),
        ]
        for name, table in zip(("text", "pictures"), tables, strict=True):
            if given.only in (None, name):
                for line in chain(table, [""]):
                    print(line, flush=True)
                    lines.append(line)
                    loads.append(os.getloadavg()[0])
    lines.append(
        f"The first {given.rows} rows of text, 2,000 pictures; {CALIBRATED} of each to calibrate with. Seconds on "
        f"{os.cpu_count()} cores, while the machine's load was {min(loads):.1f} to {max(loads):.1f}."
    )
    print(lines[-1])
    if given.out is not None:
        page = given.out.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        given.out.write_text(
            "\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]), encoding="utf-8", newline="\n"
        )


if __name__ == "__main__":
    main()
