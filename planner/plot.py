"""Memory over predicted time as a picture: what is on the device, the budget, and what copies and waits do meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.memory_use import KINDS, MemoryUse
from planner.show import ratio
from planner.sizes import format_bytes, format_seconds
from runtime.errors import PlannerError
from runtime.timeline import Timeline
from runtime.write_file import replacing

if TYPE_CHECKING:
    from planner.plan import Plan

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which people who see colours differently can tell apart.
COLOURS = {
    "libraries": "#999999",
    "resident weights": "#0072B2",
    "staging": "#E69F00",
    "inputs": "#F0E442",
    "activations": "#009E73",
    "workspace": "#D55E00",
}
COMPUTE, MODULES = "#666666", ("#F2F2F2", "#DDDDDD")
COPIES = ("#E69F00", "#F5C860")  # neighbours differ
WAITS = {"link": "#D55E00", "space": "#CC79A7"}
WIDTH_PIXELS, HEIGHT_PIXELS, DPI = 1200, 800, 100
# As many columns as are drawn: of the operators in one, the one of most bytes is shown.
COLUMNS = 1000
_MOST_MODULES = 14
_SHORT = 0.01  # of a step
_LETTERS = 160  # of a module's name that fit into the width
_WAITED_FOR = {"link": "the link", "space": "space for the copy"}


def plot(plan: Plan, path: str | Path) -> None:
    """See `Plan.plot`."""
    suffix = suffix_of(path)
    from matplotlib import style  # takes a second, which only those who draw pay

    # Without dates and random names the same plan gives the same file.
    own = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "vramplan"}
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix)
    with style.context(["default", own]), replacing(path, "the plot") as scratch:
        _figure(plan).savefig(scratch, format=suffix[1:], metadata=metadata)


def suffix_of(path: str | Path) -> str:
    """The kind of picture that a file's name asks for.

    Raises:
        PlannerError: it asks for none that can be drawn.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise PlannerError(f"cannot plot to {str(path)!r}: end its name with {', '.join(SUFFIXES)}, as in p.plot('memory.png')")
    return suffix


def columns(use: MemoryUse, count: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The use in at most `count` columns of time: their edges, the rows shown, and their bytes by kind.

    Each column shows the row of most bytes that has any part in it, so that no peak is lost, however short.
    """
    end = float(use.stops[-1])
    edges = np.unique(np.concatenate([use.starts, use.stops]))
    if len(edges) > count or end <= 0:
        edges = np.linspace(0.0, max(end, 1e-12), count + 1)
    total, shown = use.total, np.zeros(len(edges) - 1, dtype=np.int64)
    first = np.clip(np.searchsorted(edges, use.starts, side="right") - 1, 0, len(shown) - 1)
    last = np.clip(np.searchsorted(edges, use.stops, side="left") - 1, first, len(shown) - 1)
    best = np.full(len(shown), -1, dtype=np.int64)
    for row in range(len(use)):
        part = slice(first[row], last[row] + 1)
        better = total[row] > best[part]
        best[part][better] = total[row]
        shown[part][better] = row
    return edges, shown, {kind: use.parts[kind][shown] for kind in KINDS}


def merged(spans: Sequence[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Spans (start, stop) in order, joined where less than `gap` lies between them."""
    joined: list[tuple[float, float]] = []
    for start, stop in spans:
        if joined and start - joined[-1][1] < gap:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def module_runs(use: MemoryUse, most: int = _MOST_MODULES) -> list[tuple[str, float, float]]:
    """Modules one after the other, as (path, start, stop): as deep as gives at most `most` of them.

    A wait belongs to what waits. What the root does itself has the path "", or belongs to the one before where it is short.
    """
    rows = [row for row in range(len(use)) if not use.waits[row] and use.stops[row] > use.starts[row]]
    paths = [use.moments[row].path.split(".") for row in rows]
    starts = np.array([0.0, *(_before_waits(use, row) for row in rows[1:]), float(use.stops[-1])])
    found: list[tuple[str, float, float]] = []
    for depth in range(1, 1 + max(map(len, paths), default=0)):
        runs: list[tuple[str, float, float]] = []
        for name, own in groupby(range(len(rows)), key=lambda i: ".".join(paths[i][:depth])):
            indices = list(own)
            start, stop = float(starts[indices[0]]), float(starts[indices[-1] + 1])
            short = not name and stop - start < _SHORT * starts[-1]
            if runs and (short or name == runs[-1][0]):
                runs[-1] = (runs[-1][0], runs[-1][1], stop)
            else:
                runs.append((name, start, stop))
        if found and len(runs) > most:
            break
        found = runs
    return found


def _before_waits(use: MemoryUse, row: int) -> float:
    """Seconds at which a row begins, or the waits right before it do."""
    while row and use.waits[row - 1]:
        row -= 1
    return float(use.starts[row])


def _figure(plan: Plan) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_PIXELS / DPI, HEIGHT_PIXELS / DPI), dpi=DPI, facecolor="white")
    memory = figure.add_axes((0.1, 0.32, 0.88, 0.5))
    lanes = figure.add_axes((0.1, 0.1, 0.88, 0.2), sharex=memory)
    _title(figure, plan)
    _draw_memory(memory, plan)
    _draw_lanes(lanes, plan)
    return figure


