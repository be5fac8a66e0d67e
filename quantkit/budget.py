"""Mixed precision for a goal: which layers have to keep more bits, found from what each of them costs.

    top1 -0.5    at most half a point of accuracy less than float (without labels: of agreement with it)
    sqnr 30      at least 30 dB at the first output
    kl 5         at most 5 milli-nats of KL to float
    size 0.3     a file of at most 0.3 of the float weights' bytes, and of what fits the most faithful

Formats form a ladder, from the one asked for up to float. All layers stand on one rung; those that cost most for their
size are moved up one, in the order of their noise per weight, as few as meet the goal (or as many as fit).
"""

import glob
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import onnx_ir as ir

from quantkit.cache import CalibrationCache
from quantkit.data import ImagePreprocessing, SampleSource, open_data, open_labels
from quantkit.errors import SpecError
from quantkit.evaluation import Evaluation
from quantkit.export import Emitter
from quantkit.exported import Exported
from quantkit.exporting import export_model
from quantkit.files import atomic_write, check_output
from quantkit.graph import Graph, ModelLike, load_graph
from quantkit.planning import Planned, Request, plan_model
from quantkit.recipe import FLOAT, Recipe, Rule, recipe_text
from quantkit.sensitivity import DEFAULT_SAMPLES, first_output, losses, run_plan, runnable_emitter
from quantkit.statistics import GramMatrix
from quantkit.tables import Table

