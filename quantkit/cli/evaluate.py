"""`quantkit evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import options

if TYPE_CHECKING:
    from quantkit.data import ImagePreprocessing


def evaluate(
    model: Annotated[Path, typer.Argument(help="The float model.")],
    quantized: Annotated[Path, typer.Argument(help="The quantized model.")],
    data: options.Data,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="Right classes: .npy, .txt (one a line), .npz (key labels, or FILE:KEY); or `next-token` for a "
            "language model that is judged on its own input.",
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
            "ONNX Runtime user gets by default.",
        ),
    ] = "basic",
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

    Images are prepared as calibration prepared them where this folder holds the model's cache and no image option
    is given.
    """
    from quantkit.errors import SpecError
    from quantkit.graph import load_graph
    from quantkit.pipeline import evaluate_model

    if ort_level not in ("basic", "all"):
        raise SpecError(f"--ort-level {ort_level}: choose basic or all.")
    graph = load_graph(model)
    image = options.image_preprocessing(mean, std, image_size, layout, image_preset)
    found = evaluate_model(
        graph,
        quantized,
        data,
        labels=labels,
        per_layer=per_layer,
        optimize=ort_level == "all",
        samples=samples,
        batch_size=batch_size,
        image=image or _calibrated(graph.fingerprint),
        mapping=options.mapping(inputs),
        progress=not as_json,
    )
    if as_json:
        options.print_json(found.to_dict())
        return
    typer.echo(str(found))
    if per_layer:
        worst = ", ".join(f"{layer.name} ({layer.sqnr_db:.1f} dB)" for layer in found.worst_layers(3))
        typer.echo(f"\nleast faithful: {worst}")


def _calibrated(fingerprint: str) -> "ImagePreprocessing | None":
    """The preprocessing of this model's calibration cache, where one lies in the current folder."""
    from quantkit.cache import CalibrationCache
    from quantkit.data import ImagePreprocessing
    from quantkit.errors import CacheError

    for path in sorted(Path().glob("*.calib")):
        try:
            cache = CalibrationCache.load(path)
        except CacheError:
            # Evaluating needs no cache: one that is damaged, or no cache at all, has nothing to say here.
            continue
        fields = cache.data.get("preprocessing")
        if cache.model.fingerprint == fingerprint and fields is not None:
            typer.echo(f"images prepared as in {path}", err=True)
            return ImagePreprocessing.from_json(fields)
    return None