def _title(figure: Any, plan: Plan) -> None:
    peak = f"peak {format_bytes(plan.peak_bytes)}"
    if plan.reserved_bytes != plan.peak_bytes:
        peak += f" allocated, {format_bytes(plan.reserved_bytes)} reserved"
    weights = f"weights {format_bytes(plan.weight_bytes)}: {format_bytes(plan.resident_bytes)} resident"
    if plan.streamed_bytes:
        count = plan.bundle_count
        how = "1 bundle" if count == 1 else f"{count} bundles"
        weights += f", {format_bytes(plan.streamed_bytes)} streamed per call in {how}"
    step = f"step {format_seconds(plan.step_seconds)} on {plan.machine.name}, {ratio(plan).replace(' x ', ' × ')}"
    figure.text(
        0.1, 0.957, f"{_shortened(plan.title, 72)} within {format_bytes(plan.budget_bytes)}", fontsize=15, weight="bold"
    )
    for index, line in enumerate((f"{peak};  {weights}", step)):
        figure.text(0.1, 0.93 - 0.027 * index, line, fontsize=10.5, va="center", color="#333333")


def _draw_memory(axes: Any, plan: Plan) -> None:
    use, budget = plan.memory_use, plan.budget_bytes
    edges, _, parts = columns(use, COLUMNS)
    at_peak = {kind: int(use.parts[kind][use.peak]) for kind in KINDS}
    kinds = [kind for kind in KINDS if use.parts[kind].any()]
    highest = use.peak_bytes
    near = budget <= 1.5 * highest
    top = 1.18 * (max(highest, budget) if near else highest)
    scale, unit = _unit(top)
    layers = [np.append(parts[kind], parts[kind][-1]) / scale for kind in kinds]
    labels = [f"{kind} {format_bytes(at_peak[kind])}" for kind in kinds]
    axes.stackplot(edges, layers, step="post", labels=labels, colors=[COLOURS[kind] for kind in kinds], linewidth=0)
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, top / scale)
    axes.set_ylabel(f"{unit} on {plan.device}")
    axes.tick_params(labelbottom=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(kinds), frameon=False, handlelength=1, columnspacing=1.4,
        borderaxespad=0.2, title="at the peak:", title_fontsize=9, fontsize=9, alignment="left",
    )  # fmt: skip
    _mark_peak(axes, use, scale, top)
    _mark_budget(axes, plan, scale, top, near)


def _mark_budget(axes: Any, plan: Plan, scale: float, top: float, near: bool) -> None:
    """The budget as a line, and what the allocator reserves of it; in words where they are out of the picture."""
    said, reserved = f"budget {format_bytes(plan.budget_bytes)}", plan.reserved_bytes
    if reserved != plan.peak_bytes:
        said += f"; {format_bytes(reserved)} reserved by the allocator"
        if reserved <= top:
            said += " (dotted)"
            axes.axhline(reserved / scale, color="#444444", linewidth=1, linestyle=(0, (1, 2)))
    if near:
        axes.axhline(plan.budget_bytes / scale, color="black", linewidth=1.4, linestyle=(0, (6, 3)))
        right = _middle(plan.memory_use) < 0.5 * float(plan.memory_use.stops[-1])  # where the peak is not
        at, offset = (1.0 if right else 0.0, plan.budget_bytes / scale), (-4 if right else 4, 4)
    else:
        said += ", above ↑"
        at, offset, right = (1.0, top / scale), (0, 22), True
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(said, at, xytext=offset, ha="right" if right else "left", va="bottom", weight="bold", **where)


