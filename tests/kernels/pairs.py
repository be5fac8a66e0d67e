"""Rows of factors that hold every pair of two factors' values: most bugs need no more than two to show."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def pairwise(
    factors: Mapping[str, Sequence[Any]], legal: Callable[[Mapping[str, Any]], bool] = lambda row: True
) -> list[dict[str, Any]]:
    """Rows in which every legal pair of values of two factors stands together at least once.

    legal: whether a row, complete or not, can be run. Greedy: a row starts with a pair not seen yet, and each further
    factor takes the value that adds most pairs.
    """
    draw = random.Random(0)
    # A dictionary, for its order is the same in every run.
    missing = dict.fromkeys(
        ((f, x), (g, y))
        for f, g in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[f], factors[g])
        if legal({f: x, g: y})
    )

    def unseen(row: Mapping[str, Any]) -> list[Any]:
        ordered = [(name, row[name]) for name in factors if name in row]
        return [pair for pair in itertools.combinations(ordered, 2) if pair in missing]

    rows = []
    while missing:
        row = dict(draw.choice(list(missing)))
        others = [name for name in factors if name not in row]
        for name in draw.sample(others, len(others)):
            values = [{**row, name: value} for value in factors[name]]
            row = max(filter(legal, values), key=lambda r: (len(unseen(r)), draw.random()), default={})
            if not row:
                break
        if row:
            rows.append(row)
            for pair in unseen(row):
                del missing[pair]
    return rows
