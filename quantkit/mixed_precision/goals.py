"""What a model is to keep, or to weigh at most: goals for mixed precision, and what was tried to meet them.

top1 -0.5    at most half a point of accuracy less than float (without labels: of agreement with it)
sqnr 30      at least 30 dB at the first output
kl 5         at most 5 milli-nats of KL to float
size 0.3     a file of at most 0.3 of the float weights' bytes, and of what fits the most faithful
"""

from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from quantkit.errors import SpecError
from quantkit.tables import Table

Measure = Literal["top1", "sqnr", "kl", "size"]
# What differences of floats are off by, generously, in parts of the goal.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A goal: `measure` no worse than `limit`, in percentage points, dB, milli-nats, or parts of the float weights."""

    measure: Measure
    limit: float

    def __str__(self) -> str:
        return f"{self.measure} {self.limit:g}"

    def met_by(self, value: float) -> bool:
        """Tell whether a value of the measure meets the goal."""
        # 0.905 − 0.91 is half a point, and a little more in binary.
        least = self.limit - _ROUNDING * abs(self.limit)
        most = self.limit + _ROUNDING * abs(self.limit)
        return value >= least if self.measure in ("top1", "sqnr") else value <= most


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

    @property
    def how(self) -> str:
        """The assignment in words."""
        if not self.raised:
            return self.base
        return f"{self.base}, {self.raised} layer{'s' if self.raised > 1 else ''} {self.to}"


def parse_budget(text: str) -> Budget:
    """Read a goal such as "top1 -0.5".

    Raises:
        SpecError: it is none.
    """
    words = text.replace("=", " ").split()
    try:
        name, limit = words[0].lower(), float(words[1].removesuffix("%"))
        fits = len(words) == 2 and name in get_args(Measure) and np.isfinite(limit)
        # Of decibels and milli-nats there are no hundredths; of points of accuracy they are what is meant.
        fits = fits and (name in ("top1", "size") or not words[1].endswith("%"))
        if name == "size" and words[1].endswith("%"):
            limit /= 100
    except (IndexError, ValueError):
        fits = False
    if not fits or (name == "top1" and limit > 0) or (name in ("kl", "size") and limit <= 0):
        raise SpecError(
            f'budget {text}: no goal; write "top1 -0.5" (points lost at most), "sqnr 30" (dB), "kl 5" (milli-nats) '
            'or "size 0.3" (of the float weights).'
        )
    return Budget(measure=cast(Measure, name), limit=limit)


def tries_table(tries: list[Try], budget: Budget) -> Table:
    """Return one row a try."""
    unit = "top-1 points" if budget.measure == "top1" else "KL mnat"
    # Size and SQNR stand in every table.
    own = budget.measure not in ("size", "sqnr")
    rows = [
        (
            t.how,
            f"{t.size:.3f}",
            # What is held against a goal stands as exactly as the goal may.
            f"{t.sqnr_db:.3f}" if budget.measure == "sqnr" else f"{t.sqnr_db:.1f}",
            *([f"{t.value:.3f}"] if own else []),
            "met" if t.met else "not met",
        )
        for t in tries
    ]
    return Table(("tried", "size", "SQNR dB", *([unit] if own else []), str(budget)), rows)