def _mark_peak(axes: Any, use: MemoryUse, scale: float, top: float) -> None:
    """A ring at the peak, and above the budget what it is."""
    at, left = _middle(use), _middle(use) < 0.5 * float(use.stops[-1])
    moment = use.moments[use.peak]
    where = _shortened(f"{moment.name} in {moment.path}" if moment.path else moment.name, 60)
    axes.annotate(
        f"peak {format_bytes(use.peak_bytes)}: {where}",
        (at, use.peak_bytes / scale), xytext=(at, top / scale * 0.97),
        ha="left" if left else "right", va="center", fontsize=9.5,
        arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 1, "shrinkB": 3, "relpos": (0 if left else 1, 0)},
    )  # fmt: skip
    axes.plot([at], [use.peak_bytes / scale], marker="o", markersize=6, color="white", markeredgecolor="black", clip_on=False)


def _draw_lanes(axes: Any, plan: Plan) -> None:
    use, timeline = plan.memory_use, plan.timeline
    end = float(use.stops[-1])
    pixel = end / COLUMNS
    _draw_modules(axes, use, end)
    running = [(float(a), float(b)) for a, b, wait in zip(use.starts, use.stops, use.waits, strict=True) if not wait and b > a]
    _bars(axes, merged(running, pixel / 4), 2, [COMPUTE])
    copies = _copies(timeline, end)
    apart = len(copies) * 3 <= COLUMNS
    _bars(axes, copies if apart else merged(copies, pixel / 4), 1, COPIES if apart else COPIES[:1])
    for cause, colour in WAITS.items():
        waits = [(stall.start, stall.stop) for stall in timeline.stalls if stall.cause == cause]
        _bars(axes, merged(waits, pixel / 4), 0, [colour], pixel, f"waiting for {_WAITED_FOR[cause]}")
    seconds = {"waits": timeline.stall_seconds, "copies": timeline.copy_seconds, "compute": end - timeline.stall_seconds}
    labels = [f"{name} {format_seconds(taken) if taken else '–'}" for name, taken in seconds.items()]
    axes.set_ylim(-0.1, 4.0)
    axes.set_yticks([0.4, 1.4, 2.4, 3.5], [*labels, "modules"])
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    factor, unit = next(((f, u) for f, u in ((1.0, "s"), (1e3, "ms")) if end * f >= 1), (1e6, "us"))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * factor:g}")
    axes.set_xlabel(f"predicted time of one call, {unit}")
    if timeline.stalls:
        axes.legend(loc="upper right", bbox_to_anchor=(1.0, -0.16), ncols=2, frameon=False, handlelength=1, fontsize=9)


def _draw_modules(axes: Any, use: MemoryUse, end: float) -> None:
    """Which module runs, with as much of its name as there is room for."""
    for index, (path, start, stop) in enumerate(module_runs(use)):
        axes.broken_barh([(start, stop - start)], (3.1, 0.8), facecolors=MODULES[index % 2], linewidth=0)
        room = int((stop - start) / end * _LETTERS)
        if path and room >= min(len(path), 6):
            name = path if len(path) <= room else "…" + path[1 - room :]
            axes.text((start + stop) / 2, 3.5, name, ha="center", va="center", fontsize=8)


def _bars(
    axes: Any,
    spans: Sequence[tuple[float, float]],
    lane: int,
    colours: Sequence[str],
    least: float = 0.0,
    label: str | None = None,
) -> None:
    if spans:
        ranges = [(start, max(stop - start, least)) for start, stop in spans]
        shades = [colours[index % len(colours)] for index in range(len(ranges))]
        axes.broken_barh(ranges, (lane, 0.8), facecolors=shades, linewidth=0, label=label)


def _copies(timeline: Timeline, end: float) -> list[tuple[float, float]]:
    """When the copy engine is busy; what goes on into the next call is at the beginning of this one, as it is of every one."""
    spans = [(copy.start, copy.stop) for copy in timeline.copies]
    before = [(max(0.0, start - end), stop - end) for start, stop in spans if stop > end]
    return [*before, *((start, min(stop, end)) for start, stop in spans if start < end)]


def _middle(use: MemoryUse) -> float:
    """Seconds at which the peak is."""
    return float(use.starts[use.peak] + use.stops[use.peak]) / 2


def _unit(nbytes: float) -> tuple[float, str]:
    return next(((scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if nbytes >= scale), (1.0, "B"))


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: max(most - 1, 1)] + "…"
