"""What PyTorch's CUDA caching allocator would allocate and reserve for a sequence of requests; no GPU needed.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` (torch 2.13) for one stream and default settings (no
expandable segments, no `max_split_size_mb`, no `roundup_power2_divisions`, no garbage collection), written down from
reading that file:

- A request is rounded up to 512 B. Zero bytes allocate nothing.
- Two pools that never mix: *small* for rounded requests up to 1 MiB, *large* for the rest.
- The smallest free block of the pool that fits is taken; among equals the one at the lowest address.
- Where nothing fits, a segment is asked of the driver: 2 MiB for the small pool, 20 MiB for requests below 10 MiB, else
  the request rounded up to 2 MiB.
- What is left over of a block becomes a free block of its own if it has at least 512 B (small pool) or more than 1 MiB
  (large pool). A shorter tail stays in the block, and **counts as allocated**: `max_memory_allocated` sees it.
- A freed block merges with free neighbours of its segment. Segments stay reserved. A free segment of any size serves every
  large request that fits, of 1 to 10 MiB too, and is cut for it: made and freed beforehand, it is a pool
  (`passes.cuda_replay`). Blocks are free for the stream on which they were allocated alone.
- Where a new segment would pass the cap of `set_per_process_memory_fraction`, every segment that is wholly free, of
  either pool, goes back to the driver, and the request is tried once more.

The one thing that is not modelled is where the driver places a segment: addresses here only grow, which matters for
ties only.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from runtime.errors import PlannerError

MIB = 2**20
ROUND_BYTES = 512
"""Every request is rounded up to a multiple of this (`kMinBlockSize`)."""
SMALL_LIMIT_BYTES = 1 * MIB
"""Rounded requests up to this size come from the small pool (`kSmallSize`)."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""Size of a segment of the small pool (`kSmallBuffer`)."""
LARGE_SEGMENT_BYTES = 20 * MIB
"""Size of the segment that a large request below `LARGE_EXACT_BYTES` makes (`kLargeBuffer`)."""
LARGE_EXACT_BYTES = 10 * MIB
"""From this size on a segment is made to measure (`kMinLargeAlloc`)."""
LARGE_ROUND_BYTES = 2 * MIB
"""Segments made to measure are rounded up to a multiple of this (`kRoundLarge`)."""


class OutOfMemory(PlannerError):
    """The simulated allocator cannot serve a request within its limit.

    Attributes (all in bytes):
        requested_bytes: the request, as it was made.
        reserved_bytes: what stays reserved after all wholly free segments were released.
        limit_bytes: the limit.
    """

    def __init__(self, requested_bytes: int, segment_bytes: int, reserved_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"{requested_bytes} B were requested; that needs a segment of {segment_bytes} B, {reserved_bytes} B are "
            f"reserved by segments in use, and the limit is {limit_bytes} B "
            f"({reserved_bytes + segment_bytes - limit_bytes} B more would do)"
        )
        self.requested_bytes = requested_bytes
        self.reserved_bytes = reserved_bytes
        self.limit_bytes = limit_bytes


