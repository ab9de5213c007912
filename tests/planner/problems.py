"""Random small scheduling problems: spans in order of first use, seconds and activation bytes of operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from planner.machine import Machine
from planner.schedule import Placement, earliest_prefetches
from planner.solve.bundles import BundleSpan

MACHINE = replace(Machine.preset("cpu"), link_bandwidth=100.0, link_latency_seconds=0.25)


def placed(spans: Sequence[BundleSpan], room: np.ndarray, seam: bool = False) -> tuple[Placement, ...] | None:
    """The spans as early as `room` allows, operator by operator."""
    found = earliest_prefetches([s.first for s in spans], [s.last for s in spans], [s.nbytes for s in spans], room, seam)
    return None if found is None else tuple(Placement(s, at) for s, at in zip(spans, found, strict=True))


def in_arena(spans: Sequence[BundleSpan], length: int, staging_bytes: int) -> tuple[Placement, ...]:
    """The spans through an arena of that size; where they do not fit it, each when it is used."""
    early = placed(spans, np.full(length, staging_bytes, dtype=np.int64))
    return early if early is not None else tuple(Placement(s, s.first) for s in spans)


@dataclass(frozen=True)
class Case:
    """Spans as the solver makes them, and one placement of each with its prefetch at or before its use."""

    seconds: np.ndarray
    activation_bytes: np.ndarray
    spans: tuple[BundleSpan, ...]
    placements: tuple[Placement, ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Valid by construction: prefetches are first in, first out."""
    length = draw(st.integers(1, 12))
    seconds = np.array(draw(st.lists(st.floats(0, 3, allow_subnormal=False), min_size=length, max_size=length)))
    activations = np.array(draw(st.lists(st.integers(0, 500), min_size=length, max_size=length)), dtype=np.int64)
    firsts = sorted(draw(st.lists(st.integers(0, length - 1), max_size=8)))
    spans = tuple(
        BundleSpan((f"w{i}",), draw(st.integers(1, 300)), first, draw(st.integers(first, min(first + 3, length - 1))))
        for i, first in enumerate(firsts)
    )
    placements, earliest = [], 0
    for span in spans:
        earliest = draw(st.integers(earliest, span.first))
        placements.append(Placement(span, earliest))
    return Case(seconds, activations, spans, tuple(placements))


@st.composite
def seam_cases(draw: st.DrawFn) -> Case:
    """As `cases`, scheduled by us into random room, over the seam where that can be."""
    case = draw(cases())
    room = np.array([draw(st.integers(0, 900)) for _ in case.seconds], dtype=np.int64)
    early = placed(case.spans, room, seam=True) or placed(case.spans, room) or case.placements
    return replace(case, placements=early)
