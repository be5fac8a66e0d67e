"""Write docs/benchmarks.md from the JSON of gpu_run.py: python benchmarks/gpu_table.py docs/benchmarks-h200.json."""

import json
import math
import sys
from pathlib import Path
from typing import Any

OURS = {
    "int8": ("int8", "torch_int8"),
    "fp8_tensor": ("fp8, one scale", "torch_fp8_tensor"),
    "fp8_row": ("fp8, scales of rows and columns", "torch_fp8_row"),
    "bf16": ("bf16", "torch_bf16"),
}


def cell(row: dict[str, Any], name: str, peer: str) -> str:
    """Return "time, rate (speed-up)" of one kernel on one shape."""
    us = row["times"][name]["us"]
    text = f"{us:.1f} µs, {row['tflops'][name]:.0f}"
    return f"{text} ({row['times'][peer]['us'] / us:.2f}×)" if peer in row["times"] else text


def geomean(rows: list[dict[str, Any]], name: str, peer: str) -> float:
    """Return the geometric mean of the speed-ups over the shapes that the peer runs."""
    logs = [math.log(r["times"][peer]["us"] / r["times"][name]["us"]) for r in rows if peer in r["times"]]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the Markdown lines of a table of shapes, with the geometric means below."""
    lines = [
        "| M × N × K | " + " | ".join(title for title, _ in OURS.values()) + " |",
        "|---" * (len(OURS) + 1) + "|",
    ]
    for row in rows:
        cells = " | ".join(cell(row, name, peer) for name, (_, peer) in OURS.items())
        lines.append(f"| {row['m']} × {row['n']} × {row['k']} | {cells} |")
    means = " | ".join(f"{geomean(rows, name, peer):.2f}×" for name, (_, peer) in OURS.items())
    return [*lines, f"| geometric mean | {means} |"]


def checked(check: dict[str, Any]) -> str:
    """Return how many configurations were compared with the oracle, by kernel where that is known."""
    by_kernel = ", ".join(f"{name} {count}" for name, count in check.get("exact", {}).items())
    right = check["cases"] - len(check["wrong"])
    return f"{right} of {check['cases']} configurations exact against the NumPy oracle" + (
        f" ({by_kernel})." if by_kernel else "."
    )


def formats_table(found: dict[str, Any]) -> list[str]:
    """Return the Markdown lines of `quantkit bench`'s rows: every format beside every peer that ran it."""
    peers = list(dict.fromkeys(name for row in found["rows"] for name in row["peers_us"]))
    lines = [
        "| M × N × K | format | kernel | µs | TFLOP/s | GB/s | % roofline | "
        + " | ".join(f"× {name}" for name in peers)
        + " | error |",
        "|---" * (8 + len(peers)) + "|",
    ]
    for row in found["rows"]:
        if row["time_us"] is None:
            continue
        times = [
            f"{row['peers_us'][name] / row['time_us']:.2f}" if name in row["peers_us"] else "–"
            for name in peers
        ]
        error = "exact" if row["relative_error"] == 0 else f"{row['relative_error']:.1e}"
        cells = [
            f"{row['m']} × {row['n']} × {row['k']}", row["format"], f"{row['kernel']} {row['configuration']}",
            f"{row['time_us']:.1f}", f"{row['tflops']:.0f}", f"{row['gb_per_s']:.0f}",
            f"{row['roofline_percent']:.0f}", *times, error,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def four_bits_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the Markdown lines of weights of four bits beside cuBLAS in bf16."""
    names = list(dict.fromkeys(name for row in rows for name in row["us"] if name != "torch"))
    lines = [f"| M × N × K | bf16 | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        base = row["us"]["torch"]
        cells = [
            f"{row['us'][n]:.1f} µs ({base / row['us'][n]:.2f}×)" if n in row["us"] else "–" for n in names
        ]
        lines.append(f"| {row['m']} × {row['n']} × {row['k']} | {base:.1f} µs | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Write the page beside the JSON."""
    source = Path(sys.argv[1])
    (source.parent / "benchmarks.md").write_text(page(source))


def flat(data: dict[str, Any]) -> dict[str, Any]:
    """Return results of `gpu_run.py --all`, which lie by part and job, as those of its single flags lie."""
    if "parts" not in data:
        return data
    parts = data["parts"]
    checks = parts.get("check", {}).values()
    found: dict[str, Any] = {"exact": {}, "cases": 0, "wrong": []}
    for check in checks:
        found["cases"] += check["cases"]
        found["wrong"] += check["wrong"]
        for name, count in check["exact"].items():
            found["exact"][name] = found["exact"].get(name, 0) + count
    # What was timed with tuned tiles is what will run.
    rows = [
        row
        for part in ("blocks_tuned", "formats")
        for job in parts.get(part, {}).values()
        for row in job["rows"]
    ]
    streamed = parts.get("four_bits_tuned") or parts.get("four_bits")
    layers = {name[len("layers_") :]: part for name, part in parts.items() if name.startswith("layers_")}
    flattened = data | {"check": found, "table": parts.get("table_tuned") or parts.get("table", [])}
    flattened |= {"layers": layers} if layers else {}
    flattened |= {"formats": {"rows": rows}} if rows else {}
    flattened |= {"four_bits": streamed} if streamed else {}
    return flattened | {name: parts[name] for name in ("sustained",) if name in parts}


def page(source: Path) -> str:
    """Return the page of a JSON file."""
    data = flat(json.loads(source.read_text()))
    facts = ", ".join(
        f"{k} {data[k]}" for k in ("device", "driver", "cuda", "nvrtc", "torch", "cupy", "date", "commit")
    )
    fast = [
        f"{title} against torch with `use_fast_accum`: {geomean(data['table'], name, peer):.2f}×"
        for name, peer, title in (
            ("fp8_tensor", "torch_fp8_tensor_fast", "one scale"),
            ("fp8_row", "torch_fp8_row_fast", "scales of rows and columns"),
        )
    ]
    least = data["table"][-1]["times"]["one_element"]["us"]
    lines = [
        "# GEMM on a GPU",
        "",
        f"Written by `benchmarks/gpu_table.py` from [{source.name}]({source.name}): {facts}.",
        "",
        f"Checked before: {checked(data['check'])}",
        "",
        "Each cell: median time, TFLOP/s (TOPS), and in brackets the speed-up over torch (cuBLAS, "
        "cuBLASLt) of the same format in the same run.",
        "All contenders of a shape in random order, each a CUDA graph of one call, on a cold and clean L2, random "
        f"data, {data['repeats']} times, {data['pause_ms']:g} ms of rest after each.",
        "int8 and fp8 apply their scales and store bf16; torch's int8 stores bare int32 and refuses M ≤ 16.",
        f"By this clock a kernel that copies one element takes {least:.1f} µs.",
        "",
        *table(data["table"]),
        "",
        "fp8 sums in the tensor core's own accumulator, as torch does with `use_fast_accum`; the table's torch does "
        "without. " + "; ".join(fast) + ".",
    ]
    if "sustained" in data:
        lines += [
            "",
            "## Without rest",
            "",
            "The same back to back: large products then run into the board's power limit.",
            "",
            *table(data["sustained"]),
        ]
    for name, rows in data.get("layers", {}).items():
        lines += ["", f"## Layers of {name}", "", *table(rows)]
    if "four_bits" in data:
        lines += [
            "",
            "## Weights of four bits",
            "",
            "Median time, and in brackets the speed-up over cuBLAS in bf16 in the same run.",
            "",
            *four_bits_table(data["four_bits"]),
        ]
    if "formats" in data:
        lines += [
            "",
            "## Every format",
            "",
            "As `quantkit bench --shapes` prints it: one scale for the activations, one for each row or group of the "
            "weight. `× name` is the speed-up over that peer on the same numbers; % roofline is of the data sheet's "
            "bandwidth and tensor-core peak.",
            "",
            *formats_table(data["formats"]),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
