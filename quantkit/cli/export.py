"""`quantkit export`."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from quantkit.cli import options
from quantkit.cli.budget import export_within

if TYPE_CHECKING:
    from quantkit.cache import CalibrationCache
    from quantkit.export.verify import Verification
    from quantkit.exported import Exported
    from quantkit.formats.spec import ScaleRule


def _format(flag: str, help_: str) -> Any:
    """A flag that stands for a preset."""
    return typer.Option(*flag.split(), help=help_)


def export(
    model: Annotated[
        Path | None, typer.Argument(help="The float model (default: the one the cache was made from).")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="The calibration cache (default: the one *.calib here).")
    ] = None,
    int8: Annotated[bool, _format("--int8", "INT8 activations, INT8 weights per channel.")] = False,
    fp8: Annotated[bool, _format("--fp8", "FP8 (E4M3) activations, FP8 weights per channel.")] = False,
    fp8_block: Annotated[
        bool,
        _format(
            "--fp8-block", "FP8 weights with a scale for 128×128; activations 1×128 where a target has them."
        ),
    ] = False,
    int4: Annotated[bool, _format("--int4", "INT4 weights in groups of 128. No calibration needed.")] = False,
    w4a8: Annotated[bool, _format("--w4a8", "INT4 weights in groups of 128, INT8 activations.")] = False,
    w4a8_fp8: Annotated[
        bool, _format("--w4a8-fp8", "INT4 weights in groups of 128, FP8 activations.")
    ] = False,
    nvfp4: Annotated[
        bool, _format("--fp4 --nvfp4", "NVFP4 weights: FP4 in blocks of 16. No calibration needed.")
    ] = False,
    mxfp4: Annotated[
        bool, _format("--mxfp4", "MXFP4 weights: FP4 in blocks of 32, scales that are powers of two.")
    ] = False,
    mxfp8: Annotated[
        bool,
        _format("--mxfp8", "MXFP8 weights, and activations where a target has them. No calibration needed."),
    ] = False,
    int16: Annotated[bool, _format("--int16", "INT16 activations, INT8 weights per channel.")] = False,
    int2: Annotated[bool, _format("--int2", "INT2 weights in groups of 32. No calibration needed.")] = False,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Any of these by name, or a plug-in's."),
    ] = None,
    group: options.Group = None,
    zero_points: Annotated[
        bool,
        typer.Option("--zero-points", help="Of INT4 and INT2 weights: with zero points."),
    ] = False,
    per_tensor: Annotated[
        bool,
        typer.Option("--per-tensor", help="One scale for each weight."),
    ] = False,
    scale_rule: Annotated[
        str | None,
        typer.Option(
            "--scale-rule",
            metavar="ocp|rceil|even",
            help="Of MX scales, to the letter (default: rceil, or a neighbour of less error).",
        ),
    ] = None,
    activations: Annotated[
        bool | None,
        typer.Option(
            "--activations/--no-activations",
            help="Quantize activations too where a format does so only when asked (NVFP4, MXFP4), or never.",
        ),
    ] = None,
    method: options.Method = None,
    percentile: options.Percentile = None,
    alpha: options.Alpha = None,
    folds: options.FoldsOption = "all",
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="Quantize also what stays in float by default (FP8: narrow convolutions, Gemm)."
        ),
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="PATTERN",
            help="Only nodes of such names: a glob, or a regular expression between slashes.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Keep such nodes in float."),
    ] = None,
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings/--no-embeddings", help="Quantize look-up tables too, where the target can."
        ),
    ] = False,
    head: Annotated[
        bool,
        typer.Option("--lm-head/--no-lm-head", help="Quantize the last linear layer too."),
    ] = True,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", help="Rules of what is quantized how (TOML), over the format given, or alone."
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="Obey this solved plan: nothing is solved."),
    ] = None,
    plan_out: Annotated[
        Path | None,
        typer.Option("--plan-out", help="Save the solved plan (JSON)."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="tensorrt (default): Q/DQ as TensorRT 10 and 11 read it. ort: right on ONNX Runtime's CUDA and CPU "
            "providers. ort-cpu: uint8, placed so that the CPU provider runs integers from end to end. "
            "ort-qoperator: ONNX Runtime's integer operators. vllm: a folder of compressed tensors.",
        ),
    ] = None,
    trt: Annotated[
        int | None,
        typer.Option("--trt", help="For tensorrt: its major version, 10 or 11."),
    ] = None,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            "--accuracy-level",
            help="For ort and ort-cpu: what MatMulNBits computes in, 4 for int8 (default: float32).",
        ),
    ] = None,
    name_map: Annotated[
        Path | None,
        typer.Option("--name-map", help="For vllm: JSON of {ONNX name: module path}."),
    ] = None,
    high_precision: Annotated[
        str,
        typer.Option("--high-precision", metavar="fp32|fp16|bf16", help="The type of what is not quantized."),
    ] = "fp32",
    device: Annotated[
        str, typer.Option("--device", help="cuda: awq, gptq and output search on a GPU, by CuPy.")
    ] = "cpu",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar='"top1 -0.5"|"sqnr 30"|"kl 5"|"size 0.3"',
            help="Give more bits to as few layers as it takes: points of accuracy lost at most, dB, milli-nats, or "
            "parts of the float weights. Judged on --data; exit code 1 where it cannot be met.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="For --budget: what to judge by, as of `evaluate`."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", help="For --budget top1: right classes, as of `evaluate` (default: agreement)."
        ),
    ] = None,
    samples: options.Samples = None,
    recipe_out: Annotated[
        Path | None,
        typer.Option("--recipe-out", help="For --budget: keep the recipe that was found."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write (default: <model>.<format>[.<target>].onnx here)."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a quantized model from a calibration cache, check it, and say what was quantized and what was not."""
    from quantkit.cache import CalibrationCache, find_cache
    from quantkit.errors import SpecError
    from quantkit.exporting import export_model
    from quantkit.files import check_output
    from quantkit.planning.planning import Request
    from quantkit.planning.presets import get_preset
    from quantkit.planning.recipe import Recipe, load_recipe

    flags = {
        "int8": int8,
        "fp8": fp8,
        "fp8-block": fp8_block,
        "int4": int4,
        "w4a8": w4a8,
        "w4a8-fp8": w4a8_fp8,
        "nvfp4": nvfp4,
        "mxfp4": mxfp4,
        "mxfp8": mxfp8,
        "int16": int16,
        "int2": int2,
    }
    chosen = [name for name, given in flags.items() if given] + ([] if preset is None else [preset])
    if len(chosen) > 1:
        raise SpecError(f"export: {' and '.join(f'--{name}' for name in chosen)}: give one format alone.")
    if not chosen and recipe is None and plan is None:
        raise SpecError(
            "export: no format; give one of --int8, --fp8, --int4, --nvfp4 … (`quantkit export --help` lists all), "
            "a --recipe or a --plan."
        )
    wanted = get_preset(chosen[0], activations=activations) if chosen else None
    alone = model is not None and (
        plan is not None or not options.needs_cache(wanted, target or "tensorrt", method, recipe)
    )
    if cache is None and not alone:
        cache = find_cache(Path())
    held = None if cache is None else CalibrationCache.load(cache)
    if out is not None and target != "vllm":
        check_output(out, inputs=[cache, recipe, plan, name_map])
    if recipe_out is not None:
        check_output(recipe_out, inputs=[cache, recipe, name_map])
    if plan_out is not None:
        check_output(plan_out, inputs=[cache, recipe, plan, name_map])
        if out is not None and os.path.realpath(plan_out) == os.path.realpath(out):
            raise SpecError(f"--plan-out {plan_out}: the model goes there, by --out; choose another path.")
    if model is None and held is not None and cache is not None:
        model = held.find_model(cache)
    assert model is not None, "without a model there is a cache"
    if budget is not None:
        _only(
            "--budget",
            {
                "--plan": plan,
                "--plan-out": plan_out,
                "--high-precision": None if high_precision == "fp32" else high_precision,
            },
        )
        request = Request(
            preset=chosen[0] if chosen else None,
            group=options.group_of(group),
            symmetric=not zero_points,
            per_tensor=per_tensor,
            scale_rule=_scale_rule(scale_rule),
            activations=activations,
            method=method,
            method_options=options.method_options(method or (held.method if held else None), percentile),
            alpha=options.alpha_of(alpha),
            folds=options.folds_of(folds),
            everything=everything,
            recipe=Recipe() if recipe is None else load_recipe(recipe),
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            embeddings=embeddings,
            head=head,
            device=device,
        )
        export_within(
            budget,
            model,
            held,
            request,
            data=data,
            labels=labels,
            samples=samples,
            target=target or "tensorrt",
            target_options=_target_options(trt, accuracy_level, name_map),
            out=out,
            recipe_out=recipe_out,
            as_json=as_json,
        )
        return
    _only(
        "--budget",
        {"--data": data, "--labels": labels, "--samples": samples, "--recipe-out": recipe_out},
        needed=True,
    )
    with options.before_writing():
        exported = export_model(
            model,
            held,
            preset=chosen[0] if chosen else None,
            method=method,
            method_options=options.method_options(method or (held.method if held else None), percentile),
            alpha=options.alpha_of(alpha),
            folds=options.folds_of(folds),
            target=target,
            target_options=_target_options(trt, accuracy_level, name_map),
            everything=everything,
            group=options.group_of(group),
            symmetric=not zero_points,
            per_tensor=per_tensor,
            scale_rule=_scale_rule(scale_rule),
            activations=activations,
            recipe=recipe,
            include=include or (),
            exclude=exclude or (),
            embeddings=embeddings,
            head=head,
            device=device,
            high_precision=_high_precision(high_precision),
            plan=plan,
            plan_out=plan_out,
            out=out,
        )
    if as_json:
        options.print_json(exported.to_dict())
    else:
        _show(exported, held, model, cache)


