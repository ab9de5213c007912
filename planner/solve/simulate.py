"""Step time of a schedule: one compute engine, one first-in-first-out copy engine, bundles reserved whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.machine import Machine
from planner.schedule import Placement


@dataclass(frozen=True)
class StepTime:
    """Seconds of one call; `stall_seconds` is how long compute waited for copies."""

    step_seconds: float
    stall_seconds: float
    copy_seconds: float


def simulate(seconds: np.ndarray, placements: Sequence[Placement], machine: Machine) -> StepTime:
    """Runs the schedule: a copy starts when the one before it is done and compute has come to its prefetch."""
    elapsed = np.concatenate([[0.0], np.cumsum(seconds)])
    arrivals: dict[int, float] = {}
    stall = copy_free = copying = 0.0
    # Events in program order; at one position prefetches come before the operator that needs a bundle.
    events = sorted(
        [(p.prefetch, 0, i) for i, p in enumerate(placements)] + [(p.span.first, 1, i) for i, p in enumerate(placements)]
    )
    for position, kind, index in events:
        now = float(elapsed[position]) + stall
        if kind == 0:
            duration = machine.copy_seconds(placements[index].span.nbytes)
            copy_free = max(copy_free, now) + duration
            copying += duration
            arrivals[index] = copy_free
        elif arrivals[index] > now:
            stall += arrivals[index] - now
    return StepTime(float(elapsed[-1]) + stall, stall, copying)
