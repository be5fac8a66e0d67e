"""A float model and its cache become a quantized model on disk.

    exported = quantkit.export_model("model.onnx", cache, preset="int8")

The plan is solved, written in the target's own conventions, opened again and held against the plan; only then does the
file get its name.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from numpy.typing import NDArray

from quantkit.cache import CalibrationCache
from quantkit.cache.gram_file import SUFFIX
from quantkit.data import data_files, fill_batch
from quantkit.errors import CacheError, PlanError, SpecError
from quantkit.export import Emitter, FolderEmitter, get_emitter
from quantkit.export.ort import cast_weights
from quantkit.export.verify import Verification, can_run, check_same_function, verify
from quantkit.exported import Exported
from quantkit.files import atomic_folder, atomic_write, check_folder, check_output
from quantkit.formats.spec import ScaleRule
from quantkit.graph import Graph, ModelLike, load_graph
from quantkit.graph.high_precision import HIGH_PRECISION, cast_floats
from quantkit.graph.quantized import find_quantized
from quantkit.interchange.probe import made_up_probe
from quantkit.model_files import model_files
from quantkit.planning.plan import Plan
from quantkit.planning.plan_file import load_plan, save_plan
from quantkit.planning.planning import Planned, Request, obey, plan_model
from quantkit.planning.presets import Target
from quantkit.planning.protecting import edited
from quantkit.planning.recipe import Recipe, load_recipe
from quantkit.planning.rescaling import Folds
from quantkit.statistics import GramMatrix

# Files beyond this keep their weights beside them: protobuf holds 2 GiB at most.
_EXTERNAL_BYTES = 2**31 - 2**24
_NO_BF16 = (
    "bfloat16 runs on ONNX Runtime's CUDA provider; its CPU provider has kernels of few operators for it"
)


def export_model(
    model: ModelLike | None,
    cache: CalibrationCache | str | os.PathLike[str] | None = None,
    *,
    preset: str | None = "int8",
    method: str | None = None,
    method_options: Mapping[str, Any] | None = None,
    alpha: float | Literal["auto"] | None = None,
    folds: Folds = "all",
    grams: Mapping[str, GramMatrix] | str | os.PathLike[str] | None = None,
    target: str | None = None,
    target_options: Mapping[str, Any] | None = None,
    everything: bool = False,
    group: int | Literal["channel"] | None = None,
    symmetric: bool = True,
    per_tensor: bool = False,
    scale_rule: ScaleRule | None = None,
    activations: bool | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    embeddings: bool = False,
    head: bool = True,
    high_precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    device: str = "cpu",
    plan: Plan | str | os.PathLike[str] | None = None,
    plan_out: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Exported:
    """Solve a plan from the cache and write the quantized model; the float model is not run over data again.

    The file is opened again, checked, run once on a sample that the cache keeps, and compared with NumPy's reading
    of the plan before it gets its name. Models of more than 256 MiB are not run: their weights are read back instead.

    Args:
        model: the float model; None for the one the cache was made from.
        cache: a cache or its path; None where activations stay in float.
        preset: one of `list_presets()`; None where a recipe alone says what is quantized.
        method: one or several, joined by "+": equalize; smoothquant or awq; amax, mse, weighted, output or gptq for
            the rounding of weights; a calibrator for the ranges of activations; bias. None for the cache's. "mse" is a
            calibrator unless weights alone are quantized.
        method_options: those of the calibrator.
        alpha: of smoothquant: from 0 to 1, or "auto" for the best of each group, from Gram matrices; None for 0.7.
        folds: where scales of channels may go: into norms alone, into all that they fold into exactly, or also into a
            Mul of their own ("insert").
        grams: Gram matrices by view, or the path of a file of them; None for the one beside the cache. awq, gptq,
            weighted, output and alpha "auto" need them.
        target: tensorrt (unless the plan is for another one), ort, ort-cpu, ort-qoperator, vllm, or a plug-in's.
        target_options: what only that target has: {"trt": 10}, {"accuracy_level": 4}, {"name_map": {…}}.
        everything: quantize also what the preset leaves in float for speed or accuracy.
        group: weights that share a scale, for presets in groups, or "channel"; None for the preset's own (128).
        symmetric: False for integer weights with zero points.
        per_tensor: one scale for each weight.
        scale_rule: the rule of MX scales, followed to the letter; None for rceil, and a search for the least error.
        activations: False leaves them in float; True quantizes those that the preset leaves unless asked (nvfp4).
        recipe: rules, or the path of a file of them.
        include, exclude: patterns of node names: only these, and not these.
        embeddings: quantize look-up tables too, where the target can.
        head: quantize the last linear layer too.
        high_precision: the type of what is not quantized.
        device: "cpu", or "cuda" to search on a GPU (awq, gptq, output); the result is the same.
        plan: a plan, or the path of one, to obey: nothing is solved, and what says how to is refused.
        plan_out: where to save the plan, as `plan` reads it.
        out: the file to write; None for `<stem>.<preset>[.<target> unless tensorrt].onnx` in the current folder.

    Raises:
        CacheError: the cache is missing, damaged or of another model, or its ranges are fixed and `method` is another.
        RecipeError, SpecError, UnknownNameError, PlanError: what is asked for does not exist or does not go together.
        ExportError: the written file failed its check.
        FileError: it could not be written, or is one of the float model's, or the cache.
    """
    if high_precision not in ("fp32", *HIGH_PRECISION):
        raise SpecError(f"high precision {high_precision}: choose fp32, {' or '.join(HIGH_PRECISION)}.")
    held = CalibrationCache.load(cache) if isinstance(cache, str | os.PathLike) else cache
    found = load_plan(plan) if isinstance(plan, str | os.PathLike) else plan
    if found is not None and target not in (None, found.target):
        raise PlanError(
            f"plan: it is for {found.target}, not {target}; leave --target out, or solve another plan."
        )
    target = target or (found.target if found is not None else "tensorrt")
    emitter = get_emitter(target, **(target_options or {}))
    if high_precision == "bf16" and target in ("ort-cpu", "ort-qoperator"):
        raise SpecError(
            f"--high-precision bf16: ONNX Runtime's CPU provider, which {target} is for, has no kernels for "
            "bfloat16; choose fp16, or leave it out."
        )
    request = Request(
        preset=preset,
        group=group,
        symmetric=symmetric,
        per_tensor=per_tensor,
        scale_rule=scale_rule,
        activations=activations,
        method=method,
        method_options=method_options,
        alpha=alpha,
        folds=folds,
        everything=everything,
        recipe=recipe
        if isinstance(recipe, Recipe)
        else Recipe()
        if recipe is None
        else load_recipe(Path(recipe)),
        include=tuple(include),
        exclude=tuple(exclude),
        embeddings=embeddings,
        head=head,
        scale_dtype=HIGH_PRECISION[high_precision].numpy() if high_precision != "fp32" else None,
        device=device,
    )
    if found is None:
        _check_early(request, emitter.target, held, model)
    if model is None:
        if held is None:
            raise CacheError("export: neither a model nor a cache; give one of them.")
        model = held.find_model("cache" if isinstance(cache, CalibrationCache | None) else cache)
    graph = load_graph(model)
    if held is not None:
        held.check_model(graph.fingerprint, str(graph.path or graph.name))
    folder = isinstance(emitter, FolderEmitter)
    name = found.preset if found is not None else preset or "recipe"
    path = Path(out) if out is not None else Path(default_name(graph.name, name, target, folder=folder))
    given = [given for given in (cache, recipe, plan, grams) if isinstance(given, str | os.PathLike)]
    if isinstance(emitter, FolderEmitter):
        check_folder(path, replaceable=emitter.files)
    else:
        check_output(path, inputs=_read(graph, held, given))
        if _is_external(graph):
            check_output(_external(Path(os.path.realpath(path))), inputs=_read(graph, held, given))
    if plan_out is not None:
        check_output(plan_out, inputs=chain(_read(graph, held, given), [path]))
    planned = (
        obey(graph, found)
        if found is not None
        else plan_model(graph, held, request, emitter.target, grams=grams)
    )
    if high_precision == "bf16" and target == "ort":
        planned = replace(planned, warnings=(*planned.warnings, _NO_BF16))
    exported = (
        _write_folder(emitter, planned, HIGH_PRECISION.get(high_precision), path)
        if isinstance(emitter, FolderEmitter)
        else _write_file(emitter, planned, held, high_precision, path)
    )
    if plan_out is not None:
        save_plan(planned.plan, plan_out)
    return exported


def _read(
    graph: Graph, held: CalibrationCache | None, given: Iterable[str | os.PathLike[str]]
) -> Iterator[str | os.PathLike[str]]:
    """Yield the files that nothing may be written over: the model's, what was named, and what calibration ran on."""
    yield from model_files(graph.path) if graph.path else ()
    yield from given
    if held is not None and held.path is not None:
        yield from (held.path, held.path.with_suffix(SUFFIX))
    paths = [] if held is None else held.data.get("path", [])
    for path in [paths] if isinstance(paths, str) else paths:
        yield from data_files(Path(path))


