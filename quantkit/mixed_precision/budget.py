"""Mixed precision for a goal: search, write, and judge what was written."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.cache import CalibrationCache
from quantkit.cache.gram_file import SUFFIX
from quantkit.data import ImagePreprocessing, data_files, open_data, open_labels
from quantkit.errors import SpecError
from quantkit.evaluation.evaluation import Evaluation
from quantkit.exported import Exported
from quantkit.exporting import default_name, export_model
from quantkit.files import atomic_write, check_output
from quantkit.graph import Graph, ModelLike, load_graph
from quantkit.mixed_precision.goals import Budget, Try, parse_budget, tries_table
from quantkit.mixed_precision.search import Search
from quantkit.mixed_precision.sensitivity import DEFAULT_SAMPLES, runnable_emitter
from quantkit.model_files import model_files
from quantkit.planning.planning import Request
from quantkit.planning.recipe import Recipe, recipe_text
from quantkit.statistics import GramMatrix
from quantkit.tables import Table

DEFAULT_TRIES = 16


@dataclass(frozen=True, kw_only=True)
class BudgetResult:
    """What was found, and how.

    Attributes:
        budget: the goal.
        tries: what was tried, in order.
        recipe: the rules of the best, over the format asked for.
        exported: the file written by them.
        evaluation: of that file.
        value: of the goal's measure, of that file.
        met: whether it meets the goal.
    """

    budget: Budget
    tries: list[Try]
    recipe: Recipe
    exported: Exported
    evaluation: Evaluation
    value: float
    met: bool

    def table(self) -> Table:
        """Return one row a try."""
        return tries_table(self.tries, self.budget)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON would hold it."""
        return {
            "budget": str(self.budget),
            "met": self.met,
            "value": _plain(self.value),
            "tries": [{k: _plain(v) for k, v in vars(t).items()} for t in self.tries],
            "recipe": recipe_text(self.recipe),
            "exported": self.exported.to_dict(),
            "evaluation": self.evaluation.to_dict(),
        }

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def meet_budget(
    model: ModelLike,
    cache: CalibrationCache | str | os.PathLike[str] | None,
    data: object,
    budget: Budget | str,
    *,
    request: Request,
    target: str = "tensorrt",
    target_options: Mapping[str, Any] | None = None,
    grams: Mapping[str, GramMatrix] | str | os.PathLike[str] | None = None,
    labels: object = None,
    samples: int | None = None,
    batch_size: int | None = None,
    image: ImagePreprocessing | None = None,
    mapping: Mapping[str, str] | None = None,
    tries: int = DEFAULT_TRIES,
    out: str | os.PathLike[str] | None = None,
    recipe_out: str | os.PathLike[str] | None = None,
    on_try: Callable[[Try], object] = lambda found: None,
    on_node: Callable[[int, int], object] = lambda done, count: None,
) -> BudgetResult:
    """Find which layers need more bits, write the model, and evaluate what was written.

    Args:
        model, cache, data, labels, image, mapping, batch_size: as for `evaluate_model`; "next-token" too.
        budget: the goal.
        request: the format that as many layers as possible are to have, with its methods.
        target, target_options, grams: as for `export_model`; a target that writes ONNX models.
        samples: at most so many of the data.
        tries: how many assignments to evaluate at most; then the best of them is written.
        out: the file to write.
        recipe_out: where to write the recipe that was found.
        on_try, on_node: called as the search goes on.

    Raises:
        SpecError: the request names no format to start from, or the goal is none.
        FileError: what is to be written has no place, or would be written over what is read.
        QuantkitError: as `export_model` and `evaluate_model`.
    """
    goal = parse_budget(budget) if isinstance(budget, str) else budget
    if request.preset is None:
        raise SpecError("budget: no format to start from; give one, such as --int4 or --int8.")
    if tries < 2:
        raise SpecError(f"budget: {tries} tries; give 2 or more.")
    graph = load_graph(model)
    held = CalibrationCache.load(cache) if isinstance(cache, str | os.PathLike) else cache
    if held is not None:
        held.check_model(graph.fingerprint, str(graph.path or graph.name))
    # Now, not after minutes of searching.
    beside = [] if held is None or held.path is None else [held.path, held.path.with_suffix(SUFFIX)]
    read = list(_read(graph, cache, grams, data, labels, *beside))
    path = Path(default_name(graph.name, request.preset, target) if out is None else out)
    check_output(path, inputs=read)
    if recipe_out is not None:
        check_output(recipe_out, inputs=[*read, path])
        if os.path.realpath(recipe_out) == os.path.realpath(path):
            raise SpecError(f"--recipe-out {recipe_out}: the model goes there; choose another path.")
    source = open_data(data, graph.inputs, image=image, samples=samples, mapping=mapping)
    next_token = isinstance(labels, str) and labels == "next-token"
    search = Search(
        graph=graph,
        held=held,
        request=request,
        emitter=runnable_emitter(target, target_options),
        grams=grams,
        source=source,
        few=open_data(
            data,
            graph.inputs,
            image=image,
            samples=min(samples or DEFAULT_SAMPLES, DEFAULT_SAMPLES),
            mapping=mapping,
        ),
        labels=None if labels is None or next_token else open_labels(labels),
        next_token=next_token,
        batch_size=batch_size,
        goal=goal,
        tries=tries,
        on_try=on_try,
        on_node=on_node,
    )
    best = search.run()
    if recipe_out is not None:
        with atomic_write(recipe_out) as temporary:
            temporary.write_text(
                recipe_text(best.recipe, about=f"{request.preset}, {goal}"), encoding="utf-8"
            )
    asked = {k: v for k, v in vars(request).items() if k not in ("recipe", "scale_dtype")}
    exported = export_model(
        graph,
        held,
        **asked,
        recipe=best.recipe,
        grams=grams,
        target=target,
        target_options=target_options,
        out=path,
    )
    evaluation = search.evaluate(exported.path)
    share = exported.size_bytes / max(exported.float_size_bytes, 1)
    value = search.value(evaluation, share)
    return BudgetResult(
        budget=goal,
        tries=search.tried,
        recipe=best.recipe,
        exported=exported,
        evaluation=evaluation,
        value=value,
        met=goal.met_by(value),
    )


def _read(graph: Graph, *given: object) -> Iterator[Path]:
    """Yield the files that are read, which nothing may be written over."""
    yield from model_files(graph.path) if graph.path else ()
    for path in given:
        if isinstance(path, str | os.PathLike):
            yield from data_files(Path(path)) if Path(path).is_dir() else [Path(path)]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