def _target_options(trt: int | None, accuracy_level: int | None, name_map: Path | None) -> dict[str, Any]:
    given: dict[str, Any] = {"trt": trt, "accuracy_level": accuracy_level, "name_map": name_map}
    return {name: value for name, value in given.items() if value is not None}


def _only(budget: str, given: dict[str, object], *, needed: bool = False) -> None:
    """Refuse options that do not go with --budget, or that mean nothing without."""
    from quantkit.errors import SpecError

    wrong = [name for name, value in given.items() if value is not None]
    if wrong and needed:
        raise SpecError(f"{' and '.join(wrong)}: belongs to {budget}; give a goal, or leave it out.")
    if wrong:
        raise SpecError(
            f"{' and '.join(wrong)}: does not go with {budget}; export once more with its --recipe-out."
        )


def _scale_rule(text: str | None) -> "ScaleRule | None":
    from quantkit.errors import SpecError
    from quantkit.formats.spec import ScaleRule

    known: dict[str, ScaleRule] = {rule: rule for rule in get_args(ScaleRule)}
    if text is not None and text not in known:
        raise SpecError(f"--scale-rule {text}: no such rule; choose {', '.join(known)}.")
    return None if text is None else known[text]


def _high_precision(text: str) -> Literal["fp32", "fp16", "bf16"]:
    from quantkit.errors import SpecError

    known: dict[str, Literal["fp32", "fp16", "bf16"]] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
    if text not in known:
        raise SpecError(f"--high-precision {text}: no such type; choose {', '.join(known)}.")
    return known[text]