def _check_early(
    request: Request, target: Target, held: CalibrationCache | None, model: ModelLike | None
) -> None:
    """Refuse what cannot be, before the model is read."""
    preset = request.resolved()
    observed = preset is not None and target.needs_calibration(preset)
    if held is None and (model is None or observed):
        needs = "a calibration cache" if preset is None or observed else "the model, or its cache"
        raise CacheError(
            f"export: {request.preset or 'the recipe'} needs {needs}; give one, or run `quantkit calibrate` first."
        )


def _write_file(
    emitter: Emitter, planned: Planned, held: CalibrationCache | None, high_precision: str, path: Path
) -> Exported:
    graph, plan = planned.graph, planned.plan
    written = emitter.emit(graph, plan)
    if high_precision != "fp32":
        written, _ = cast_floats(written, HIGH_PRECISION[high_precision])
        if high_precision == "fp16" and emitter.target.integer_bias:
            cast_weights(written)
    made_up = held is None or bool(held.ranges)
    probe: dict[str, NDArray[Any]] = {}
    if can_run(graph):
        probe = (
            made_up_probe(graph, held.ranges if held else {})
            if held is None or made_up
            else fill_batch(dict(held.probe), graph.inputs)
        )
    with atomic_write(path) as temporary:
        save(written, temporary, external=_is_external(graph))
        if plan.edits is not None and probe:
            check_same_function(planned.original, edited(planned.original, plan.edits, biases=False), probe)
        checked = verify(temporary, graph, plan, probe, reference=planned.original)
        size = sum(file.stat().st_size for file in temporary.parent.iterdir())
    return _exported(planned, path, size, checked, _unproven(held, probe, can_run(graph)))