Measure = Literal["top1", "sqnr", "kl", "size"]
# What a layer becomes where its own format costs too much.
_NEXT = {
    "int2": "int4",
    "int4": "int8",
    "w4a8": "int8",
    "w4a8-fp8": "fp8",
    "nvfp4": "fp8",
    "mxfp4": "mxfp8",
}
DEFAULT_TRIES = 16
_SMALL_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A goal: `measure` no worse than `limit`, in percentage points, dB, milli-nats, or parts of the float weights."""

    measure: Measure
    limit: float

    def __str__(self) -> str:
        return f"{self.measure} {self.limit:g}"

    def met_by(self, value: float) -> bool:
        """Tell whether a value of the measure meets the goal."""
        return value >= self.limit if self.measure in ("top1", "sqnr") else value <= self.limit


@dataclass(frozen=True, kw_only=True)
class Try:
    """One assignment of formats, and what it came to.

    Attributes:
        base: the format of all layers but those that were moved up.
        raised: how many layers were, to `to`.
        size: bytes of the file, in parts of the float weights'.
        value: of the goal's measure.
        sqnr_db: at the first output.
        met: whether it meets the goal.
    """

    base: str
    to: str
    raised: int
    size: float
    value: float
    sqnr_db: float
    met: bool


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


def tries_table(tries: list[Try], budget: Budget) -> Table:
    """Return one row a try."""
    unit = {"top1": "top-1 points", "sqnr": "SQNR dB", "kl": "KL mnat", "size": "of float bytes"}[
        budget.measure
    ]
    rows = [
        (
            f"{t.base}, {t.raised} layers {t.to}" if t.raised else t.base,
            f"{t.size:.3f}",
            f"{t.sqnr_db:.1f}",
            f"{t.value:.3f}",
            "met" if t.met else "not met",
        )
        for t in tries
    ]
    return Table(("tried", "size", "SQNR dB", unit, str(budget)), rows)


def parse_budget(text: str) -> Budget:
    """Read a goal such as "top1 -0.5".

    Raises:
        SpecError: it is none.
    """
    words = text.replace("=", " ").split()
    try:
        name, limit = words[0].lower(), float(words[1].rstrip("%"))
        fits = len(words) == 2 and name in get_args(Measure) and np.isfinite(limit)
    except (IndexError, ValueError):
        fits = False
    if not fits or (name == "top1" and limit > 0) or (name in ("kl", "size") and limit <= 0):
        raise SpecError(
            f'budget {text}: no goal; write "top1 -0.5" (points lost at most), "sqnr 30" (dB), "kl 5" (milli-nats) '
            'or "size 0.3" (of the float weights).'
        )
    return Budget(measure=cast(Measure, name), limit=limit)


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
        QuantkitError: as `export_model` and `evaluate_model`.
    """
    goal = parse_budget(budget) if isinstance(budget, str) else budget
    if request.preset is None:
        raise SpecError("budget: no format to start from; give one, such as --int4 or --int8.")
    if tries < 2:
        raise SpecError(f"budget: {tries} tries; give 2 or more.")
    graph = load_graph(model)
    held = CalibrationCache.load(cache) if isinstance(cache, str | os.PathLike) else cache
    if recipe_out is not None:
        check_output(recipe_out, inputs=[graph.path])
    source = open_data(data, graph.inputs, image=image, samples=samples, mapping=mapping)
    next_token = isinstance(labels, str) and labels == "next-token"
    search = _Search(
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
        out=out,
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


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """Layers raised above a rung."""

    rung: int
    raised: tuple[str, ...]
    recipe: Recipe
    found: Try


class _OutOfTriesError(Exception):
    """No more assignments may be evaluated."""


@dataclass(kw_only=True)
class _Search:
    """The search: what it works on, and what it has tried."""

    graph: Graph
    held: CalibrationCache | None
    request: Request
    emitter: Emitter
    grams: Mapping[str, GramMatrix] | str | os.PathLike[str] | None
    source: SampleSource
    few: SampleSource
    labels: np.ndarray | None
    next_token: bool
    batch_size: int | None
    goal: Budget
    tries: int
    on_try: Callable[[Try], object]
    on_node: Callable[[int, int], object]

    def __post_init__(self) -> None:
        self.tried: list[Try] = []
        self._candidates: dict[tuple[int, tuple[str, ...]], _Candidate] = {}
        self.rungs = [str(self.request.preset)]
        while self.rungs[-1] in _NEXT:
            self.rungs.append(_NEXT[self.rungs[-1]])

    def run(self) -> _Candidate:
        """Return the least precise assignment that meets the goal, or what comes nearest to it."""
        try:
            for rung in range(len(self.rungs)):
                # From here to the next rung, the last of which is float.
                if self._try(rung, ()).found.met and self.goal.measure != "size":
                    break
                if self.goal.measure == "size" and self._fits_next(rung):
                    continue
                if (
                    rung + 1 < len(self.rungs)
                    and self.goal.measure != "size"
                    and not self._try(rung + 1, ()).found.met
                ):
                    continue
                self._between(rung)
                break
        except _OutOfTriesError:
            pass
        return self._best()

    def evaluate(self, quantized: Path | Planned) -> Evaluation:
        """Judge a file, or a plan that was not written."""
        from quantkit.evaluate import evaluate

        if isinstance(quantized, Planned):
            return run_plan(
                quantized,
                self.emitter,
                self.source,
                labels=self.labels,
                next_token=self.next_token,
                batch_size=self.batch_size,
            )
        return evaluate(
            self.graph,
            quantized,
            self.source,
            labels=self.labels,
            next_token=self.next_token,
            batch_size=self.batch_size,
        )

    def value(self, evaluation: Evaluation, size: float) -> float:
        """The goal's measure of an evaluated model."""
        output = first_output(evaluation)
        match self.goal.measure:
            case "size":
                return size
            case "sqnr":
                return float("inf") if output.sqnr_db is None else output.sqnr_db
            case "kl":
                found = output.kl_mnat
            case "top1":
                if output.accuracy_quantized is not None and output.accuracy_float is not None:
                    return 100 * (output.accuracy_quantized - output.accuracy_float)
                found = None if output.top1_agreement is None else 100 * (output.top1_agreement - 1)
        if found is None:
            raise SpecError(f"budget {self.goal}: the model's output has no classes; write sqnr or size.")
        return found

    def _between(self, rung: int) -> None:
        """Find how many layers of a rung must be on the next: by halving, since more of them lose less."""
        order = self._order(rung)
        if self.goal.measure == "size":
            low, high = 0, len(order)
            while low + 1 < high:
                middle = (low + high) // 2
                if self._size(self._plan(rung, tuple(order[:middle]))[0]) <= self.goal.limit:
                    low = middle
                else:
                    high = middle
            if low:
                self._try(rung, tuple(order[:low]))
            return
        # All of the last rung in float is nothing quantized: it meets everything, and is no answer.
        low, high = 0, len(order)
        while low + 1 < high:
            middle = (low + high) // 2
            if self._try(rung, tuple(order[:middle])).found.met:
                high = middle
            else:
                low = middle

    def _order(self, rung: int) -> list[str]:
        """The layers, those with the most noise for their size first."""
        planned, _ = self._plan(rung, ())
        found = losses(planned, self.emitter, self.few, batch_size=self.batch_size, on_node=self.on_node)
        known = [n for n in found.nodes if n.node in planned.plan.nodes]
        return [n.node for n in sorted(known, key=lambda n: (-n.noise / max(n.weights, 1), n.node))]

    def _fits_next(self, rung: int) -> bool:
        if rung + 1 >= len(self.rungs):
            return False
        return self._size(self._plan(rung + 1, ())[0]) <= self.goal.limit

    def _try(self, rung: int, raised: tuple[str, ...]) -> _Candidate:
        key = rung, raised
        if key in self._candidates:
            return self._candidates[key]
        if len(self.tried) >= self.tries:
            raise _OutOfTriesError
        planned, recipe = self._plan(rung, raised)
        evaluation = self.evaluate(planned)
        size = self._size(planned)
        value = self.value(evaluation, size)
        sqnr_db = first_output(evaluation).sqnr_db
        found = Try(
            base=self.rungs[rung],
            to=self._above(rung),
            raised=len(raised),
            size=size,
            value=value,
            sqnr_db=float("inf") if sqnr_db is None else sqnr_db,
            met=self.goal.met_by(value),
        )
        self.tried.append(found)
        self.on_try(found)
        self._candidates[key] = _Candidate(rung=rung, raised=raised, recipe=recipe, found=found)
        return self._candidates[key]

    def _above(self, rung: int) -> str:
        return self.rungs[rung + 1] if rung + 1 < len(self.rungs) else FLOAT

    def _plan(self, rung: int, raised: tuple[str, ...]) -> tuple[Planned, Recipe]:
        rules = list(self.request.recipe.rules)
        if rung:
            rules.append(Rule(weights=self.rungs[rung]))
        above = self._above(rung)
        for node in raised:
            match = glob.escape(node)
            rules.append(
                Rule(match=match, keep_float=True) if above == FLOAT else Rule(match=match, weights=above)
            )
        recipe = Recipe(tuple(rules))
        request = replace(self.request, recipe=recipe)
        return plan_model(self.graph, self.held, request, self.emitter.target, grams=self.grams), recipe

    def _size(self, planned: Planned) -> float:
        """Bytes of the file that would be written, in parts of the float weights'."""
        model = self.emitter.emit(planned.graph, planned.plan)
        constants = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
        stored = sum(tensor.nbytes for tensor in constants)
        if stored < _SMALL_BYTES:
            # Of a small model nodes and names are much of it.
            stored = int(ir.serde.serialize_model(model).ByteSize())
        return stored / max(self.graph.weight_bytes, 1)

    def _best(self) -> _Candidate:
        """Of those that meet the goal the smallest (of sizes: the most faithful), else the nearest to it."""
        found = list(self._candidates.values())
        met = [c for c in found if c.found.met]
        if self.goal.measure == "size":
            if met:
                return max(met, key=lambda c: c.found.sqnr_db)
            return min(found, key=lambda c: c.found.size)
        if met:
            return min(met, key=lambda c: (c.found.size, -c.found.sqnr_db))
        sign = 1 if self.goal.measure in ("top1", "sqnr") else -1
        return max(found, key=lambda c: sign * c.found.value)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
