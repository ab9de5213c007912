"""Prefetch positions and arena offsets, against definitions that compare every pair and go through call after call."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planner.schedule import Placement, arena_offsets, staged_bytes
from planner.solve.bundles import BundleSpan
from tests.planner.problems import Case, cases, placed, seam_cases


def occupied(placement: Placement, length: int) -> set[int]:
    """The positions of a call at which the bundle's bytes are taken."""
    span = placement.span
    if placement.prefetch <= span.last:
        return set(range(placement.prefetch, span.last + 1))
    return set(range(span.last + 1)) | set(range(placement.prefetch, length))


def naive_staged(placements: tuple[Placement, ...], length: int) -> list[int]:
    return [sum(p.span.nbytes for p in placements if i in occupied(p, length)) for i in range(length)]


def is_first_in_first_out(placements: tuple[Placement, ...], length: int) -> bool:
    """In a call and over the seam to the next."""
    starts = [p.prefetch - (length if p.prefetch > p.span.last else 0) for p in placements]
    around = not starts or starts[-1] <= starts[0] + length
    return around and all(a <= b for a, b in pairwise(starts)) and all(
        s <= p.span.first for s, p in zip(starts, placements, strict=True)
    )  # fmt: skip


@given(seam_cases())
def test_staged_bytes(case: Case) -> None:
    length = len(case.seconds)
    assert staged_bytes(case.placements, length).tolist() == naive_staged(case.placements, length)


@given(seam_cases())
def test_offsets_never_overlap_in_time_and_space(case: Case) -> None:
    if not case.placements:
        return
    length = len(case.seconds)
    offsets, size = arena_offsets(case.placements, length)
    places = list(zip(case.placements, offsets, strict=True))
    for (a, x), (b, y) in combinations(places, 2):
        in_time = occupied(a, length) & occupied(b, length)
        in_space = x < y + b.span.nbytes and y < x + a.span.nbytes
        assert not (in_time and in_space)
    assert size == max(offset + p.span.nbytes for p, offset in places)
    assert min(offsets) >= 0
    assert size >= max(naive_staged(case.placements, length))
    assert size <= sum(p.span.nbytes for p in case.placements)


@given(cases(), st.lists(st.integers(0, 900), min_size=12, max_size=12), st.booleans())
def test_prefetches_fit_their_room(case: Case, rooms: list[int], seam: bool) -> None:
    length = len(case.seconds)
    room = np.array(rooms[:length])
    placements = placed(case.spans, room, seam)
    if placements is None:
        return
    assert tuple(p.span for p in placements) == case.spans
    assert is_first_in_first_out(placements, length)
    assert seam or not any(p.carried for p in placements)
    staged = naive_staged(placements, length)
    assert all(used <= free for used, free in zip(staged, rooms, strict=False) if used)


@given(cases(), st.lists(st.integers(0, 900), min_size=12, max_size=12), st.integers(0, 400), st.booleans())
def test_with_more_room_none_is_later(case: Case, rooms: list[int], more: int, seam: bool) -> None:
    length = len(case.seconds)
    room = np.array(rooms[:length])
    tight, loose = placed(case.spans, room, seam), placed(case.spans, room + more, seam)
    if tight is None:
        return
    assert loose is not None

    def start(p: Placement) -> int:
        return p.prefetch - (length if p.carried else 0)

    assert all(start(b) <= start(a) for a, b in zip(tight, loose, strict=True))


@given(cases(), st.booleans())
def test_what_fits_when_copied_at_its_use_fits(case: Case, seam: bool) -> None:
    at_use = tuple(Placement(s, s.first) for s in case.spans)
    room = np.array(naive_staged(at_use, len(case.seconds)))
    assert placed(case.spans, room, seam) is not None


@given(cases(), st.lists(st.integers(0, 900), min_size=12, max_size=12))
def test_over_the_seam_none_is_later(case: Case, rooms: list[int]) -> None:
    length = len(case.seconds)
    room = np.array(rooms[:length])
    alone, cyclic = placed(case.spans, room), placed(case.spans, room, seam=True)
    assert (alone is None) == (cyclic is None)
    if alone is not None and cyclic is not None:
        assert all(b.carried or b.prefetch <= a.prefetch for a, b in zip(alone, cyclic, strict=True))


def test_by_hand() -> None:
    spans = (BundleSpan(("a",), 10, 0, 1), BundleSpan(("b",), 10, 2, 2), BundleSpan(("c",), 10, 3, 3))

    def prefetches(*room: int, seam: bool = False) -> list[int] | None:
        found = placed(spans, np.array(room), seam)
        return None if found is None else [p.prefetch for p in found]

    assert prefetches(10, 10, 10, 10) == [0, 2, 3]
    assert prefetches(20, 20, 20, 20) == [0, 0, 2]
    assert prefetches(30, 30, 30, 30) == [0, 0, 0]
    assert prefetches(20, 10, 20, 20) == [0, 2, 2]
    assert prefetches(9, 20, 20, 20) is None
    # Over the seam: `a` comes while `c` of the call before is used, and `b` with it where there is room.
    assert prefetches(20, 20, 20, 20, seam=True) == [3, 0, 2]
    assert prefetches(20, 20, 20, 30, seam=True) == [3, 3, 2]
    assert prefetches(20, 20, 30, 30, seam=True) == [2, 3, 2]
    assert prefetches(30, 30, 30, 30, seam=True) == [2, 3, 0]
