"""`passes.cuda_replay` is `passes.cuda_allocator`, faster: laws over random traces, and pools computed by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.cuda_allocator import MIB, CachingAllocator, round_bytes
from passes.cuda_replay import Event, Pools, Trace, best_pools

POOL_STEP = 2 * MIB


def reference(events: list[Event], pools: Sequence[int] = ()) -> int:
    """Peak reserved bytes by the readable allocator, call after call, with pools made as a device makes them."""
    allocator = CachingAllocator()
    for handle in [allocator.alloc(nbytes) for nbytes in pools]:
        allocator.free(handle)
    before = -1
    while before < allocator.reserved_bytes:
        before = allocator.reserved_bytes
        call(allocator, events)
    return allocator.peak_reserved_bytes


def call(allocator: CachingAllocator, events: list[Event]) -> None:
    """Serves the events and gives back what they leave."""
    handles: dict[int, int] = {}
    for key, nbytes in events:
        if key > 0:
            handles[key] = allocator.alloc(nbytes)
        else:
            allocator.free(handles.pop(-key))
    for handle in handles.values():
        allocator.free(handle)


THRESHOLDS = (0, 512, MIB, 2 * MIB, 10 * MIB, 12 * MIB, 20 * MIB, 22 * MIB, 64 * MIB)
SIZES = st.one_of(
    st.builds(
        lambda size, off: max(0, size + off), st.sampled_from(THRESHOLDS), st.sampled_from((-MIB, -513, -512, -1, 0, 1, 512))
    ),
    st.integers(0, 3 * MIB),
    st.integers(0, 40 * MIB),
)
POOLS = st.lists(st.integers(5, 40).map(lambda steps: steps * POOL_STEP), max_size=2)


@st.composite
def steps_of_events(draw: st.DrawFn) -> list[list[Event]]:
    """Steps that make, end, or make and end at once; some storages outlive the trace."""
    steps: list[list[Event]] = []
    live: list[int] = []
    key = 0
    for actions in draw(st.lists(st.lists(st.one_of(SIZES, st.integers(-40, -1), st.tuples(SIZES)), max_size=5), max_size=14)):
        events: list[Event] = []
        for action in actions:
            if isinstance(action, int) and action < 0:
                if live:
                    events.append((-live.pop(action % len(live)), 0))
                continue
            key += 1
            if isinstance(action, tuple):
                events += [(key, action[0]), (-key, 0)]
            else:
                events.append((key, action))
                live.append(key)
        steps.append(events)
    return steps


def flat(steps: list[list[Event]]) -> list[Event]:
    return [event for events in steps for event in events]


@settings(deadline=None, max_examples=300)
@given(steps_of_events(), POOLS)
def test_reserves_what_the_allocator_reserves(steps: list[list[Event]], pools: list[int]) -> None:
    events = flat(steps)
    wanted = reference(events, pools)
    assert Trace.of(steps).reserved_bytes(pools) == wanted
    assert Trace.of([events]).reserved_bytes(pools) == wanted


@settings(deadline=None)
@given(steps_of_events(), POOLS, st.integers(0, 200 * MIB))
def test_a_limit_only_ends_a_replay_early(steps: list[list[Event]], pools: list[int], limit: int) -> None:
    trace = Trace.of(steps)
    whole, cut = trace.reserved_bytes(pools), trace.reserved_bytes(pools, limit)
    assert cut == whole if whole <= limit else cut > limit


@settings(deadline=None)
@given(steps_of_events(), st.integers(0, 200 * MIB))
def test_the_best_pools_is_true_and_never_worse_than_none(steps: list[list[Event]], limit: int) -> None:
    trace, events = Trace.of(steps), flat(steps)
    best = trace.best_pools()
    assert best is not None
    assert best == best_pools(events)
    assert best.reserved_bytes == reference(events, best.sizes)
    assert trace.live_bytes <= best.reserved_bytes <= reference(events)
    assert all(nbytes % POOL_STEP == 0 and nbytes >= 10 * MIB for nbytes in best.sizes)
    # The limit decides whether there is an answer, never which: what a smaller budget finds, a larger one finds too.
    assert trace.best_pools(limit) == (best if best.reserved_bytes <= limit else None)
    assert trace.best_pools(best.reserved_bytes) == best


@settings(deadline=None, max_examples=200)
@given(steps_of_events().filter(bool), st.data())
def test_holding_blocks_is_having_their_events(steps: list[list[Event]], data: st.DataObject) -> None:
    index = st.integers(0, len(steps) - 1)
    drawn = data.draw(st.lists(st.tuples(index, index, SIZES), max_size=6))
    blocks = [(min(a, b), max(a, b), nbytes) for a, b, nbytes in drawn]
    events: list[Event] = []
    for i, step in enumerate(steps):
        events += [(10**6 + k, nbytes) for k, (first, _, nbytes) in enumerate(blocks) if first == i]
        events += step
        events += [(-(10**6 + k), 0) for k, (_, last, _) in enumerate(blocks) if last == i]
    trace = Trace.of(steps)
    pools = data.draw(POOLS)
    assert trace.holding(blocks).reserved_bytes(pools) == reference(events, pools)
    assert trace.holding(blocks).best_pools() == best_pools(events)
    assert trace.reserved_bytes(pools) == reference(flat(steps), pools)  # it is as before


def test_a_pool_joins_what_segments_keep_apart() -> None:
    # 12 and 12 live, then 24: two segments of 12 cannot serve it, a pool of 24 can.
    events = [(1, 12 * MIB), (2, 12 * MIB), (-1, 0), (-2, 0), (3, 24 * MIB)]
    assert Trace.of([events]).reserved_bytes() == 48 * MIB
    assert best_pools(events) == Pools((24 * MIB,), 24 * MIB)


def test_a_pool_of_its_own_keeps_others_from_lying_in_the_way() -> None:
    # 12, then 48 behind it, then 24 where the 12 was: in one pool that is too small, and the 24 lies behind the 48.
    events = [(1, 12 * MIB), (2, 48 * MIB), (-1, 0), (3, 24 * MIB), (-2, 0), (-3, 0)]
    assert Trace.of([events]).reserved_bytes([84 * MIB]) == 84 * MIB
    assert best_pools(events) == Pools((48 * MIB, 24 * MIB), 72 * MIB)


def test_a_pool_serves_requests_below_ten_mebibytes_too() -> None:
    events = [(key, 3 * MIB) for key in range(1, 5)]
    assert Trace.of([events]).reserved_bytes() == 20 * MIB
    assert best_pools(events) == Pools((12 * MIB,), 12 * MIB)


def test_a_pool_that_is_one_request_too_small_costs_a_whole_segment() -> None:
    events = [(key, 3 * MIB) for key in range(1, 6)]
    trace = Trace.of([events])
    assert trace.reserved_bytes([14 * MIB]) == 34 * MIB
    assert trace.best_pools() == Pools((16 * MIB,), 16 * MIB)


def test_a_second_call_that_finds_what_the_first_made_may_need_more() -> None:
    # The first puts both 9 into one segment of 20; the second takes one from the 14, which then has to be made again.
    events = [(1, 9 * MIB), (2, 9 * MIB), (3, 14 * MIB)]
    allocator, reserved = CachingAllocator(), []
    for _ in range(3):
        call(allocator, events)
        reserved.append(allocator.reserved_bytes // MIB)
    assert reserved == [34, 48, 48]
    assert Trace.of([events]).reserved_bytes() == 48 * MIB
    assert best_pools(events) == Pools((32 * MIB,), 32 * MIB)


def test_small_requests_stay_outside_the_pool() -> None:
    assert best_pools([(1, MIB), (2, 11 * MIB)]) == Pools((12 * MIB,), 14 * MIB)
    assert best_pools([(1, MIB), (2, 513)]) == Pools((), 2 * MIB)
    assert best_pools([]) == Pools((), 0)
    assert best_pools([(1, 0)], 0) == Pools((), 0)


def test_nothing_fits_below_what_lives() -> None:
    events = [(1, 30 * MIB)]
    assert best_pools(events, 30 * MIB) == Pools((30 * MIB,), 30 * MIB)
    assert best_pools(events, 30 * MIB - 1) is None
    assert best_pools([(1, 1)], 2 * MIB - 1) is None


@pytest.mark.parametrize("pool_bytes", [-2 * MIB, 0, 512, 8 * MIB, 11 * MIB])
def test_pools_that_cannot_be_made_are_refused(pool_bytes: int) -> None:
    with pytest.raises(ValueError, match="multiple of 2 MiB of at least 10 MiB"):
        Trace.of([]).reserved_bytes([pool_bytes])


def test_impossible_events_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot allocate -1 bytes"):
        Trace.of([[(1, -1)]])
    with pytest.raises(ValueError, match="key 2 is not live"):
        Trace.of([[(-2, 0)]])
    with pytest.raises(ValueError, match="key 1 is live already"):
        Trace.of([[(1, 5), (1, 5)]])


def test_blocks_of_all_sizes_round_as_the_allocator_does() -> None:
    for nbytes in (1, 511, 512, 513, MIB, MIB + 1, 10 * MIB - 512, 10 * MIB - 511, 10 * MIB):
        assert Trace.of([[(1, nbytes)]]).reserved_bytes() == reference([(1, nbytes)]) >= round_bytes(nbytes)
