"""Tables of timings: which configuration was seen fastest for which problem, and how such a table is a file."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.heuristics import Problem

VERSION = 1


def bucket(m: int) -> int:
    """Return the least M of the buckets that holds `m`: 1, 2, 4 … 128, 160, 192, 224, 256, 320 …"""
    if m <= 128:
        return 1 << max(m - 1, 0).bit_length()
    step = 1 << ((m - 1).bit_length() - 3)
    return math.ceil(m / step) * step


@dataclass(frozen=True, kw_only=True)
class Key:
    """What an entry answers for. epilogue: the fields of its kind that are not the default, as JSON text."""

    kernel: str
    format: str
    output: str
    bucket: int
    n: int
    k: int
    epilogue: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The configuration seen fastest, and its time. source: the hash of the kernel's source and headers."""

    configuration: Mapping[str, Any]
    time_us: float
    q1_us: float
    q3_us: float
    m: int
    source: str


@dataclass(frozen=True, eq=False)
class TimingTable:
    """Entries by key."""

    entries: Mapping[Key, Entry] = field(default_factory=dict)

    def find(self, key: Key) -> Entry | None:
        """Return the entry of a key, else of the same product with another epilogue, or None.

        Which tile is fastest hardly depends on what happens to its sums.
        """
        return self.entries.get(key) or self._whatever_epilogue.get(replace(key, epilogue=""))

    @cached_property
    def _whatever_epilogue(self) -> dict[Key, Entry]:
        order = sorted(self.entries, key=lambda key: key.epilogue, reverse=True)
        return {replace(key, epilogue=""): self.entries[key] for key in order}

    def merged(self, other: "TimingTable") -> "TimingTable":
        """Return both together; where both have a key, `other` holds."""
        return TimingTable({**self.entries, **other.entries})

    def to_json(self, facts: Mapping[str, Any]) -> str:
        """Return the table as the text of a file, with what it depends on."""
        rows = [asdict(key) | asdict(entry) for key, entry in self.entries.items()]
        rows.sort(key=lambda row: (row["kernel"], row["format"], row["n"], row["k"], row["bucket"], str(row)))
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps({"version": VERSION, **facts})[:-1]
        return f'{head}, "entries": [\n{lines}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> "TimingTable":
        """Return the table of a file's text.

        Raises:
            ValueError: it is none, or a newer one.
        """
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}")
            names = {f.name for f in fields(Key)}
            return cls(
                {
                    Key(**{n: row[n] for n in names}): _sound(
                        Entry(**{n: row[n] for n in row.keys() - names})
                    )
                    for row in data["entries"]
                }
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _sound(entry: Entry) -> Entry:
    """The entry, if kernels could be launched with it: configurations are counts and switches.

    Raises:
        ValueError: it holds something else.
    """
    counts = [*entry.configuration.values(), entry.m]
    times = (entry.time_us, entry.q1_us, entry.q3_us)
    if not all(isinstance(x, int) and x >= 0 for x in counts):
        raise ValueError(f"configuration {dict(entry.configuration)} of m {entry.m}")
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in times) or entry.time_us <= 0:
        raise ValueError(f"times {times}")
    return entry


def key_of(kernel: str, problem: Problem, kind: EpilogueKind) -> Key:
    """Return the key of a problem and an epilogue."""
    told = {f.name: getattr(kind, f.name) for f in fields(kind) if getattr(kind, f.name) != f.default}
    return Key(
        kernel=kernel,
        format=problem.format,
        output=problem.output,
        bucket=bucket(problem.m),
        n=problem.n,
        k=problem.k,
        epilogue=json.dumps(told, sort_keys=True),
    )
