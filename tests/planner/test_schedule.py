"""Prefetch positions and arena offsets, against definitions that compare every pair."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planner.schedule import Placement, arena_offsets, prefetch_into_arena, prefetch_into_headroom, staged_bytes
from planner.solve.bundles import BundleSpan
from tests.planner.problems import Case, cases


def naive_staged(placements: tuple[Placement, ...], length: int) -> list[int]:
    return [sum(p.span.nbytes for p in placements if p.prefetch <= i <= p.span.last) for i in range(length)]


def is_first_in_first_out(placements: tuple[Placement, ...]) -> bool:
    return all(a.prefetch <= b.prefetch for a, b in pairwise(placements)) and all(
        0 <= p.prefetch <= p.span.first for p in placements
    )


@given(cases())
def test_staged_bytes(case: Case) -> None:
    length = len(case.seconds)
    assert staged_bytes(case.placements, length).tolist() == naive_staged(case.placements, length)


@given(cases())
def test_offsets_never_overlap_in_time_and_space(case: Case) -> None:
    if not case.placements:
        return
    offsets, size = arena_offsets(case.placements)
    places = list(zip(case.placements, offsets, strict=True))
    for (a, x), (b, y) in combinations(places, 2):
        in_time = a.prefetch <= b.span.last and b.prefetch <= a.span.last
        in_space = x < y + b.span.nbytes and y < x + a.span.nbytes
        assert not (in_time and in_space)
    assert size == max(offset + p.span.nbytes for p, offset in places)
    assert min(offsets) >= 0
    assert size >= max(naive_staged(case.placements, len(case.seconds)))
    assert size <= sum(p.span.nbytes for p in case.placements)


@given(cases(), st.integers(1, 1500))
def test_arena_prefetches(case: Case, staging: int) -> None:
    placements = prefetch_into_arena(case.spans, staging)
    assert tuple(p.span for p in placements) == case.spans
    assert is_first_in_first_out(placements)
    # Above the arena's size only where a bundle comes as late as it can.
    staged = naive_staged(placements, len(case.seconds))
    late = {p.prefetch for p in placements if p.prefetch == p.span.first}
    for p in placements:
        assert staged[p.prefetch] <= staging or any(p.prefetch >= i for i in late)


@given(cases(), st.integers(0, 2500), st.integers(0, 500))
def test_headroom_never_exceeds_the_limit(case: Case, limit: int, resident: int) -> None:
    placements = prefetch_into_headroom(case.spans, case.activation_bytes, resident, limit)
    if placements is None:
        return
    assert tuple(p.span for p in placements) == case.spans
    assert is_first_in_first_out(placements)
    staged = naive_staged(placements, len(case.seconds))
    if case.spans:
        used = [resident + int(a) + s for a, s in zip(case.activation_bytes, staged, strict=True) if s]
        assert max(used) <= limit


@given(cases(), st.integers(0, 2500), st.integers(0, 1000))
def test_headroom_with_more_room_is_never_later(case: Case, limit: int, more: int) -> None:
    tight = prefetch_into_headroom(case.spans, case.activation_bytes, 0, limit)
    loose = prefetch_into_headroom(case.spans, case.activation_bytes, 0, limit + more)
    if tight is None:
        return
    assert loose is not None
    assert all(b.prefetch <= a.prefetch for a, b in zip(tight, loose, strict=True))


@given(cases())
def test_headroom_exists_where_copying_at_the_use_fits(case: Case) -> None:
    at_use = tuple(Placement(s, s.first) for s in case.spans)
    staged = np.array(naive_staged(at_use, len(case.seconds)))
    limit = int((case.activation_bytes + staged).max())
    assert prefetch_into_headroom(case.spans, case.activation_bytes, 0, limit) is not None


def test_by_hand() -> None:
    spans = (BundleSpan(("a",), 10, 0, 1), BundleSpan(("b",), 10, 2, 2), BundleSpan(("c",), 10, 3, 3))
    assert [p.prefetch for p in prefetch_into_arena(spans, 10)] == [0, 2, 3]
    assert [p.prefetch for p in prefetch_into_arena(spans, 20)] == [0, 0, 2]
    assert [p.prefetch for p in prefetch_into_arena(spans, 30)] == [0, 0, 0]
    activations = np.array([5, 15, 5, 5])
    headroom = prefetch_into_headroom(spans, activations, 0, 25)
    assert headroom is not None
    assert [p.prefetch for p in headroom] == [0, 2, 2]
    assert prefetch_into_headroom(spans, activations, 0, 24) is None
