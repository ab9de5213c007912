"""The frontier as an image: seconds of a step against the budget."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.progress import working
from planner.sizes import format_bytes
from runtime.errors import PlannerError

if TYPE_CHECKING:
    from planner.frontier import Frontier

# Okabe and Ito: told apart by colour-blind readers too, and in grey.
_OURS, _BOUND, _OTHERS, _MARK = "#0072B2", "#999999", "#D55E00", "#444444"
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3))


def write_frontier(frontier: Frontier, path: Path) -> None:
    """Draws and writes atomically: a crash leaves the old file or none.

    Raises:
        PlannerError: no such folder, no such format, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)  # never a window, whatever the user's backend is
    formats = canvas.get_supported_filetypes()
    ending = path.suffix.lower().removeprefix(".")
    if ending not in formats:
        raise PlannerError(f"cannot draw {str(path)!r}: write it as png, svg or pdf, such as {path.stem + '.png'!r}")
    _draw(figure.add_subplot(), frontier)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with working(f"drawing {path.name}"):
            figure.savefig(scratch, format=ending, dpi=160)
        os.replace(scratch, path)
    except OSError as error:
        raise PlannerError(
            f"cannot write the plot {str(path)!r}: {error.strerror or error}; give a file in a folder that exists"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def _draw(axes: Any, frontier: Frontier) -> None:
    from matplotlib.ticker import LogLocator

    unit, size = _unit(frontier)
    scale, name = _seconds_unit(frontier)
    end = _end(frontier)
    rows = [row for row in frontier.rows if row.step_seconds is not None and row.budget_bytes <= end]
    _draw_bound(axes, frontier, size, scale)
    axes.plot(
        [row.budget_bytes / size for row in rows],
        [(row.step_seconds or 0.0) * scale for row in rows],
        color=_OURS, marker="o", markersize=5, linewidth=1.8, label="vramplan", zorder=3,
    )  # fmt: skip
    begin = min(frontier.minimum_bytes, frontier.rows[0].budget_bytes)
    margin = max(end - begin, 1) * 0.04
    axes.set_xlim((begin - margin) / size, (end + margin) / size)
    if frontier.baselines:  # some are many times slower
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(bottom=0)
    _draw_others(axes, frontier, size, scale)
    _mark_budget(axes, frontier, size, end)
    axes.set_xlabel(f"budget ({unit})")
    axes.set_ylabel(f"step ({name}, predicted)")
    calls = "" if frontier.repeats == 1 else f", {frontier.repeats} calls in a row"
    axes.set_title(f"{frontier.program} on {frontier.machine}{calls}", fontsize=11, loc="left")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="best" if not frontier.baselines else "lower left")


def _draw_bound(axes: Any, frontier: Frontier, size: float, scale: float) -> None:
    budgets = [budget / size for budget, _ in frontier.bound]
    seconds = [bound * scale for _, bound in frontier.bound]
    axes.plot(budgets, seconds, color=_BOUND, linestyle="--", linewidth=1.4, label="physical bound", zorder=2)
    if not frontier.baselines:
        axes.fill_between(budgets, seconds, color=_BOUND, alpha=0.12, linewidth=0)


def _draw_others(axes: Any, frontier: Frontier, size: float, scale: float) -> None:
    """Points with their names beside them; those at one place share one text."""
    places: dict[tuple[float, float], list[str]] = {}
    for row in frontier.baselines[1:]:
        places.setdefault((row.peak_bytes / size, row.step_seconds * scale), []).append(row.policy)
    low, high = axes.get_xlim()
    for index, ((x, y), names) in enumerate(places.items()):
        label = "others, simulated" if index == 0 else None
        axes.plot(x, y, color=_OTHERS, marker="D", markersize=5.5, linestyle="none", label=label, zorder=4)
        # The curve falls: to the upper right of a point there is room, at the right edge below it.
        left, under = x > low + (high - low) * 0.7, y == min(y for _, y in places)
        axes.annotate(
            "\n".join(names), (x, y), xytext=(-6 if left else 6, -6 if left and under else 5), textcoords="offset points",
            fontsize=8, ha="right" if left else "left", va="top" if left and under else "bottom", color="#333333", zorder=5,
        )  # fmt: skip
    if places:
        axes.margins(y=0.12)


def _mark_budget(axes: Any, frontier: Frontier, size: float, end: int) -> None:
    own = frontier.budget_bytes
    if own is None:
        return
    inside = own <= end
    text = f"budget {format_bytes(own)}" + ("" if inside else ", all resident")
    if inside:
        axes.axvline(own / size, color=_MARK, linewidth=1.1, linestyle=":", zorder=1)
    low, high = axes.get_xlim()
    left = own / size > (low + high) / 2
    axes.annotate(
        text, (min(own, end) / size, 0), xycoords=("data", "axes fraction"), xytext=(-4 if left else 4, 6),
        textcoords="offset points", fontsize=8.5, color=_MARK, ha="right" if left else "left", va="bottom",
    )  # fmt: skip


def _end(frontier: Frontier) -> int:
    """The largest budget that is drawn: far beyond all resident there is nothing to see."""
    near = [row.budget_bytes for row in frontier.rows if row.budget_bytes <= frontier.resident_bytes * 3 // 2]
    return max([frontier.resident_bytes, *near])


def _unit(frontier: Frontier) -> tuple[str, float]:
    most = _end(frontier)
    return next(((unit, factor) for unit, factor in _UNITS if most >= factor), ("B", 1.0))


def _seconds_unit(frontier: Frontier) -> tuple[float, str]:
    """(factor, name) of the unit in which the longest step reads best."""
    seconds = [row.step_seconds for row in frontier.rows if row.step_seconds is not None]
    most = max([*seconds, *(row.step_seconds for row in frontier.baselines), *(s for _, s in frontier.bound)])
    return next(((f, n) for f, n in ((1.0, "s"), (1e3, "ms"), (1e6, "us")) if most * f >= 1), (1e6, "us"))