def round_bytes(nbytes: int) -> int:
    """The bytes that a request of `nbytes` occupies at least: the next multiple of 512, zero for zero."""
    return -(-nbytes // ROUND_BYTES) * ROUND_BYTES


def segment_bytes(rounded_bytes: int) -> int:
    """Bytes of the segment that a request of `rounded_bytes` (a positive multiple of 512) makes if nothing fits."""
    if rounded_bytes <= SMALL_LIMIT_BYTES:
        return SMALL_SEGMENT_BYTES
    if rounded_bytes < LARGE_EXACT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-rounded_bytes // LARGE_ROUND_BYTES) * LARGE_ROUND_BYTES


@dataclass(frozen=True)
class BlockView:
    """A block as a snapshot shows it: half-open `[address, address + nbytes)`, `handle` if live, None if free."""

    address: int
    nbytes: int
    handle: int | None


@dataclass(frozen=True)
class SegmentView:
    """A segment as a snapshot shows it; its blocks in order of address."""

    address: int
    nbytes: int
    small: bool
    blocks: tuple[BlockView, ...]


class _Block:
    """A piece of a segment, linked to its neighbours; `handle` is None while it is free."""

    __slots__ = ("address", "handle", "nbytes", "next", "prev", "requested_bytes", "small")

    def __init__(self, address: int, nbytes: int, small: bool) -> None:
        self.address = address
        self.nbytes = nbytes
        self.small = small
        self.requested_bytes = 0
        self.handle: int | None = None
        self.prev: _Block | None = None
        self.next: _Block | None = None


class _Pool:
    """The free blocks of one pool, sorted by (size, address)."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, int]] = []
        self._blocks: dict[int, _Block] = {}

    def add(self, block: _Block) -> None:
        insort(self._keys, (block.nbytes, block.address))
        self._blocks[block.address] = block

    def remove(self, block: _Block) -> None:
        del self._keys[bisect_left(self._keys, (block.nbytes, block.address))]
        del self._blocks[block.address]

    def take_best(self, nbytes: int) -> _Block | None:
        """Removes and returns the smallest block of at least `nbytes`, the lowest address among equals."""
        index = bisect_left(self._keys, (nbytes, -1))
        if index == len(self._keys):
            return None
        return self._blocks.pop(self._keys.pop(index)[1])

    def whole_segments(self) -> list[_Block]:
        return [block for block in self._blocks.values() if block.prev is None and block.next is None]


class CachingAllocator:
    """Simulates the caching allocator of one device and one stream; see the module docstring for the rules.

    Args:
        limit_bytes: most bytes that may be reserved at once, as `set_per_process_memory_fraction` sets it; None: no
        limit.

    Attributes:
        retries: how often cached segments were released to make room (`num_alloc_retries` of
        `torch.cuda.memory_stats`).
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"limit_bytes must be None or at least 0, not {limit_bytes}")
        self.limit_bytes = limit_bytes
        self.retries = 0
        self._small = _Pool()
        self._large = _Pool()
        self._live: dict[int, _Block | None] = {}
        self._segments: dict[int, _Block] = {}
        self._next_handle = 0
        self._next_address = 0
        self._requested = 0
        self._allocated = 0
        self._reserved = 0
        self._peak_allocated = 0
        self._peak_reserved = 0

    @property
    def requested_bytes(self) -> int:
        """Sum of the live requests, unrounded, in bytes."""
        return self._requested

    @property
    def allocated_bytes(self) -> int:
        """Sum of the live blocks, in bytes: rounded requests plus tails too short to split off (`memory_allocated`)."""
        return self._allocated

    @property
    def reserved_bytes(self) -> int:
        """Sum of all segments, in bytes (`memory_reserved`)."""
        return self._reserved

    @property
    def peak_allocated_bytes(self) -> int:
        """Most `allocated_bytes` there ever were (`max_memory_allocated`)."""
        return self._peak_allocated

    @property
    def peak_reserved_bytes(self) -> int:
        """Most `reserved_bytes` there ever were (`max_memory_reserved`)."""
        return self._peak_reserved

    def alloc(self, nbytes: int) -> int:
        """Serves a request of `nbytes` and returns a handle for `free`.

        Raises:
            ValueError: `nbytes` is negative.
            OutOfMemory: the limit does not allow it, not even after releasing every cached segment.
        """
        if nbytes < 0:
            raise ValueError(f"cannot allocate {nbytes} bytes; the size must be at least 0")
        if nbytes == 0:
            return self._new_handle(None)
        rounded = round_bytes(nbytes)
        pool = self._small if rounded <= SMALL_LIMIT_BYTES else self._large
        block = pool.take_best(rounded)
        if block is None:
            block = self._new_segment(nbytes, rounded)
        self._split(block, rounded, pool)
        block.requested_bytes = nbytes
        block.handle = self._new_handle(block)
        self._requested += nbytes
        self._allocated += block.nbytes
        self._peak_allocated = max(self._peak_allocated, self._allocated)
        return block.handle

    def free(self, handle: int) -> None:
        """Gives a block back to the cache.

        Raises:
            ValueError: `handle` was never returned by `alloc`, or is free already.
        """
        if handle not in self._live:
            raise ValueError(f"handle {handle} is not live: it was freed before, or alloc() never returned it")
        block = self._live.pop(handle)
        if block is None:
            return
        self._requested -= block.requested_bytes
        self._allocated -= block.nbytes
        block.handle = None
        block.requested_bytes = 0
        pool = self._small if block.small else self._large
        if (before := block.prev) is not None and before.handle is None:
            pool.remove(before)
            block = _join(before, block)
        if (after := block.next) is not None and after.handle is None:
            pool.remove(after)
            block = _join(block, after)
        pool.add(block)

    def address(self, handle: int) -> int:
        """Where a live block of at least one byte begins.

        Raises:
            ValueError: `handle` is not live, or has no bytes.
        """
        block = self._live.get(handle)
        if block is None:
            raise ValueError(f"handle {handle} has no address: it is not live, or of zero bytes")
        return block.address

    def empty_cache(self) -> int:
        """Returns every wholly free segment to the driver, as `torch.cuda.empty_cache`; says how many bytes."""
        before = self._reserved
        for pool in (self._small, self._large):
            for block in pool.whole_segments():
                pool.remove(block)
                del self._segments[block.address]
                self._reserved -= block.nbytes
        return before - self._reserved

    def reset_peak(self) -> None:
        """Starts both peaks again from the current values (`reset_peak_memory_stats`)."""
        self._peak_allocated = self._allocated
        self._peak_reserved = self._reserved

    def snapshot(self) -> tuple[SegmentView, ...]:
        """All segments and their blocks, in order of address."""
        return tuple(_view(first) for _, first in sorted(self._segments.items()))

    def _new_handle(self, block: _Block | None) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._live[handle] = block
        return handle

    def _new_segment(self, nbytes: int, rounded: int) -> _Block:
        size = segment_bytes(rounded)
        if self.limit_bytes is not None and self._reserved + size > self.limit_bytes:
            self.retries += 1
            self.empty_cache()
            if self._reserved + size > self.limit_bytes:
                raise OutOfMemory(nbytes, size, self._reserved, self.limit_bytes)
        block = _Block(self._next_address, size, rounded <= SMALL_LIMIT_BYTES)
        self._next_address += size
        self._segments[block.address] = block
        self._reserved += size
        self._peak_reserved = max(self._peak_reserved, self._reserved)
        return block

    def _split(self, block: _Block, rounded: int, pool: _Pool) -> None:
        """Cuts `block` down to `rounded` bytes if what is left is worth a block of its own."""
        left = block.nbytes - rounded
        if left < ROUND_BYTES if block.small else left <= SMALL_LIMIT_BYTES:
            return
        rest = _Block(block.address + rounded, left, block.small)
        rest.prev, rest.next = block, block.next
        if block.next is not None:
            block.next.prev = rest
        block.next = rest
        block.nbytes = rounded
        pool.add(rest)


def _join(first: _Block, second: _Block) -> _Block:
    """Merges two neighbours, neither of them in a pool, into the first."""
    first.nbytes += second.nbytes
    first.next = second.next
    if second.next is not None:
        second.next.prev = first
    return first


def _view(first: _Block) -> SegmentView:
    blocks: list[BlockView] = []
    block: _Block | None = first
    while block is not None:
        blocks.append(BlockView(block.address, block.nbytes, block.handle))
        block = block.next
    return SegmentView(first.address, sum(each.nbytes for each in blocks), first.small, tuple(blocks))
