"""The search for a budget: which layers keep more bits, found from what each of them costs.

Formats form a ladder, from the one asked for up to float. All layers stand on one rung; those that cost most for their
size are moved up one, in the order of their noise per weight, as few as meet the goal (or as many as fit). Every
assignment is solved as an export solves it, and run.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quantkit.cache import CalibrationCache
from quantkit.data import SampleSource
from quantkit.errors import SpecError
from quantkit.evaluation.evaluation import Evaluation
from quantkit.export import Emitter
from quantkit.graph import Graph
from quantkit.mixed_precision.goals import Budget, Try
from quantkit.mixed_precision.sensitivity import first_output, losses, run_plan
from quantkit.planning.planning import Planned, Request, plan_model
from quantkit.planning.recipe import FLOAT, Recipe, Rule, literal
from quantkit.statistics import GramMatrix

# What a layer becomes where its own format costs too much.
_NEXT = {
    "int2": "int4",
    "int4": "int8",
    "w4a8": "int8",
    "w4a8-fp8": "fp8",
    "nvfp4": "fp8",
    "mxfp4": "mxfp8",
}
_SMALL_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Layers raised above a rung."""

    rung: int
    raised: tuple[str, ...]
    recipe: Recipe
    found: Try


class OutOfTriesError(Exception):
    """No more assignments may be evaluated."""


@dataclass(kw_only=True)
class Search:
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
        self._candidates: dict[tuple[int, tuple[str, ...]], Candidate] = {}
        self.rungs = [str(self.request.preset)]
        while self.rungs[-1] in _NEXT:
            self.rungs.append(_NEXT[self.rungs[-1]])

    def run(self) -> Candidate:
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
        except OutOfTriesError:
            pass
        return self._best()

    def evaluate(self, quantized: Path | Planned) -> Evaluation:
        """Judge a file, or a plan that was not written."""
        from quantkit.evaluation.evaluate import evaluate

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

    def _try(self, rung: int, raised: tuple[str, ...]) -> Candidate:
        key = rung, raised
        if key in self._candidates:
            return self._candidates[key]
        if len(self.tried) >= self.tries:
            raise OutOfTriesError
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
        self._candidates[key] = Candidate(rung=rung, raised=raised, recipe=recipe, found=found)
        return self._candidates[key]

    def _above(self, rung: int) -> str:
        return self.rungs[rung + 1] if rung + 1 < len(self.rungs) else FLOAT

    def _plan(self, rung: int, raised: tuple[str, ...]) -> tuple[Planned, Recipe]:
        rules = list(self.request.recipe.rules)
        if rung:
            rules.append(Rule(weights=self.rungs[rung]))
        above = self._above(rung)
        for node in raised:
            match = literal(node)
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

    def _best(self) -> Candidate:
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
