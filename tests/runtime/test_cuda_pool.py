"""Pools on a simulated caching allocator: made once, found gone, made again, never over the cap."""

from __future__ import annotations

import weakref

import pytest
import torch

from passes.cuda_allocator import MIB, CachingAllocator, OutOfMemory
from runtime.devices import open_device
from runtime.devices.cuda import share_of
from runtime.devices.cuda_pool import Cache, PoolSegments


class _Block:
    def __init__(self, allocator: CachingAllocator, nbytes: int) -> None:
        weakref.finalize(self, allocator.free, allocator.alloc(nbytes))


class SimulatedCache(Cache):
    """One allocator for each stream, as blocks never leave theirs; the cap is on one of them, which is enough here."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.streams = {0: CachingAllocator(limit_bytes), 1: CachingAllocator(limit_bytes)}
        self.current = self.released = self.allocations = 0

    def empty(self) -> None:
        for allocator in self.streams.values():
            before = len(allocator.snapshot())
            allocator.empty_cache()
            self.released += before - len(allocator.snapshot())

    def allocate(self, nbytes: int) -> object:
        self.allocations += 1
        try:
            return _Block(self.streams[self.current], nbytes)
        except OutOfMemory as error:
            raise torch.OutOfMemoryError(str(error)) from error

    def reserved_bytes(self) -> int:
        return sum(allocator.reserved_bytes for allocator in self.streams.values())

    def released_segments(self) -> int:
        return self.released

    def stream(self) -> int:
        return self.current

    def segments(self, stream: int = 0) -> list[int]:
        return [segment.nbytes for segment in self.streams[stream].snapshot()]


def test_a_pool_is_one_free_segment() -> None:
    cache = SimulatedCache()
    pool = PoolSegments(cache)
    pool.make(24 * MIB)
    assert cache.segments() == [24 * MIB]
    assert cache.streams[0].allocated_bytes == 0
    blocks = [cache.allocate(12 * MIB) for _ in range(2)]
    assert cache.segments() == [24 * MIB]
    blocks.clear()
    pool.renew()
    assert cache.allocations == 3  # it was there: nothing is made again


def test_pools_lie_apart() -> None:
    cache = SimulatedCache()
    pools = PoolSegments(cache)
    pools.make(24 * MIB, 12 * MIB)
    assert cache.segments() == [24 * MIB, 12 * MIB]
    assert cache.streams[0].allocated_bytes == 0
    blocks = [cache.allocate(12 * MIB) for _ in range(3)]
    assert cache.segments() == [24 * MIB, 12 * MIB]
    blocks.clear()
    cache.empty()
    pools.renew()
    assert cache.segments() == [24 * MIB, 12 * MIB]


def test_what_was_cached_goes_first() -> None:
    cache = SimulatedCache()
    cache.allocate(40 * MIB)
    pool = PoolSegments(cache)
    pool.make(24 * MIB)
    assert cache.segments() == [24 * MIB]
    pool.make()
    assert cache.segments() == []
    pool.renew()
    assert cache.segments() == []


def test_a_hole_of_another_segment_is_no_pool() -> None:
    cache = SimulatedCache()
    first, arena = cache.allocate(14 * MIB), None
    del first
    arena = cache.allocate(2 * MIB)  # cut from the 14, of which 12 are left
    PoolSegments(cache).make(12 * MIB)
    assert cache.segments() == [14 * MIB, 12 * MIB]
    assert cache.streams[0].allocated_bytes == 2 * MIB
    del arena


def test_it_is_made_again_on_another_stream_and_when_it_was_given_back() -> None:
    cache = SimulatedCache()
    pool = PoolSegments(cache)
    pool.make(24 * MIB)
    cache.current = 1
    pool.renew()
    assert (cache.segments(0), cache.segments(1)) == ([], [24 * MIB])
    cache.empty()
    assert cache.segments(1) == []
    pool.renew()
    assert cache.segments(1) == [24 * MIB]


def test_what_stays_is_not_cut_out_of_the_pool() -> None:
    cache = SimulatedCache()
    pool = PoolSegments(cache)
    pool.release()  # there is none yet
    pool.make(24 * MIB)
    pool.release()
    arena = cache.allocate(20 * MIB)
    assert cache.segments() == [20 * MIB]
    pool.renew()
    assert cache.segments() == [20 * MIB, 24 * MIB]
    del arena


@pytest.mark.parametrize("name", ["accounting", "cpu"])
def test_devices_without_a_caching_allocator_have_no_pool(name: str) -> None:
    open_device(name).reserve(24 * MIB)


def test_no_pool_passes_the_cap() -> None:
    cache = SimulatedCache()
    pool = PoolSegments(cache)
    pool.limit_bytes = 40 * MIB
    pool.make(24 * MIB)
    held = cache.allocate(3 * MIB)
    cache.current = 1
    pool.renew()  # the old one is in use
    assert cache.reserved_bytes() == 24 * MIB
    assert cache.segments(1) == []
    del held
    pool.renew()  # nothing changed that it could see: it does not try in every call
    assert cache.segments(1) == []
    cache.empty()
    pool.renew()
    assert (cache.segments(0), cache.segments(1)) == ([], [24 * MIB])


def test_a_device_without_room_runs_without_a_pool() -> None:
    cache = SimulatedCache(limit_bytes=20 * MIB)
    PoolSegments(cache).make(24 * MIB)
    assert cache.reserved_bytes() == 0


@pytest.mark.parametrize("total_bytes", [25_393_692_672, 85_045_084_160, 8_585_216_000, 12_884_901_888])
def test_the_share_that_is_enforced_is_all_of_the_budget(total_bytes: int) -> None:
    for nbytes in [k * 2 * MIB for k in range(1, 4000)] + [k * 10**6 + 7 for k in range(1, 8000)]:
        share = share_of(nbytes, total_bytes)
        assert share <= 1
        assert nbytes >= total_bytes or nbytes <= int(share * total_bytes) <= nbytes + 1
