"""`passes.cuda_allocator` against hand-computed cases, invariants, and a naive model that scans everything."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.cuda_allocator import MIB, CachingAllocator, OutOfMemory, round_bytes, segment_bytes

# --- hand-computed cases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_requests_round_up_to_512_bytes(nbytes: int, expected: int) -> None:
    assert round_bytes(nbytes) == expected


@pytest.mark.parametrize(
    ("rounded", "expected"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_segment_sizes(rounded: int, expected: int) -> None:
    assert segment_bytes(rounded) == expected


def test_zero_bytes_allocate_nothing() -> None:
    allocator = CachingAllocator(limit_bytes=0)
    handle = allocator.alloc(0)
    assert (allocator.allocated_bytes, allocator.reserved_bytes, allocator.snapshot()) == (0, 0, ())
    allocator.free(handle)
    with pytest.raises(ValueError, match="not live"):
        allocator.free(handle)


def test_small_requests_share_a_segment() -> None:
    allocator = CachingAllocator()
    for nbytes in (1, 513, MIB):
        allocator.alloc(nbytes)
    assert allocator.requested_bytes == 1 + 513 + MIB
    assert allocator.allocated_bytes == 512 + 1024 + MIB
    assert allocator.reserved_bytes == 2 * MIB
    allocator.alloc(MIB)  # 1,536 B short of fitting
    assert allocator.reserved_bytes == 4 * MIB


def test_a_large_tail_of_one_mebibyte_is_not_split_and_counts_as_allocated() -> None:
    allocator = CachingAllocator()
    allocator.alloc(11 * MIB)  # segment of 12 MiB, 1 MiB left over
    assert allocator.allocated_bytes == allocator.reserved_bytes == 12 * MIB
    allocator.alloc(11 * MIB - 512)  # again 12 MiB, now 1 MiB + 512 B left over
    assert allocator.allocated_bytes == 12 * MIB + 11 * MIB - 512
    assert allocator.reserved_bytes == 24 * MIB


def test_a_small_block_is_split_to_the_last_512_bytes() -> None:
    allocator = CachingAllocator()
    allocator.alloc(MIB)
    allocator.alloc(MIB - 512)
    assert [block.nbytes for block in allocator.snapshot()[0].blocks] == [MIB, MIB - 512, 512]


def test_best_fit_takes_the_smallest_block_then_the_lowest_address() -> None:
    allocator = CachingAllocator()
    handles = [allocator.alloc(kib * 1024) for kib in (64, 1, 32, 1, 32, 1)]
    for index in (4, 0, 2):
        allocator.free(handles[index])
    again = allocator.alloc(32 * 1024)
    assert [block.address for block in allocator.snapshot()[0].blocks if block.handle == again] == [65 * 1024]


def test_pools_do_not_mix() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.alloc(20 * MIB))
    allocator.alloc(512)
    assert [segment.nbytes for segment in allocator.snapshot()] == [20 * MIB, 2 * MIB]
    assert allocator.peak_reserved_bytes == 22 * MIB


def test_neighbours_merge_whatever_the_order_of_frees() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        allocator = CachingAllocator()
        handles = [allocator.alloc(3 * MIB) for _ in range(3)]
        for index in order:
            allocator.free(handles[index])
        (segment,) = allocator.snapshot()
        assert [block.nbytes for block in segment.blocks] == [20 * MIB]


def test_cached_segments_are_released_at_the_limit() -> None:
    allocator = CachingAllocator(limit_bytes=64 * MIB)
    small, keep, drop = allocator.alloc(100), allocator.alloc(30 * MIB), allocator.alloc(22 * MIB)
    allocator.free(small)
    allocator.free(drop)
    assert (allocator.reserved_bytes, allocator.retries) == (54 * MIB, 0)
    allocator.alloc(34 * MIB)  # 54 + 34 > 64; releases 22 and 2, of both pools
    assert (allocator.reserved_bytes, allocator.retries) == (64 * MIB, 1)
    with pytest.raises(OutOfMemory, match=r"1 B were requested.*2097152 B more would do") as caught:
        allocator.alloc(1)
    assert (caught.value.reserved_bytes, caught.value.limit_bytes, allocator.retries) == (64 * MIB, 64 * MIB, 2)
    allocator.free(keep)
    assert allocator.alloc(29 * MIB) is not None  # served from the cache: no new segment, no retry
    assert (allocator.reserved_bytes, allocator.retries) == (64 * MIB, 2)


def test_a_segment_with_one_live_block_is_not_released() -> None:
    allocator = CachingAllocator(limit_bytes=20 * MIB)
    allocator.alloc(2 * MIB)
    allocator.free(allocator.alloc(9 * MIB))
    with pytest.raises(OutOfMemory):
        allocator.alloc(19 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_empty_cache_and_reset_peak() -> None:
    allocator = CachingAllocator()
    allocator.alloc(MIB)
    allocator.free(allocator.alloc(40 * MIB))
    assert allocator.empty_cache() == 40 * MIB
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (41 * MIB, 42 * MIB)
    allocator.reset_peak()
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (MIB, 2 * MIB)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        CachingAllocator(limit_bytes=-1)
    with pytest.raises(ValueError, match="cannot allocate -5 bytes"):
        CachingAllocator().alloc(-5)
    with pytest.raises(ValueError, match="handle 7 is not live"):
        CachingAllocator().free(7)


# --- a deliberately naive model --------------------------------------------------------------------------------------


@dataclass
class NaiveAllocator:
    """Segments as lists of [size, handle or None]; every question is answered by scanning all of them."""

    limit_bytes: int | None = None
    segments: list[tuple[int, bool, list[list[int | None]]]] = field(default_factory=list)  # (address, small, blocks)
    top: int = 0
    count: int = 0
    retries: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0

    @property
    def allocated(self) -> int:
        return sum(size or 0 for _, _, blocks in self.segments for size, handle in blocks if handle is not None)

    @property
    def reserved(self) -> int:
        return sum(size or 0 for _, _, blocks in self.segments for size, _ in blocks)

    def layout(self) -> list[tuple[int, list[tuple[int, int | None]]]]:
        return [(address, [(size or 0, handle) for size, handle in blocks]) for address, _, blocks in self.segments]

    def alloc(self, nbytes: int) -> int:
        handle = self.count
        if nbytes > 0:
            self._place((nbytes + 511) // 512 * 512, handle)
        self.count += 1
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return handle

    def _place(self, size: int, handle: int) -> None:
        small = size <= 2**20
        found = self._best(size, small)
        if found is None:
            self._grow(size, small)
            found = self._best(size, small)
        assert found is not None
        _, _, blocks, index = found
        rest = (blocks[index][0] or 0) - size
        if rest >= 512 if small else rest > 2**20:
            blocks[index : index + 1] = [[size, handle], [rest, None]]
        else:
            blocks[index][1] = handle

    def _best(self, size: int, small: bool) -> tuple[int, int, list[list[int | None]], int] | None:
        fits = []
        for base, is_small, blocks in self.segments:
            address = base
            for index, (length, handle) in enumerate(blocks):
                assert length is not None
                if is_small == small and handle is None and length >= size:
                    fits.append((length, address, blocks, index))
                address += length
        return min(fits, key=lambda fit: fit[:2], default=None)

    def _grow(self, size: int, small: bool) -> None:
        length = 2**21 if small else 20 * 2**20 if size < 10 * 2**20 else (size + 2**21 - 1) // 2**21 * 2**21
        if self.limit_bytes is not None and self.reserved + length > self.limit_bytes:
            self.retries += 1
            self.segments = [one for one in self.segments if any(handle is not None for _, handle in one[2])]
            if self.reserved + length > self.limit_bytes:
                raise OutOfMemory(size, length, self.reserved, self.limit_bytes)
        self.segments.append((self.top, small, [[length, None]]))
        self.top += length

    def free(self, handle: int) -> None:
        for _, _, blocks in self.segments:
            for index, (_, owner) in enumerate(blocks):
                if owner == handle:
                    blocks[index][1] = None
            merged: list[list[int | None]] = []
            for size, owner in blocks:
                if owner is None and merged and merged[-1][1] is None:
                    merged[-1][0] = (merged[-1][0] or 0) + (size or 0)
                else:
                    merged.append([size, owner])
            blocks[:] = merged


SIZES = st.one_of(
    st.integers(0, 4 * MIB),
    st.sampled_from([0, 1, 512, MIB - 512, MIB, MIB + 1, 9 * MIB, 10 * MIB - 512, 10 * MIB, 11 * MIB, 11 * MIB - 512]),
    st.integers(0, 40 * MIB),
)
# An event is a size to allocate, or (after the sign) which live block to free, counted modulo how many there are.
EVENTS = st.lists(st.one_of(SIZES, st.integers(0, 1000).map(lambda index: -1 - index)), max_size=60)


def check_invariants(allocator: CachingAllocator, live: dict[int, int]) -> None:
    """`live`: requested bytes by handle."""
    segments = allocator.snapshot()
    owners = [block.handle for segment in segments for block in segment.blocks if block.handle is not None]
    assert sorted(owners) == sorted(handle for handle, nbytes in live.items() if nbytes)  # none lost, none twice
    end = 0
    for segment in segments:
        assert segment.address >= end, "segments overlap"
        address = segment.address
        for block in segment.blocks:
            assert block.address == address, "blocks do not tile the segment"
            assert block.nbytes > 0
            assert block.nbytes % 512 == 0
            address += block.nbytes
        end = address
        free = [block.handle is None for block in segment.blocks]
        assert not any(a and b for a, b in itertools.pairwise(free)), "free neighbours were not merged"
    sizes = {block.handle: (block.nbytes, segment.small) for segment in segments for block in segment.blocks}
    for handle, nbytes in live.items():
        if nbytes:
            size, small = sizes[handle]
            assert round_bytes(nbytes) <= size <= round_bytes(nbytes) + (0 if small else MIB)
    assert allocator.reserved_bytes == sum(segment.nbytes for segment in segments) >= allocator.allocated_bytes
    assert allocator.allocated_bytes == sum(size for handle, (size, _) in sizes.items() if handle is not None)
    assert allocator.requested_bytes == sum(live.values()) <= allocator.allocated_bytes


@settings(deadline=None)
@given(EVENTS, st.one_of(st.none(), st.integers(0, 100 * MIB)))
def test_agrees_with_the_naive_model_and_keeps_its_invariants(events: list[int], limit_bytes: int | None) -> None:
    fast, naive = CachingAllocator(limit_bytes), NaiveAllocator(limit_bytes)
    live: dict[int, tuple[int, int]] = {}
    for event in events:
        peaks = fast.peak_allocated_bytes, fast.peak_reserved_bytes
        if event < 0:
            if live:
                handle = sorted(live)[(-event) % len(live)]
                fast.free(handle)
                naive.free(live.pop(handle)[1])
        else:
            try:
                slow_handle = naive.alloc(event)
            except OutOfMemory:
                with pytest.raises(OutOfMemory):
                    fast.alloc(event)
            else:
                live[fast.alloc(event)] = event, slow_handle
        check_invariants(fast, {handle: nbytes for handle, (nbytes, _) in live.items()})
        assert fast.peak_allocated_bytes >= max(peaks[0], fast.allocated_bytes)
        assert fast.peak_reserved_bytes >= max(peaks[1], fast.reserved_bytes)
        layout = [(one.address, [(block.nbytes, block.handle) for block in one.blocks]) for one in fast.snapshot()]
        assert layout == naive.layout()
        assert fast.retries == naive.retries
        assert limit_bytes is None or fast.reserved_bytes <= limit_bytes
    assert (fast.peak_allocated_bytes, fast.peak_reserved_bytes) == (naive.peak_allocated, naive.peak_reserved)
    for handle in live:
        fast.free(handle)
    assert fast.allocated_bytes == fast.requested_bytes == 0
    assert all(len(segment.blocks) == 1 for segment in fast.snapshot())


@given(st.lists(st.integers(0, MIB), max_size=40))
def test_small_allocations_add_up_to_their_rounded_sizes(sizes: list[int]) -> None:
    allocator = CachingAllocator()
    for nbytes in sizes:
        allocator.alloc(nbytes)
    assert allocator.allocated_bytes == sum(map(round_bytes, sizes))


def test_ten_thousand_events_are_fast() -> None:
    rng = random.Random(0)
    events = [rng.choice([rng.randrange(1, MIB), rng.randrange(1, 64 * MIB)]) for _ in range(5000)]
    started = time.perf_counter()
    allocator = CachingAllocator()
    live: list[int] = []
    for nbytes in events:
        live.append(allocator.alloc(nbytes))
        if len(live) > 200:
            allocator.free(live.pop(rng.randrange(len(live))))
    for handle in live:
        allocator.free(handle)
    assert time.perf_counter() - started < 1.0  # about 0.03 s alone; the slack is for a loaded machine
