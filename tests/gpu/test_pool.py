"""On a real device: what `passes.cuda_replay` says of a sequence of requests is what PyTorch's allocator reserves."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from passes.cuda_allocator import MIB
from passes.cuda_replay import Event, Trace
from runtime.devices.cuda import CudaDevice

pytestmark = pytest.mark.gpu


@pytest.fixture
def stream() -> Iterator[torch.cuda.Stream]:
    """One of our own: free blocks that other tests left belong to other streams, and are never taken."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    own = torch.cuda.Stream()
    with torch.cuda.stream(own):
        yield own
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def random_events(seed: int) -> list[Event]:
    """Sizes are odd multiples of 512 B, so that hardly two blocks are equal: which of those is taken depends on the driver."""
    rng = random.Random(seed)
    events: list[Event] = []
    live: list[int] = []
    for key in range(1, 600):
        largest = rng.choice([MIB, 4 * MIB, 12 * MIB, 48 * MIB])
        events.append((key, (2 * rng.randrange(largest // 1024) + 1) * 512 - rng.randrange(512)))
        live.append(key)
        while len(live) > 12 or (live and rng.random() < 0.4):
            events.append((-live.pop(rng.randrange(len(live))), 0))
    return events


def run(events: list[Event]) -> None:
    tensors: dict[int, torch.Tensor] = {}
    for key, nbytes in events:
        if key > 0:
            tensors[key] = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        else:
            del tensors[-key]


@pytest.mark.parametrize("seed", range(4))
def test_the_allocator_reserves_what_was_replayed(seed: int, stream: torch.cuda.Stream) -> None:
    events = random_events(seed)
    trace = Trace.of([events])
    best = trace.best_pools()
    assert best is not None
    device = CudaDevice(torch.device("cuda"))
    for pools in ((), best.sizes, (64 * MIB,), (48 * MIB, 24 * MIB)):
        device.reserve()
        before = torch.cuda.memory_reserved()
        device.reserve(*pools)
        assert torch.cuda.memory_reserved() - before == sum(pools)
        for _ in range(8):  # as many as it takes until a call finds all that it needs
            run(events)
        assert torch.cuda.memory_reserved() - before == trace.reserved_bytes(pools)
    device.close()


def test_a_budget_of_just_what_is_reserved_is_enough(stream: torch.cuda.Stream) -> None:
    events = random_events(5)
    best = Trace.of([events]).best_pools()
    assert best is not None
    device = CudaDevice(torch.device("cuda"))
    device.enforce(best.reserved_bytes)
    torch.cuda.reset_accumulated_memory_stats()
    try:
        device.reserve(*best.sizes)
        for _ in range(8):
            with device.call([], []):
                run(events)
        measured = device.measurement()
        assert measured is not None
        assert measured.reserved_bytes == best.reserved_bytes
        assert torch.cuda.memory_stats()["num_alloc_retries"] == 0
    finally:
        device.close()


def test_a_call_finds_its_pool_on_another_stream_and_after_empty_cache(stream: torch.cuda.Stream) -> None:
    device = CudaDevice(torch.device("cuda"))
    before = torch.cuda.memory_reserved()
    device.reserve(64 * MIB)
    try:
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == before
        for where in (stream, torch.cuda.Stream()):
            with torch.cuda.stream(where), device.call([], []):
                blocks = [torch.empty(8 * MIB, dtype=torch.uint8, device="cuda") for _ in range(8)]
                assert torch.cuda.memory_reserved() - before == 64 * MIB
                blocks.clear()
    finally:
        device.close()


def test_arenas_lie_beside_the_pool(stream: torch.cuda.Stream) -> None:
    device = CudaDevice(torch.device("cuda"))
    before = torch.cuda.memory_reserved()
    device.reserve(64 * MIB)
    try:
        arena = device.allocate(32 * MIB)
        assert torch.cuda.memory_reserved() - before == 32 * MIB
        with device.call([], [arena]):
            assert torch.cuda.memory_reserved() - before == (32 + 64) * MIB
            staged = device.allocate(48 * MIB)
            assert torch.cuda.memory_reserved() - before == (32 + 64) * MIB
        del arena, staged
    finally:
        device.close()
