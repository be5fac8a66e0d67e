"""`quantkit evaluate`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import options

if TYPE_CHECKING:
    from quantkit.data import ImagePreprocessing
    from quantkit.graph import Graph


def evaluate(
    model: Annotated[Path, typer.Argument(help="The float model.")],
    quantized: Annotated[Path, typer.Argument(help="The quantized model.")],
    data: options.Data,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="Right classes: .npy, .txt (one a line), .npz (key labels, or FILE:KEY), −100 where there is none; or "
            "`next-token` for a language model that is judged on its own input.",
        ),
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Also the SQNR of every Conv, MatMul and Gemm.")
    ] = False,
    ort_level: Annotated[
        str,
        typer.Option(
            "--ort-level",
            help="basic or all: ONNX Runtime's graph optimizations for the quantized model. basic (the default) runs "
            "the file as it is written; above it, the CPU provider drops the Relu before some float8 and int4 "
            "QuantizeLinear and rounds biases its own way, which says nothing of the GPU. all is what an "
            "ONNX Runtime user gets by default; FP8 files for tensorrt are not meant for it, and ONNX Runtime refuses "
            "many there: judge one of --target ort.",
        ),
    ] = "basic",
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            help="Prepare images as this calibration did (default: as the cache of this model here).",
        ),
    ] = None,
    samples: options.Samples = None,
    batch_size: options.BatchSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    image_size: options.Size = None,
    layout: options.Layout = None,
    image_preset: options.ImagePreset = None,
    inputs: options.Inputs = None,
    as_json: options.AsJson = False,
) -> None:
    """Run the float and the quantized model side by side and say what was lost.

    Images are prepared as calibration prepared them, where this folder holds the model's cache and no image option
    is given.
    """
    from quantkit.errors import SpecError
    from quantkit.graph import load_graph
    from quantkit.pipeline import evaluate_model

    if ort_level not in ("basic", "all"):
        raise SpecError(f"--ort-level {ort_level}: choose basic or all.")
    graph = load_graph(model)
    names = options.mapping(inputs)
    image = options.image_preprocessing(mean, std, image_size, layout, image_preset)
    prepared = None
    if image is None:
        image, prepared = _preparation(graph, cache, data, names)
    found = evaluate_model(
        graph,
        quantized,
        data,
        labels=labels,
        per_layer=per_layer,
        optimize=ort_level == "all",
        samples=samples,
        batch_size=batch_size,
        image=image,
        mapping=names,
        progress=not as_json and options.on_terminal(),
    )
    if prepared is not None:
        typer.echo(prepared, err=True)
    if as_json:
        options.print_json(found.to_dict())
        return
    typer.echo(str(found))
    worst = ", ".join(f"{layer.name} ({layer.sqnr_db:.1f} dB)" for layer in found.worst_layers(3))
    if worst:
        typer.echo(f"\nleast faithful: {worst}")


def _preparation(
    graph: "Graph", given: Path | None, data: Path, names: "dict[str, str] | None"
) -> "tuple[ImagePreprocessing | None, str | None]":
    """How to prepare images where no option says it, and what to tell the user of it: nothing where there are none."""
    from quantkit.errors import CacheError

    found = [(path, way) for path, way in _calibrated(graph, given) if _kind(graph, data, way, names)]
    if found:
        path, way = found[0]
        if any(other != way for _, other in found):
            paths = " and ".join(str(path) for path, _ in found)
            raise CacheError(
                f"{paths}: calibrations of this model that prepared images in different ways; "
                f"say which to follow: --cache {shlex.quote(str(path))}, or give --mean and --std."
            )
        return way, f"images prepared as in {path}"
    if _kind(graph, data, None, names) == "images":
        return None, f"images {options.SCALED}"
    return None, None


def _calibrated(graph: "Graph", given: Path | None) -> "list[tuple[Path, ImagePreprocessing]]":
    """Caches and their preprocessing: that of the cache given, else those of this model in the current folder."""
    from quantkit.cache import SUFFIX, CalibrationCache
    from quantkit.data import ImagePreprocessing
    from quantkit.errors import CacheError

    found = []
    for path in [given] if given is not None else sorted(Path().glob(f"*{SUFFIX}")):
        try:
            cache = CalibrationCache.load(path)
            cache.check_model(graph.fingerprint, str(graph.path or graph.name))
        except CacheError:
            if given is not None:
                raise
            # Evaluating needs no cache: one that is damaged, or another model's, has nothing to say here.
            continue
        fields = cache.data.get("preprocessing")
        if fields is not None:
            found.append((path, ImagePreprocessing.from_json(fields)))
    return found


def _kind(
    graph: "Graph", data: Path, image: "ImagePreprocessing | None", names: "dict[str, str] | None"
) -> str | None:
    """The kind of the data as `SampleSource.description` says it; None where they cannot be opened so."""
    from quantkit.data import open_data
    from quantkit.errors import DataError

    try:
        return str(open_data(data, graph.inputs, image=image, mapping=names).description["kind"])
    except DataError:
        # Float arrays take no preprocessing; what else is wrong with them is said when they are opened to be run.
        return None
