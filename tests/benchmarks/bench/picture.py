"""Seconds against peak memory: every method a point, ours a curve over its budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

Row = dict[str, Any]
OURS, CASTS = "#0072B2", "#009E73"  # Okabe and Ito's colours, as in planner/plot.py
OTHERS = ("#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#999999", "#000000")
_MARKERS = "osD^v<>PX*"


def draw(case: Row, kind: str, path: Path) -> bool:
    """Writes an .svg file of a case; False, and none, where fewer than two contenders ran."""
    rows = [row for row in case["contenders"] if "median_seconds" in row]
    if len(rows) < 2:
        return False
    with style.context(["default", {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "vramplan"}]):
        _figure(case, rows, kind).savefig(path, metadata={"Date": None})
    return True


def _figure(case: Row, rows: list[Row], kind: str) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    for method, colour in (("ours", OURS), ("casts", CASTS)):
        own = sorted(_point(row, kind) for row in rows if row["method"] == method)
        if own:
            label = "vramplan, by budget" if method == "ours" else "vramplan, casts to e4m3 allowed"
            axes.plot(*zip(*own, strict=True), marker="o", color=colour, label=label, zorder=3)
    others = [row for row in rows if row["method"] not in ("ours", "casts")]
    for number, row in enumerate(others):
        marker, colour = _MARKERS[number % len(_MARKERS)], OTHERS[number % len(OTHERS)]
        axes.plot(*_point(row, kind), marker=marker, color=colour, linestyle="", label=row["label"].replace("`", ""))
    counted = "reserved on the device at most" if kind == "cuda" else "resident memory of the process at most"
    axes.set(xlabel=f"GB {counted}", ylabel="seconds of a call", title=case["title"])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _point(row: Row, kind: str) -> tuple[float, float]:
    nbytes = row["device_reserved_bytes"] if kind == "cuda" else row["rss_bytes"]
    return nbytes / 1e9, row.get("median_cold_seconds") or row["median_seconds"]
