"""The roofline of a GPU, and where the products of a benchmark lie under it."""

import importlib
import os
from pathlib import Path
from typing import Any

from quantkit.bench.result import Benchmark
from quantkit.bench.row import BenchRow
from quantkit.errors import FileError
from quantkit.files import atomic_write
from quantkit.kernels.work import FORMATS

_SUFFIXES = (".png", ".svg", ".pdf")


def save_roofline(benchmark: Benchmark, path: str | os.PathLike[str]) -> None:
    """Draw operations a second over operations a byte, on logarithmic axes, into a .png, .svg or .pdf file.

    A line is what the GPU allows: memory bandwidth up to the ridge, then the tensor cores' peak for each type. Filled
    points are ours, by format; hollow ones cuBLAS and other peers. Their area grows with a product's share of the time.

    Raises:
        FileError: matplotlib is not installed, there is nothing to draw, or the file cannot be written.
    """
    final = Path(path)
    figure_module = check_plot(final)
    rows = [row for row in benchmark.rows if row.time_us is not None]
    if not rows:
        raise FileError(f"{final}: no product has a time, so there is nothing to plot; choose other formats.")
    figure = figure_module.Figure(figsize=(9, 6), layout="constrained")
    _draw(figure.add_subplot(), benchmark, rows)
    form = final.suffix[1:].lower()
    # The same figures give the same bytes: no dates, and names within an SVG that are not drawn by lot.
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    matplotlib = importlib.import_module("matplotlib")
    with matplotlib.rc_context({"svg.hashsalt": "quantkit"}), atomic_write(final) as temporary:
        figure.savefig(temporary, format=form, dpi=150, metadata=undated)


def check_plot(path: Path) -> Any:
    """Return matplotlib.figure if a plot can be drawn into `path`: asked before long work.

    Raises:
        FileError: matplotlib is not installed, or `path` is named as no picture.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise FileError(f"{path}: a plot is written as one of {', '.join(_SUFFIXES)}; name it so.")
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise FileError(
            f"{path}: a plot needs matplotlib ({error}); pip install 'quantkit[plot]'."
        ) from error


def _draw(axes: Any, benchmark: Benchmark, rows: list[BenchRow]) -> None:
    gpu = benchmark.gpu
    names = list(dict.fromkeys(row.work.format for row in rows))
    colours = {name: f"C{index}" for index, name in enumerate(names)}
    lowest = min(row.work.intensity for row in rows) / 2
    highest = max(*(row.work.intensity for row in rows), 4e3) * 2
    rates = {FORMATS[name].rate for name in names}
    for rate in sorted(rates, key=lambda r: gpu.peak_tflops.get(r, 0)):
        peak = gpu.peak_tflops.get(rate, gpu.peak_tflops["bf16"])
        ridge = peak * 1e3 / gpu.dram_gb_per_s
        sharing = "/".join(
            sorted(r for r in rates if gpu.peak_tflops.get(r, gpu.peak_tflops["bf16"]) == peak)
        )
        axes.plot(
            [lowest, ridge, highest],
            [lowest * gpu.dram_gb_per_s / 1e3, peak, peak],
            color="0.4",
            linewidth=1,
        )
        axes.annotate(
            f"{sharing} {peak:g} TFLOP/s", (highest, peak), ha="right", va="bottom", fontsize=8, color="0.3"
        )
    longest = max(row.calls * (row.time_us or 0) for row in rows)
    for name in names:
        part = [row for row in rows if row.work.format == name]
        x = [row.work.intensity for row in part]
        areas = [20 + 180 * row.calls * (row.time_us or 0) / longest for row in part]
        axes.scatter(x, [row.tflops for row in part], s=areas, color=colours[name], alpha=0.8, label=name)
        for peer in dict.fromkeys(p for row in part for p in row.peers):
            points = [
                (row.work.intensity, row.work.operations / row.peers[peer].median_us * 1e-6)
                for row in part
                if peer in row.peers
            ]
            marker = {"cuBLAS bf16": "s", "Triton": "^", "nvmath": "v", "Humming": "D"}.get(peer, "o")
            axes.scatter(
                *zip(*points, strict=True), s=18, marker=marker, facecolors="none", edgecolors=colours[name],
                linewidths=0.8, label=f"{peer}, beside {name}",
            )  # fmt: skip
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(lowest, highest),
        xlabel="operations per byte that must move",
        ylabel="TFLOP/s" if benchmark.mode == "measured" else "TFLOP/s, by the model of time",
        title=f"{benchmark.model or 'products'} on {gpu.name.upper()}, {gpu.dram_gb_per_s / 1e3:g} TB/s",
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="lower right")
