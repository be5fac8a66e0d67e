"""What every format costs in accuracy and saves in size: the table of docs/formats.md.

    python benchmarks/formats.py --shared ../shared --out docs/formats.md

On a vision transformer (CIFAR-10, 2000 pictures) and a language model (435 rows of 256 characters); weights by the
default search, activations by true minimum and maximum. No method that protects accuracy takes part.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantkit
from quantkit.formats import size_bytes
from quantkit.graph import load_graph
from quantkit.metrics.outputs import OutputMetrics

# How the vision transformer was trained to see pixels.
CIFAR10 = quantkit.ImagePreprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
BEGIN, END = "<!-- benchmarks/formats.py writes from here -->", "<!-- to here -->"


@dataclass(frozen=True)
class Row:
    """A format, and the options that make it."""

    name: str
    preset: str
    target: str
    options: tuple[tuple[str, Any], ...] = ()


ROWS = (
    Row("INT8", "int8", "tensorrt"),
    Row("INT8 weights alone", "int8", "tensorrt", (("activations", False),)),
    Row("INT8, ort-cpu", "int8", "ort-cpu"),
    Row("INT16 × INT8", "int16", "ort"),
    Row("INT16 × INT16", "w16a16", "ort"),
    Row("FP8", "fp8", "tensorrt"),
    Row("FP8 weights alone", "fp8", "tensorrt", (("activations", False),)),
    Row("FP8 per tensor", "fp8", "tensorrt", (("per_tensor", True),)),
    Row("FP8 128×128", "fp8-block", "tensorrt"),
    Row("MXFP8", "mxfp8", "tensorrt"),
    Row("MXFP8 weights alone", "mxfp8", "tensorrt", (("activations", False),)),
    Row("INT4 g128", "int4", "ort"),
    Row("INT4 g128, zero points", "int4", "ort", (("symmetric", False),)),
    Row("INT4 g32", "int4", "ort", (("group", 32),)),
    Row("INT4 per channel", "int4", "ort", (("group", "channel"),)),
    Row("NVFP4", "nvfp4", "tensorrt"),
    Row("NVFP4 with activations", "nvfp4", "tensorrt", (("activations", True),)),
    Row("MXFP4", "mxfp4", "tensorrt"),
    Row("MXFP4, rule rceil", "mxfp4", "tensorrt", (("scale_rule", "rceil"),)),
    Row("MXFP4, rule ocp", "mxfp4", "tensorrt", (("scale_rule", "ocp"),)),
    Row("INT4 × INT8", "w4a8", "ort"),
    Row("INT4 × FP8", "w4a8-fp8", "ort"),
    Row("INT2 g32", "int2", "ort"),
    Row("INT2 g32, zero points", "int2", "ort", (("symmetric", False),)),
)


def command(row: Row) -> str:
    """The words that a user types for a row."""
    words = ["--preset", "w16a16"] if row.preset == "w16a16" else [f"--{row.preset}"]
    for name, value in row.options:
        match name:
            case "activations":
                words.append("--activations" if value else "--no-activations")
            case "symmetric":
                words.append("--zero-points")
            case "per_tensor":
                words.append("--per-tensor")
            case _:
                words += [f"--{name.replace('_', '-')}", str(value)]
    if row.target != "tensorrt":
        words += ["--target", row.target]
    return " ".join(words)


@dataclass(frozen=True)
class Network:
    """A model with what it is calibrated and judged on."""

    model: Path
    cache: quantkit.CalibrationCache
    data: Path
    labels: object
    image: quantkit.ImagePreprocessing | None


def networks(shared: Path) -> tuple[Network, Network]:
    """The vision transformer and the language model, calibrated."""
    cifar10, shakespeare = shared / "data" / "cifar10", shared / "data" / "shakespeare"
    cct, llama = shared / "models" / "cct.onnx", shared / "models" / "tiny_llama.onnx"
    return (
        Network(
            cct,
            quantkit.calibrate_model(cct, cifar10 / "calib", method="minmax", image=CIFAR10),
            cifar10 / "eval.npz",
            cifar10 / "eval.npz",
            CIFAR10,
        ),
        Network(
            llama,
            quantkit.calibrate_model(llama, shakespeare / "calib.npz", method="minmax", samples=64),
            shakespeare / "eval.npz",
            "next-token",
            None,
        ),
    )


def measure(row: Row, network: Network) -> tuple[OutputMetrics, float]:
    """Return what a format costs a network, and the bits that it takes for a weight, scales included."""
    with tempfile.TemporaryDirectory() as folder:
        exported = quantkit.export_model(
            network.model,
            network.cache,
            preset=row.preset,
            target=row.target,
            everything=True,
            out=Path(folder) / "quantized.onnx",
            **dict(row.options),
        )
        found = quantkit.evaluate_model(
            network.model, exported.path, network.data, labels=network.labels, image=network.image
        )
    graph = load_graph(network.model)
    weights = {w.name: w.spec for w in exported.plan.weights}
    stored = sum(size_bytes(graph.shape(name), spec) for name, spec in weights.items())
    (metrics,) = found.outputs.values()
    return metrics, 8 * stored / sum(math.prod(graph.shape(name)) for name in weights)


def table(shared: Path) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| format | `quantkit export` | bits a weight | cct top-1 | cct SQNR | tiny_llama perplexity | KL, mnat |"
    yield "|---|---|---|---|---|---|---|"
    cct, llama = networks(shared)
    for row in ROWS:
        pictures, _ = measure(row, cct)
        text, bits = measure(row, llama)
        if row is ROWS[0]:
            yield (f"| float32 | | 32 | {pictures.accuracy_float:.2%} | | {text.perplexity_float:.4f} | |")
        yield (
            f"| {row.name} | `{command(row)}` | {bits:.2f} | {pictures.accuracy_quantized:.2%} | "
            f"{pictures.sqnr_db:.1f} dB | {text.perplexity_quantized:.4f} | {text.kl_mnat:.2f} |"
        )


def main() -> None:
    """Print the table, and put it into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, required=True, help="folder that holds models/ and data/")
    parser.add_argument("--out", type=Path, help="the Markdown page whose table is replaced")
    arguments = parser.parse_args()
    lines = []
    for line in table(arguments.shared):
        print(line, flush=True)
        lines.append(line)
    if arguments.out is not None:
        page = arguments.out.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        arguments.out.write_text(
            "\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]), encoding="utf-8", newline="\n"
        )


if __name__ == "__main__":
    main()
