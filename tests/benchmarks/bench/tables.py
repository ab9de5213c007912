"""What was measured, as Markdown: a table for each case, one of prediction errors, and what passed a budget."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from planner.sizes import format_bytes, format_seconds
from tests.benchmarks.bench.promises import over_budget

Row = dict[str, Any]
LEGEND = """\
`allocated` and `reserved`: the device's peak, by its allocator's own counters (on a CPU PyTorch's allocator in the first call,
with the weights that it holds; what is mapped from files is in `process` alone, and in `allocated` alone what diffusers
allocates for weights on disk and never fills). `process`: peak of resident memory in calls, Python and libraries included.
`cold`: a call after the kernel forgot the files. `seconds`: median of a call, `±` half of what lies between the quartiles
(between the extremes of fewer than four). `CPU`: what all threads worked in it, which others on the machine hardly change.
`× unplanned`: seconds over those of unplanned in the same turns. `copied`: bytes brought to the device in a call (on a CPU:
read from disk in a cold one). `difference`: the largest from unplanned over its largest value.
"""


def about_lines(about: Row, command: str) -> list[str]:
    """Where, with what and by which command."""
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "diffusers", "transformers", "accelerate"))
    load = ", ".join(f"{value:.1f}" for value in about["load"])
    driver = f", driver {about['driver']}" if "driver" in about else ""
    return [
        f"Written by `{command}` on {about['chip']}{driver}; {about['cores']} cores, load averages {load} at the beginning; "
        f"{versions}; commit {about['commit']}.",
    ]


def case_table(case: Row, kind: str) -> list[str]:
    """One case; a contender that did not run says why in its line."""
    rows = case["contenders"]
    shown = [column for column in _COLUMNS if column.wanted(kind, rows)]
    lines = ["| | " + " | ".join(column.title for column in shown) + " | |", "|---" + "|---:" * len(shown) + "|---|"]
    for row in rows:
        ran = "median_seconds" in row
        cells = [column.cell(row) if ran else "" for column in shown]
        lines.append("| " + " | ".join([row["label"], *cells, _note(row)]) + " |")
    return lines


@dataclass(frozen=True)
class _Column:
    """A column of a case's table. `kinds`: of which devices; it is left out where no row has a value."""

    title: str
    value: Callable[[Row], Any]
    form: Callable[[Any], str]
    kinds: tuple[str, ...] = ("cuda", "cpu", "accounting")

    def cell(self, row: Row) -> str:
        value = self.value(row)
        return "" if value is None else self.form(value)

    def wanted(self, kind: str, rows: Sequence[Row]) -> bool:
        return kind in self.kinds and any(self.value(row) is not None for row in rows)


def _copied(row: Row) -> int | None:
    """What a contender copied in a call; where only the kernel knows, what it read from disk in a cold one."""
    read: list[int] = row.get("cold_disk_bytes", [])
    counted: int | None = row.get("copied_bytes")
    return counted if counted is not None else max(read, default=None)


_COLUMNS = (
    _Column("allocated", lambda row: row.get("device_peak_bytes"), format_bytes),
    _Column("reserved", lambda row: row.get("device_reserved_bytes"), format_bytes),
    _Column("process", lambda row: row.get("rss_bytes"), format_bytes),
    _Column("page-locked", lambda row: max(row.get("pinned_bytes", 0), row.get("locked_bytes", 0)), format_bytes, ("cuda",)),
    _Column("cold", lambda row: row.get("median_cold_seconds"), format_seconds),
    _Column("seconds", lambda row: row.get("median_seconds"), format_seconds),
    _Column("±", lambda row: None if "spread_seconds" not in row else row["spread_seconds"] / 2, format_seconds),
    _Column(
        "CPU", lambda row: statistics.median(row["warm_cpu_seconds"]) if "warm_cpu_seconds" in row else None, format_seconds,
        ("cpu",),
    ),
    _Column("× unplanned", lambda row: row.get("ratio"), lambda value: f"{value:.2f}"),
    _Column("copied", _copied, format_bytes),
    _Column("difference", lambda row: row.get("difference"), lambda value: f"{value:.1e}" if value else "0"),
)  # fmt: skip