def _show(exported: "Exported", held: "CalibrationCache | None", model: Path, cache: Path | None) -> None:
    plan = exported.plan
    typer.echo(exported.table().text())
    share = exported.size_bytes / max(exported.float_size_bytes, 1)
    typer.echo(
        f"\nwrote {exported.path}: {plan.preset} for {plan.target}, method {plan.method}, "
        f"{options.size(exported.size_bytes)} ({share:.0%} of the float weights' "
        f"{options.size(exported.float_size_bytes)})"
    )
    if exported.verification is not None:
        typer.echo(f"checked: {_verdict(exported.verification)}")
    if exported.kept:
        typer.echo(f"kept: the model's own scales, {len(exported.kept)} in all")
    for warning in exported.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"\nnext: {shlex.join(_evaluation(exported.path, held, model, cache))}")
    typer.echo("      (better with data that calibration did not see, and their --labels)")


def _verdict(found: "Verification") -> str:
    agrees = "exactly" if found.plan_sqnr_db == float("inf") else f"to {found.plan_sqnr_db:.0f} dB"
    if not found.output:
        return f"opened again, weights read back; they follow the plan {agrees}"
    decoded = f", with {', '.join(found.decoded)} decoded," if found.decoded else ""
    return f"opened again, run once{decoded or ';'} follows its plan {agrees}"


def _evaluation(path: Path, held: "CalibrationCache | None", model: Path, cache: Path | None) -> list[str]:
    """The words of a command that evaluates the written file on the data of the calibration."""
    if held is None or cache is None:
        return ["quantkit", "evaluate", str(model), str(path), "--data", "DATA"]
    # A merged cache has a list of them.
    paths = held.data.get("path", [])
    there = [Path(p) for p in ([paths] if isinstance(paths, str) else paths) if Path(p).exists()]
    words = ["quantkit", "evaluate", str(model), str(path)]
    words += ["--data", options.short(there[0]) if there else "DATA"]
    for name, key in held.data.get("mapping", {}).items():
        words += ["--input", f"{name}={key}"]
    if "preprocessing" in held.data and list(Path().glob(f"*{cache.suffix}")) != [cache]:
        words += ["--cache", str(cache)]
    return words