def _write_folder(
    emitter: FolderEmitter, planned: Planned, floats: ir.DataType | None, path: Path
) -> Exported:
    with atomic_folder(path, replaceable=emitter.files) as temporary:
        emitter.write(planned.graph, planned.plan, temporary, floats=floats)
        checked = emitter.verify(temporary, planned.graph, planned.plan, floats=floats)
        size = sum(file.stat().st_size for file in temporary.iterdir())
    return _exported(planned, path, size, checked, [])


def _exported(
    planned: Planned, path: Path, size: int, checked: Verification, warnings: list[str]
) -> Exported:
    return Exported(
        path=path,
        plan=planned.plan,
        size_bytes=size,
        float_size_bytes=planned.graph.weight_bytes,
        verification=checked,
        warnings=(*warnings, *planned.warnings),
        kept=tuple(find_quantized(planned.original)[0]),
    )


def _unproven(held: CalibrationCache | None, probe: Mapping[str, object], could_run: bool) -> list[str]:
    """What a file leaves open that was not run on a real sample."""
    if not could_run:
        return [
            "the model is large: its weights were read back, but it was not run; evaluate it on real data"
        ]
    if held is not None and not held.ranges:
        return []
    why = "the imported ranges come without a sample" if held is not None else "no calibration, so no sample"
    if probe:
        return [f"{why}: the file was run on made-up input alone; evaluate it on real data"]
    return [f"{why}, and no made-up input runs: the file was not run; evaluate it on real data"]


def default_name(stem: str, preset: str, target: str, *, folder: bool = False) -> str:
    """Return an exported file's name: `<stem>.<preset>[.<target> unless tensorrt].onnx`; a folder has no `.onnx`."""
    name = f"{stem}.{preset}" if target == "tensorrt" else f"{stem}.{preset}.{target}"
    return name if folder else f"{name}.onnx"


def save(model: ir.Model, path: Path, *, external: bool = False) -> None:
    """Write the model, its weights beside it where that is asked for or protobuf could not hold them."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    beside = external or size > _EXTERNAL_BYTES
    ir.save(model, path, external_data=_external(path).name if beside else None)


def _is_external(graph: Graph) -> bool:
    """Whether the model's own weights lie beside it, or are too many for one file."""
    return graph.weight_bytes > _EXTERNAL_BYTES or any(
        isinstance(v.const_value, ir.ExternalTensor) for v in graph.model.graph.initializers.values()
    )


def _external(path: Path) -> Path:
    """The file beside a model that holds its weights, where they are many."""
    return path.with_name(f"{path.name}.data")
