"""`quantkit evaluate`."""

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
    calibrated = None
    if image is None:
        calibrated = _calibrated(graph, cache)
        if calibrated is not None and _takes(graph, data, calibrated[1], names):
            image = calibrated[1]
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
        progress=not as_json,
    )
    if as_json:
        options.print_json(found.to_dict())
        return
    if calibrated is not None and image is calibrated[1]:
        typer.echo(f"images prepared as in {calibrated[0]}", err=True)
    typer.echo(str(found))
    worst = ", ".join(f"{layer.name} ({layer.sqnr_db:.1f} dB)" for layer in found.worst_layers(3))
    if worst:
        typer.echo(f"\nleast faithful: {worst}")


def _calibrated(graph: "Graph", given: Path | None) -> "tuple[Path, ImagePreprocessing] | None":
    """The cache and its preprocessing: of the cache given, else of this model's in the current folder."""
    from quantkit.cache import SUFFIX, CalibrationCache
    from quantkit.data import ImagePreprocessing
    from quantkit.errors import CacheError

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
            return path, ImagePreprocessing.from_json(fields)
    return None


def _takes(graph: "Graph", data: Path, image: "ImagePreprocessing", names: "dict[str, str] | None") -> bool:
    """Whether the data are pixels that a preprocessing has something to do with."""
    from quantkit.data import open_data
    from quantkit.errors import DataError

    try:
        open_data(data, graph.inputs, image=image, mapping=names)
    except DataError:
        # What is wrong with the data is said when they are opened without it.
        return False
    return True
