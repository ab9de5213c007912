"""The tables of the README's section on what was measured: written by `--update` from the results, and checked by a test."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from planner.sizes import format_bytes, format_seconds
from tests.benchmarks.bench.simulated import MACHINES, against_best
from tests.benchmarks.bench.tables import case_table, prediction_table, predictions

README = Path(__file__).parents[3] / "README.md"


def tables(results: Path) -> dict[str, list[str]]:
    """By the name of their place: a case measured on the CPU, "predictions" for these, "simulated"."""
    found = {}
    measured = _read(results / "bench-cpu.json")
    if measured:
        cases = measured["cases"]
        for name, case in cases.items():
            ran = [row for row in case["contenders"] if "refused" not in row]
            found[name] = case_table({"contenders": ran}, "cpu")
        found["predictions"] = prediction_table(predictions(cases.values()), seconds=True)
    simulated = _read(results / "bench-simulated.json")
    if simulated:
        found["simulated"] = _simulated(simulated, MACHINES[0])
    return found


def refreshed(text: str, found: dict[str, list[str]]) -> str:
    """The text with every table between its two marks, `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: a place whose table there is none for.
    """
    for name in re.findall(r"<!-- end of ([\w-]+) -->", text):
        if name not in found:
            raise ValueError(f"README.md has a place for {name!r}, and the results have no such table")
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = before + begin + "\n".join(["", *found[name], "", end]) + rest.partition(end)[2]
    return text


def _simulated(found: dict[str, Any], machine: str) -> list[str]:
    """Of one machine: our plans, each against the best switch in no more memory."""
    lines = [f"| simulated: {machine} | budget | seconds | × bound | faster |", "|---|---:|---:|---:|---|"]
    for name, case in found.items():
        rows = case["machines"][machine]
        for row in rows:
            if "budget_bytes" not in row:
                continue
            over = f"{row['seconds'] / row['bound_seconds']:.2f}"
            cells = [name, format_bytes(row["budget_bytes"]), format_seconds(row["seconds"]), over, against_best(row, rows)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
