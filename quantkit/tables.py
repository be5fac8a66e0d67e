"""A small table that shows itself as text in a terminal and as HTML in a notebook."""

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Cell = str | int | float | bool | None


@dataclass(frozen=True, init=False)
class Table:
    """Headers and rows of cells; numbers stand right, text left, None is a dash.

    Floats are shown with four significant digits; give a string to have it otherwise. A column is one of
    numbers when it holds at least one number and nothing but numbers and None. Where every header is "", none
    are shown.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __init__(self, headers: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        object.__setattr__(self, "headers", tuple(headers))
        object.__setattr__(self, "rows", tuple(tuple(row) for row in rows))
        for row in self.rows:
            assert len(row) == len(self.headers), f"{len(row)} cells under {len(self.headers)} headers"

    def text(self) -> str:
        """Return the table as lines of equal columns, two spaces apart, with a rule under the headers."""
        lines = [
            [_one_line(h) for h in self.headers],
            *([_one_line(_shown(c)) for c in row] for row in self.rows),
        ]
        widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
        right = self._number_columns()
        if any(self.headers):
            lines.insert(1, ["-" * width for width in widths])
        else:
            del lines[0]
        padded = (
            (" " * (w - _width(c)) + c if r else c + " " * (w - _width(c)))
            for line in lines
            for c, w, r in zip(line, widths, right, strict=True)
        )
        return "\n".join("  ".join(next(padded) for _ in widths).rstrip() for _ in lines)

    def html(self) -> str:
        """Return the table as an HTML fragment; every cell is escaped."""
        aligns = [f' style="text-align: {"right" if r else "left"}"' for r in self._number_columns()]
        cells = "".join(f"<th{a}>{html.escape(h)}</th>" for h, a in zip(self.headers, aligns, strict=True))
        head = f"<thead><tr>{cells}</tr></thead>" if any(self.headers) else ""
        body = "".join(
            "<tr>"
            + "".join(f"<td{a}>{html.escape(_shown(c))}</td>" for c, a in zip(row, aligns, strict=True))
            + "</tr>"
            for row in self.rows
        )
        return f"<table>{head}<tbody>{body}</tbody></table>"

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return self.html()

    def _number_columns(self) -> list[bool]:
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.headers)
        return [_is_numeric(column) for column in columns]


def _is_numeric(column: Sequence[Cell]) -> bool:
    numbers = [cell for cell in column if isinstance(cell, int | float) and not isinstance(cell, bool)]
    return bool(numbers) and len(numbers) == sum(cell is not None for cell in column)


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}" if math.isfinite(cell) else str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    return cell


def _one_line(text: str) -> str:
    """Control characters escaped, so that a tensor's name cannot break the table or steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _width(text: str) -> int:
    """Columns that the text takes in a terminal: East Asian wide characters two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )
