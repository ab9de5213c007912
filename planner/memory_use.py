"""What is on the device over the time of one call: the moments of the emitted program, and the bytes of each kind at every one.

Plots, traces and allocation histories are all made from here. The sizes are those of the problem's liveness and of the layout,
which the checker does not share, so that the peak here is checked by the proof's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import fx

from passes.loop import loop_of
from passes.program import Program, module_path, operator_name
from planner.solve.problem import Problem
from runtime import ops
from runtime.layout import align
from runtime.timeline import BANDS, Timeline
from runtime.trace import bundle_label, bundle_weights

KINDS = ("libraries", "resident weights", "staging", "inputs", "activations", "workspace")
"""What bytes on the device are, in the order in which they are stacked: what moves least is at the bottom."""

Step = Literal["begin", "operator", "prefetch", "onload", "evict", "bands"]


@dataclass(frozen=True)
class Allocation:
    """Bytes that are taken at one moment and given back at another; `key` names them.

    `arena`: taken once, before any call.
    """

    key: int
    nbytes: int
    kind: str
    label: str
    arena: bool = False


@dataclass(frozen=True)
class Moment:
    """The program does one thing: takes memory, then holds `workspace_bytes` for as long as it lasts, then gives back.

    `position` is the operator's, or that of the next one. `path` is the module that it came from, "" for the root, and
    `target` the operator as PyTorch names it. `bundle` is that of a prefetch, an onload or an evict. "bands" comes before a
    loop that streams activations, and so needs the link for itself.
    """

    step: Step
    position: int
    name: str
    path: str = ""
    target: str = ""
    bundle: int | None = None
    takes: tuple[Allocation, ...] = ()
    workspace_bytes: int = 0
    gives: tuple[int, ...] = ()

    @property
    def taken_bytes(self) -> int:
        return sum(taken.nbytes for taken in self.takes)


def moments(problem: Problem, emitted: Program) -> Iterator[Moment]:
    """One call of an emitted program, in its order; in bytes as the device's allocator rounds them.

    The first moment takes what is there before anything runs: arenas, state, inputs, and bundles that come over the seam. What
    is taken and never given back is there afterwards: the same, and outputs.
    """
    return _Walk(problem, emitted).run()


class _Walk:
    def __init__(self, problem: Problem, emitted: Program) -> None:
        assert emitted.layout is not None
        self.problem, self.emitted, self.layout = problem, emitted, emitted.layout
        self.position = 0
        self._keys = iter(range(1, 1 << 62))
        self._weights = bundle_weights(self.layout, emitted.weights)
        self._bundles: dict[int, int] = {}
        self._storages: dict[int, int] = {}

    def run(self) -> Iterator[Moment]:
        positions = {name: i for i, name in enumerate(self.problem.names)}
        yield Moment("begin", 0, "before the call", takes=tuple(self._there_before()))
        for node in self.emitted.graph.nodes:
            if node.target is ops.prefetch:
                yield self._prefetch(node.args[0])
            elif node.target is ops.onload:
                yield Moment("onload", self.position, f"onload of bundle {node.args[0]}", bundle=node.args[0])
            elif node.target is ops.evict:
                gives = (self._bundles.pop(node.args[0]),) if node.args[0] in self._bundles else ()
                name = f"evict of bundle {node.args[0]}"
                yield Moment("evict", self.position, name, bundle=node.args[0], gives=gives)
            elif node.op == "call_function" and node.name in positions:
                loop = loop_of(node)
                if loop is not None and loop.banded:
                    yield Moment("bands", self.position, f"link for {node.name}", bundle=BANDS)
                yield self._operator(positions[node.name], node)

    def _take(self, nbytes: int, kind: str, label: str, *, arena: bool = False) -> Allocation:
        return Allocation(next(self._keys), nbytes, kind, label, arena)

    def _there_before(self) -> Iterator[Allocation]:
        layout, weights = self.layout, self.emitted.weights
        arenas = [
            (self.problem.memory.fixed_bytes, "libraries", "workspace of libraries"),
            (layout.resident_bytes, "resident weights", f"resident arena of {len(layout.resident)} weights"),
            *((align(s.nbytes, layout.alignment), "resident weights", f"state {weights[s.weight].name}") for s in layout.state),
            (layout.staging_bytes, "staging", f"staging arena of {len(layout.bundles)} bundles"),
        ]
        yield from (self._take(*arena, arena=True) for arena in arenas if arena[0])
        for index, nbytes in enumerate(self.problem.liveness.input_storages):
            yield self._take(nbytes, "inputs", f"input {index}")
        for bundle in layout.bundles:
            if bundle.carried and bundle.offset is None:
                yield self._bundle(bundle.index)

    def _bundle(self, index: int) -> Allocation:
        bundle = self.layout.bundles[index]
        label = f"bundle {index}: {bundle_label(self._weights[index])}"
        taken = self._take(bundle.nbytes, "staging", label)
        self._bundles[index] = taken.key
        return taken

    def _prefetch(self, index: int) -> Moment:
        takes = (self._bundle(index),) if self.layout.bundles[index].offset is None else ()
        return Moment("prefetch", self.position, f"prefetch of bundle {index}", bundle=index, takes=takes)

    def _operator(self, position: int, node: fx.Node) -> Moment:
        live = self.problem.liveness
        takes = []
        for storage, nbytes in live.born[position]:
            takes.append(self._take(nbytes, "activations", node.name))
            self._storages[storage] = takes[-1].key
        gives = tuple(self._storages.pop(storage) for storage in live.dies[position])
        workspace = self.problem.memory.round_activation(live.costs[position].workspace_bytes)
        self.position = position + 1
        return Moment(
            "operator", position, node.name, module_path(node), operator_name(node.target), None, tuple(takes), workspace, gives
        )


@dataclass(frozen=True, eq=False)
class MemoryUse:
    """Bytes by kind over one call. Row i holds from `starts[i]` to `stops[i]` (seconds), at its worst moment.

    A row is an operator (one that launches nothing takes no time), or compute waiting for a bundle (`waits`). The rows follow
    each other without gaps, from 0 to the end of the call.

    Attributes:
        moments: what the program does in each row.
        starts, stops: float64[n]. waits: bool[n].
        parts: int64[n] for each of `KINDS`.
    """

    moments: tuple[Moment, ...]
    starts: np.ndarray
    stops: np.ndarray
    waits: np.ndarray
    parts: dict[str, np.ndarray]

    @property
    def total(self) -> np.ndarray:
        """int64[n]: what the budget bounds."""
        return np.sum(list(self.parts.values()), axis=0)

    @property
    def peak(self) -> int:
        """The first row of most bytes."""
        return int(np.argmax(self.total))

    @property
    def peak_bytes(self) -> int:
        return int(self.total[self.peak])

    def __len__(self) -> int:
        return len(self.starts)


def timed_moments(problem: Problem, emitted: Program, timeline: Timeline) -> Iterator[tuple[Moment, float, float]]:
    """The moments of a call with the seconds from which to which each lasts, in the predicted timeline.

    Operators last; an onload does where compute waits at it, and so does what comes before a loop that needs the link for
    itself; the rest happens between two operators.
    """
    stalls = deque(timeline.stalls)
    now = 0.0
    for moment in moments(problem, emitted):
        stop = now
        if moment.step == "operator":
            stop += float(problem.seconds[moment.position])
        elif moment.step in ("onload", "bands") and stalls and stalls[0].bundle == moment.bundle:
            # A wait of the next such loop comes after this one.
            lasts = float(problem.seconds[moment.position]) if moment.step == "bands" else float("inf")
            if stalls[0].start - now < lasts / 2:
                stop = max(now, stalls.popleft().stop)
        yield moment, now, stop
        now = stop


def memory_use(problem: Problem, emitted: Program, timeline: Timeline) -> MemoryUse:
    """The bytes of an emitted program over its predicted timeline, with the stalls where they come."""
    level = dict.fromkeys(KINDS, 0)
    held: dict[int, Allocation] = {}
    rows: list[tuple[Moment, float, float, tuple[int, ...]]] = []
    for moment, start, stop in timed_moments(problem, emitted, timeline):
        for taken in moment.takes:
            held[taken.key] = taken
            level[taken.kind] += taken.nbytes
        if moment.step == "operator" or stop > start:
            level["workspace"] = moment.workspace_bytes
            rows.append((moment, start, stop, tuple(level.values())))
            level["workspace"] = 0
        for key in moment.gives:
            gone = held.pop(key)
            level[gone.kind] -= gone.nbytes
    columns = np.array([row[3] for row in rows], dtype=np.int64).T
    return MemoryUse(
        tuple(row[0] for row in rows),
        np.array([row[1] for row in rows]),
        np.array([row[2] for row in rows]),
        np.array([row[0].step != "operator" for row in rows]),
        dict(zip(KINDS, columns, strict=True)),
    )
