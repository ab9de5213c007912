"""Predicted timelines as files: a trace for chrome://tracing and ui.perfetto.dev, a history for PyTorch's memory visualiser."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.memory_history import memory_history
from planner.memory_use import KINDS, MemoryUse
from runtime.trace import (
    COMPUTE,
    PREDICTED,
    Event,
    bundle_weights,
    counter,
    measured_events,
    span,
    timeline_events,
    write_trace,
)
from runtime.write_file import replacing

if TYPE_CHECKING:
    from planner.plan import Plan

# What the visualiser's own reader takes is at most this.
_PICKLE_PROTOCOL = 4


def save_trace(plan: Plan, path: str | Path, measured: bool) -> None:
    """See `Plan.save_trace`."""
    events = predicted_events(plan)
    about: dict[str, Any] = {
        "program": plan.title,
        "device": plan.device,
        "machine": plan.machine.name,
        "budget_bytes": plan.budget_bytes,
        "predicted": {"peak_bytes": plan.peak_bytes, "peak_at": plan.peak_at, "step_seconds": plan.step_seconds},
    }
    if measured:
        report = plan.report()
        events += measured_events(report.measured_timeline, report.bundles)
        about["measured"] = {"peak_bytes": report.peak_bytes, "step_seconds": report.step_seconds}
    write_trace(path, events, about)


def predicted_events(plan: Plan) -> list[Event]:
    """The predicted timeline as events of the Trace Event Format."""
    use = plan.memory_use
    bundles = bundle_weights(plan.layout, plan.emitted.weights)
    title = f"predicted: {plan.title} on {plan.machine.name}"
    return [*timeline_events(PREDICTED, title, plan.timeline, bundles), *_operators(use), *_counters(use, plan.budget_bytes)]


def _operators(use: MemoryUse) -> Iterator[Event]:
    """Those that launch something: views take no time and would be drawn as hairlines."""
    total = use.total
    for row, moment in enumerate(use.moments):
        if use.waits[row] or use.stops[row] <= use.starts[row]:
            continue
        about = {
            "operator": moment.target,
            "module": moment.path,
            "makes_bytes": moment.taken_bytes,
            "workspace_bytes": moment.workspace_bytes,
            "live_bytes": int(total[row]),
        }
        yield span(PREDICTED, COMPUTE, moment.name, "operator", float(use.starts[row]), float(use.stops[row]), about)


def _counters(use: MemoryUse, budget_bytes: int) -> Iterator[Event]:
    """Live bytes by kind, wherever they change; the kinds that the plan has at all."""
    kinds = [kind for kind in KINDS if use.parts[kind].any()]
    yield counter(PREDICTED, "budget bytes", 0.0, {"budget": budget_bytes})
    before: dict[str, int] = {}
    for row, start in enumerate(use.starts.tolist()):
        values = {kind: int(use.parts[kind][row]) for kind in kinds}
        if values != before:
            yield counter(PREDICTED, "live bytes", start, values)
        before = values
    yield counter(PREDICTED, "live bytes", float(use.stops[-1]), before)  # so that the last operator's has a width


def save_memory_history(plan: Plan, path: str | Path) -> None:
    """See `Plan.save_memory_history`."""
    with replacing(path, "the memory history") as scratch:
        scratch.write_bytes(pickle.dumps(memory_history(plan), protocol=_PICKLE_PROTOCOL))
