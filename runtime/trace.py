"""Timelines in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open: measured ones, and predicted ones.

Each is a process with the same lanes: compute, copies, waits. Times are microseconds since the call began.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from runtime.layout import Layout
from runtime.timeline import BANDS, Cause, DiskRead, Stall, Timeline
from runtime.write_file import replacing

Event = dict[str, Any]

PREDICTED, MEASURED = 1, 2  # process ids: one file may hold both
COMPUTE, COPIES, WAITS, READS = 1, 2, 3, 4  # thread ids; copies that overlap, as those of several readers do, get more

WAITED_FOR: Mapping[Cause, str] = {
    "link": "the link: its copy had been under way, or queued behind others",
    "space": "space: its memory came free too late to begin the copy sooner",
    "disk": "the disk: it was not read yet when its copy could have begun",
}


class _Labelled(Protocol):
    @property
    def label(self) -> str: ...


def bundle_weights(layout: Layout, weights: Mapping[str, _Labelled]) -> tuple[tuple[str, ...], ...]:
    """The module's names of the weights, and of parts of them, in every bundle of a layout."""
    return tuple(tuple(weights[slot.weight].label for slot in bundle.slots) for bundle in layout.bundles)


def bundle_label(weights: Sequence[str]) -> str:
    """What a bundle is, in a few words: the one weight, or the module that has all of them in it."""
    if len(weights) == 1:
        return weights[0]
    owners = zip(*(name.split(".")[:-1] for name in weights), strict=False)
    common = ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, owners))
    if common:
        return f"{len(weights)} weights of {common}"
    return f"{len(weights)} weights from {weights[0]} on"


def micros(seconds: float) -> float:
    """Microseconds, to the nanosecond."""
    return round(seconds * 1e6, 3)


def span(pid: int, tid: int, name: str, category: str, start: float, stop: float, about: Mapping[str, Any]) -> Event:
    """A complete event from `start` to `stop` (seconds); spans that touch do not overlap after rounding either."""
    at = micros(start)
    duration = round(max(0.0, micros(stop) - at), 3)
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "cat": category, "ts": at, "dur": duration, "args": dict(about)}


def counter(pid: int, name: str, at: float, values: Mapping[str, int]) -> Event:
    """The values of a counter from a time on."""
    return {"ph": "C", "pid": pid, "tid": 0, "name": name, "ts": micros(at), "args": dict(values)}


def lanes(pid: int, title: str, tids: Mapping[int, str]) -> Iterator[Event]:
    """Names of a process and its threads, and their order."""
    yield _meta(pid, 0, "process_name", {"name": title})
    yield _meta(pid, 0, "process_sort_index", {"sort_index": pid})
    for index, (tid, name) in enumerate(tids.items()):
        yield _meta(pid, tid, "thread_name", {"name": name})
        yield _meta(pid, tid, "thread_sort_index", {"sort_index": index})


def _meta(pid: int, tid: int, name: str, about: Mapping[str, Any]) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": name, "ts": 0, "args": dict(about)}


def timeline_events(pid: int, title: str, timeline: Timeline, bundles: Sequence[Sequence[str]]) -> list[Event]:
    """The lanes of one process, with the copies and waits of a timeline; `bundles` are the names of the weights in each."""
    events: list[Event] = []
    tids = {COMPUTE: "compute", COPIES: "copies"}
    free: dict[int, float] = {COPIES: 0.0}
    for copy in sorted(timeline.copies, key=lambda copy: copy.start):
        tid = next((lane for lane, since in free.items() if micros(since) <= micros(copy.start)), None)
        if tid is None:
            tid = 10 * COPIES + len(free)
            tids[tid] = f"copies ({len(free) + 1})"
        free[tid] = copy.stop
        about = {"bundle": copy.bundle, "bytes": copy.nbytes, "issued_us": micros(copy.issued)}
        if copy.stop > copy.start:
            about["GB_per_s"] = round(copy.nbytes / (copy.stop - copy.start) / 1e9, 3)
        name = _bundle_name(copy.bundle, bundles)
        events.append(span(pid, tid, name, "copy", copy.start, copy.stop, about | _weights(copy.bundle, bundles)))
    for stall in timeline.stalls:
        events.append(_wait(pid, stall, bundles))
    for tid, read in _in_lanes(timeline):
        tids[tid] = "disk" if tid == READS else f"disk ({tid - 10 * READS + 1})"
        name = _bundle_name(read.bundle, bundles)
        events.append(span(pid, tid, name, "read", read.start, read.stop, {"bundle": read.bundle, "bytes": read.nbytes}))
    return [*lanes(pid, title, tids | {WAITS: "waits"}), *events]


def _in_lanes(timeline: Timeline) -> Iterator[tuple[int, DiskRead]]:
    """The reads, each with a lane in which no other overlaps it."""
    free: dict[int, float] = {}
    for read in sorted(timeline.reads, key=lambda read: read.start):
        tid = next((lane for lane, since in free.items() if micros(since) <= micros(read.start)), None)
        if tid is None:
            tid = READS if not free else 10 * READS + len(free)
        free[tid] = read.stop
        yield tid, read


def _wait(pid: int, stall: Stall, bundles: Sequence[Sequence[str]]) -> Event:
    about = {"bundle": stall.bundle, "cause": stall.cause, "waited for": WAITED_FOR[stall.cause]}
    name = f"wait for {stall.cause}: {_bundle_name(stall.bundle, bundles)}"
    return span(pid, WAITS, name, f"wait,{stall.cause}", stall.start, stall.stop, about | _weights(stall.bundle, bundles))


def _bundle_name(bundle: int, bundles: Sequence[Sequence[str]]) -> str:
    if bundle == BANDS:
        return "the link, for bands"
    return f"bundle {bundle}: {bundle_label(bundles[bundle])}" if bundle < len(bundles) else f"bundle {bundle}"


def _weights(bundle: int, bundles: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    return {"weights": list(bundles[bundle])} if 0 <= bundle < len(bundles) else {}


def measured_events(timeline: Timeline, bundles: Sequence[Sequence[str]]) -> list[Event]:
    """What was measured of a call. No device times every operator: compute is all that lies between two waits."""
    events = timeline_events(MEASURED, "measured", timeline, bundles)
    since = 0.0
    for stall in (*timeline.stalls, None):
        until = timeline.step_seconds if stall is None else stall.start
        if micros(until) > micros(since):
            events.append(span(MEASURED, COMPUTE, "compute", "compute", since, until, {}))
        since = max(since, stall.stop) if stall is not None else since
    return events


def write_trace(path: str | Path, events: Sequence[Event], about: Mapping[str, Any]) -> None:
    """Writes events as a trace file, atomically.

    Raises:
        PlannerError: it cannot be written.
    """
    data = {"displayTimeUnit": "ms", "otherData": dict(about), "traceEvents": list(events)}
    with replacing(path, "the trace") as scratch:
        scratch.write_text(json.dumps(data, separators=(",", ":")))