def _note(row: Row) -> str:
    if "broken" in row:
        return f"**FAILED: {row['broken']}**".replace("|", "/")
    if "refused" in row:
        return f"does not run here: {row['refused']}"
    if "failed" in row:
        return f"failed: {row['failed']}".replace("|", "/")
    return "" if row.get("finite", True) else "gives infinities or NaN"


def predictions(cases: Iterable[Row]) -> list[Row]:
    """Of ours in all cases: predicted over measured, less one. Seconds are compared with cold calls where there are some."""
    found = []
    for case in cases:
        for row in case["contenders"]:
            if "predicted_peak_bytes" not in row or "median_seconds" not in row:
                continue
            seconds = row.get("median_cold_seconds") or row["median_seconds"]
            found.append({
                "case": case["name"], "contender": row["name"], "peak_bytes": row["device_peak_bytes"], "seconds": seconds,
                "predicted_peak_bytes": row["predicted_peak_bytes"], "predicted_seconds": row["predicted_seconds"],
                "peak_error": row["predicted_peak_bytes"] / row["device_peak_bytes"] - 1,
                "seconds_error": row["predicted_seconds"] / seconds - 1, "over_budget": over_budget(row),
            })  # fmt: skip
    return found


def prediction_table(rows: Sequence[Row], *, seconds: bool) -> list[str]:
    """Every plan, and the worst by name; `seconds` False where the device's clock is none."""
    if not rows:
        return ["No plan ran."]
    head = "| case | plan | peak predicted | measured | error |" + (
        " seconds predicted | measured | error |" if seconds else ""
    )
    lines = [head, "|---|---" + "|---:" * (head.count("|") - 3) + "|"]
    for row in rows:
        cells = [row["case"], row["contender"], format_bytes(row["predicted_peak_bytes"]), format_bytes(row["peak_bytes"])]
        cells.append(f"{row['peak_error']:+.2%}")
        if seconds:
            cells += [format_seconds(row["predicted_seconds"]), format_seconds(row["seconds"]), f"{row['seconds_error']:+.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    worst = max(rows, key=lambda row: abs(row["peak_error"]))
    said = f"Worst in bytes: {worst['contender']} of {worst['case']}, {worst['peak_error']:+.2%}."
    if seconds:
        worst = max(rows, key=lambda row: abs(row["seconds_error"]))
        said += f" Worst in seconds: {worst['contender']} of {worst['case']}, {worst['seconds_error']:+.0%}."
    above = [f"{row['contender']} of {row['case']}" for row in rows if row["over_budget"]]
    return [*lines, "", f"{said} Runs above their budget: {', '.join(above) if above else f'none of {len(rows)}'}."]


def _load(case: Row) -> str:
    return f"; load averages at the end {', '.join(f'{value:.1f}' for value in case['load'])}" if "load" in case else ""


def markdown(document: Row, command: str) -> str:
    """All tables of a device."""
    about, cases = document["about"], document["cases"].values()
    lines = [f"# Side by side, measured on {about['device']}", "", *about_lines(about, command), "", LEGEND]
    if about["device"] == "accounting":
        lines += ["Small stand-ins on CPU kernels, to run the harness: these numbers say nothing about the models.", ""]
    for case in cases:
        lines += [f"## {case['title']}", "", f"`--cases {case['name']}`, {case['rounds']} rounds{_load(case)}", ""]
        if case.get("picture"):
            lines += [f"![seconds against memory]({case['picture']})", ""]
        lines += [*case_table(case, about["device"]), ""]
    lines += ["## Predicted and measured", "", *prediction_table(predictions(cases), seconds=about["device"] != "accounting")]
    return "\n".join(lines) + "\n"
