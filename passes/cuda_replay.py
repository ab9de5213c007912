"""What `passes.cuda_allocator` would reserve for a known sequence of requests, fast, and with the pools that reserve least.

A *pool* is a segment that is made and freed before anything else runs: the allocator then serves every large request that
fits there from it, by best fit, and its free blocks coalesce; those of segments that requests make one by one never do. A
pool of the right size reserves less: 463 MB where the activations of FLUX.1-dev otherwise take 1,030 (377 live). Where one
value is large, a second pool of just its size keeps others from lying in its way: 3.29 GB instead of 3.76 (3.29 live) for
the decoder of FLUX.1 in tiles at 2048 x 2048.

    pool 0    |hidden 28|query 28|key 28|mlp 113|mlp 113|cat 141|...   a segment for each, reused by what is as large or less
    pool 463  |hidden|query|key|...free...                             one segment, cut as it is needed

`CachingAllocator` states the rules and is what this file is tested against. Every number here is exactly its number, after as
many calls as it takes until one makes no further segment: where a call finds the segments that an earlier one made, it fits
otherwise, and may make more. With 9, 9 and 14 MiB the first call reserves 34 MiB and the second, which takes a 9 from the 14,
makes it 48. A pool that holds everything is whole again after each call, and one replay is enough.

It is faster since small and large requests never meet and are replayed apart, the small ones once for all pools; memory that
one operator takes and gives back at once is only looked up; and blocks are plain integers, in units of 512 B.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from passes.cuda_allocator import (
    LARGE_EXACT_BYTES,
    LARGE_ROUND_BYTES,
    LARGE_SEGMENT_BYTES,
    ROUND_BYTES,
    SMALL_LIMIT_BYTES,
    SMALL_SEGMENT_BYTES,
)

# (+key, bytes) makes a storage, (-key, 0) ends it; keys are positive.
Event = tuple[int, int]
# (slot, units): units > 0 take a block for the slot, 0 give it back; slot -1 takes one and gives it back at once.
_Operation = tuple[int, int]

_AT_ONCE = -1
_SMALL_LIMIT = SMALL_LIMIT_BYTES // ROUND_BYTES
_STEP = LARGE_ROUND_BYTES // ROUND_BYTES
_LEAST_POOL = LARGE_EXACT_BYTES // ROUND_BYTES
# Pools that are tried beside those that may hold all: so many steps of 2 MiB larger (its tail is another block to choose from
# than what lies behind an endless one), and so many eighths of the live peak, for where one segment fragments more than a few.
# Then so many steps from the live peak on: which hole fits best depends on every size, and now and then all of them do.
_STEPS_LARGER = (0, 1, 2, 4)
_EIGHTHS_OF_LIVE = (10, 9, 8, 7, 6, 5, 4, 3, 2)
_STEPS_FROM_LIVE = 24
# So many of the largest sizes of blocks may have a pool of their own, where that is at least one such part of what lives, with
# another pool for the rest: what lives besides, or so many steps more, or so many 64ths of what lives.
_OWN_POOLS = 2
_MUCH = 4
_STEPS_BESIDE = (0, 1, 2, 4, 8, 16)
_PARTS_BESIDE = (2, 3, 4, 5, 6)
# Addresses are the low bits of a block's key, its size the high ones: 2**34 units are 8 TiB.
_ADDRESS_BITS = 34
_ADDRESS_MASK = (1 << _ADDRESS_BITS) - 1


@dataclass(frozen=True)
class Pools:
    """Pools, made in this order, and what is reserved with them at most, all in bytes; they count as reserved."""

    sizes: tuple[int, ...]
    reserved_bytes: int


@dataclass(frozen=True)
class _Requests:
    """The requests of one size class, `starts[i]` being where those of step `i` begin; `slots` is how many slots there are."""

    operations: list[_Operation]
    starts: list[int]
    slots: int


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests by step (in a program: its inputs, then one operator after the other), ready to be replayed many times."""

    _small: _Requests
    _large: _Requests

    @classmethod
    def of(cls, steps: Iterable[Iterable[Event]]) -> Trace:
        """From the events of every step, in order; each `(+key, bytes)` may be ended by a `(-key, 0)` later.

        Raises:
            ValueError: a size is negative, or something ends that does not live.
        """
        small, large = _Builder(), _Builder()
        owner: dict[int, tuple[_Builder, int] | None] = {}
        for events in steps:
            small.step()
            large.step()
            for key, nbytes in events:
                if key > 0:
                    if nbytes < 0:
                        raise ValueError(f"cannot allocate {nbytes} bytes; the size must be at least 0")
                    if key in owner:
                        raise ValueError(f"key {key} is live already: end it before it is made again")
                    units = -(-nbytes // ROUND_BYTES)
                    builder = large if units > _SMALL_LIMIT else small
                    owner[key] = (builder, builder.take(units)) if units else None
                elif -key not in owner:
                    raise ValueError(f"key {-key} is not live: it was ended before, or never made")
                elif (owned := owner.pop(-key)) is not None:
                    owned[0].give_back(owned[1])
        return cls(small.finish(), large.finish())

    def holding(self, blocks: Sequence[tuple[int, int, int]]) -> Trace:
        """This trace with further blocks `(first step, last step, bytes)`.

        Each is made before what its first step asks for and ended after what its last step does, those of one step in the order
        given. What was prepared is shared: this takes time by the number of blocks, not by that of requests.
        """
        units = [(first, last, -(-nbytes // ROUND_BYTES)) for first, last, nbytes in blocks]
        small = [block for block in units if 0 < block[2] <= _SMALL_LIMIT]
        trace = Trace(_insert(self._small, small), _insert(self._large, [b for b in units if b[2] > _SMALL_LIMIT]))
        if not small:
            trace.__dict__["_small_units"] = self._small_units  # the same requests reserve the same
        return trace

    @cached_property
    def live_bytes(self) -> int:
        """The most bytes of large requests that live at one time, plus all that the small ones reserve: no pool is better."""
        return (self._live_units + self._small_units) * ROUND_BYTES

    def reserved_bytes(self, pools: Sequence[int] = (), limit: int | None = None) -> int:
        """What is reserved at most with pools of these sizes, by any number of calls between which all is given back.

        With a limit, some number above it as soon as it is passed.

        Raises:
            ValueError: there is no such pool: it is a multiple of 2 MiB of at least 10 MiB.
        """
        for nbytes in pools:
            if nbytes % LARGE_ROUND_BYTES or nbytes < LARGE_EXACT_BYTES:
                raise ValueError(f"a pool is a multiple of 2 MiB of at least 10 MiB, not {nbytes} bytes")
        small = self._small_units
        most = None if limit is None else limit // ROUND_BYTES - small
        return (small + _reserved(self._large, [nbytes // ROUND_BYTES for nbytes in pools], most)) * ROUND_BYTES

    def best_pools(self, limit: int | None = None) -> Pools | None:
        """The pools, of a few candidates, with which least is reserved; None where that is more than `limit` bytes.

        A pure function of the requests: the limit decides whether there is an answer and how soon, never which. No pool at all
        is a candidate, so it is never worse than that.
        """
        small, best = self._small_units, None
        most = None if limit is None else limit // ROUND_BYTES - small
        if most is not None and self._live_units > most:
            return None
        for pools in self._candidates(most):
            reserved = _reserved(self._large, pools, most)
            if most is None or reserved <= most:
                best = Pools(tuple(pool * ROUND_BYTES for pool in pools), (reserved + small) * ROUND_BYTES)
                most = reserved - 1  # only what is better counts from here on: most replays end early
        return best

    def _candidates(self, most: int | None) -> Iterator[tuple[int, ...]]:
        """Pools to try, in units, the likeliest first."""
        live = -(-self._live_units // _STEP)
        if live:
            sizes = [-(-high // _STEP) + more for high in _high_waters(self._large, most) for more in _STEPS_LARGER]
            sizes += [live * eighths // 8 for eighths in _EIGHTHS_OF_LIVE]
            sizes += range(live, live + _STEPS_FROM_LIVE)
            for size in dict.fromkeys(max(size * _STEP, _LEAST_POOL) for size in sizes):
                yield (size,)
        yield ()
        for large in self._largest:
            own = -(-large // _STEP) * _STEP
            rest = -(-(self._live_units - large) // _STEP)
            for more in (*_STEPS_BESIDE, *(live * part // 64 for part in _PARTS_BESIDE)):
                yield own, max((rest + more) * _STEP, _LEAST_POOL)

    @cached_property
    def _largest(self) -> list[int]:
        """The sizes of the largest blocks that are held, in units, where such a block is much of what lives."""
        sizes = {units for slot, units in self._large.operations if slot != _AT_ONCE and units >= _LEAST_POOL}
        return [units for units in sorted(sizes, reverse=True)[:_OWN_POOLS] if units * _MUCH >= self._live_units]

    @cached_property
    def _small_units(self) -> int:
        return _reserved(self._small, (), None, small=True)

    @cached_property
    def _live_units(self) -> int:
        sizes = [0] * self._large.slots
        changes: list[int] = []
        for slot, units in self._large.operations:
            if slot == _AT_ONCE:
                changes += (units, -units)
            elif units:
                sizes[slot] = units
                changes.append(units)
            else:
                changes.append(-sizes[slot])
        return max(accumulate(changes), default=0)


def best_pools(events: Iterable[Event], limit: int | None = None) -> Pools | None:
    """The best pools for a sequence of events; see `Trace.best_pools`."""
    return Trace.of([events]).best_pools(limit)


class _Builder:
    """Collects the requests of one size class."""

    def __init__(self) -> None:
        self._operations: list[_Operation] = []
        self._starts: list[int] = []
        self._slots = 0

    def step(self) -> None:
        self._starts.append(len(self._operations))

    def take(self, units: int) -> int:
        self._operations.append((self._slots, units))
        self._slots += 1
        return self._slots - 1

    def give_back(self, slot: int) -> None:
        operations = self._operations
        # In the same step only: a block that is held may come in between steps.
        if len(operations) > self._starts[-1] and operations[-1][0] == slot:
            operations[-1] = (_AT_ONCE, operations[-1][1])
        else:
            operations.append((slot, 0))

    def finish(self) -> _Requests:
        return _Requests(self._operations, self._starts, self._slots)


def _insert(requests: _Requests, blocks: Sequence[tuple[int, int, int]]) -> _Requests:
    """With `(first step, last step, units)` in slots of their own; what comes out has no more steps to insert at."""
    if not blocks:
        return requests
    assert requests.starts, "blocks are held once: give holding() all of them"
    ends = [*requests.starts[1:], len(requests.operations)]
    inserted = [(requests.starts[first], first, 0, requests.slots + i, n) for i, (first, _, n) in enumerate(blocks)]
    inserted += [(ends[last], last, 1, requests.slots + i, 0) for i, (_, last, _) in enumerate(blocks)]
    operations: list[_Operation] = []
    copied = 0
    for where, _, _, slot, units in sorted(inserted):
        operations += requests.operations[copied:where]
        operations.append((slot, units))
        copied = where
    operations += requests.operations[copied:]
    return _Requests(operations, [], requests.slots + len(blocks))


def _reserved(requests: _Requests, pools: Sequence[int], most: int | None, *, small: bool = False) -> int:
    """Units reserved after any number of calls, pools included; with `most`, some number above it once that is passed.

    Between calls all is given back, so that the next one finds every segment whole: with those that the last one made it may
    fit otherwise, and make more. It is called again until it makes none.
    """
    segments = list(pools)
    if most is not None and sum(pools) > most:
        return sum(pools)
    known = -1
    while known < len(segments):
        known = len(segments)
        if not _replay(requests, segments, most, small):
            break
    return sum(segments)


def _replay(requests: _Requests, segments: list[int], most: int | None, small: bool) -> bool:
    """One call, beginning with free segments of these units; appends those that it makes. False once they pass `most`.

    The loop is flat and its state in local names: it is most of the time that a plan takes.
    """
    least_rest = 0 if small else _SMALL_LIMIT  # a rest of at most this stays in the block
    # Free blocks as (size, address) in one sorted list of integers; where each ends by where it starts, and the other way.
    free: list[int] = []
    ends: dict[int, int] = {}
    starts: dict[int, int] = {}
    first, last = [0] * requests.slots, [0] * requests.slots
    reserved = top = 0
    for size in segments:
        insort(free, size << _ADDRESS_BITS | top)
        ends[top], starts[top + size] = top + size, top
        reserved, top = reserved + size, top + size + 1  # a gap between segments, over which nothing merges
    for slot, units in requests.operations:
        if units:
            index = bisect_left(free, units << _ADDRESS_BITS)
            if index < len(free):
                if slot < 0:
                    continue  # taken and given back: as before
                key = free.pop(index)
                start, size = key & _ADDRESS_MASK, key >> _ADDRESS_BITS
                end = start + size
                del ends[start]
            else:
                size = _segment_units(units)
                start, end = top, top + size
                reserved, top = reserved + size, end + 1
                segments.append(size)
                assert top <= _ADDRESS_MASK, "8 TiB of segments"
                if most is not None and reserved > most:
                    return False
                if slot < 0:
                    insort(free, size << _ADDRESS_BITS | start)
                    ends[start], starts[end] = end, start
                    continue
                starts[end] = start
            rest = size - units
            if rest > least_rest:
                cut = start + units
                insort(free, rest << _ADDRESS_BITS | cut)
                ends[cut], starts[end] = end, cut
                end = cut
            else:
                del starts[end]
            first[slot], last[slot] = start, end
        else:
            start, end = first[slot], last[slot]
            before, after = starts.pop(start, None), ends.pop(end, None)
            if before is not None:
                del free[bisect_left(free, start - before << _ADDRESS_BITS | before)]
                start = before
            if after is not None:
                del free[bisect_left(free, after - end << _ADDRESS_BITS | end)]
                end = after
            insort(free, end - start << _ADDRESS_BITS | start)
            ends[start], starts[end] = end, start
    return True


def _high_waters(requests: _Requests, most: int | None) -> tuple[int, ...]:
    """Where the highest block ends if the pool has no end, in units: of all, and of those that are not given back at once.

    Empty once the latter is more than `most`. What lies behind all blocks is larger than any hole, so it is taken last. A pool
    that ends there holds everything, unless its tail is a better fit than a hole somewhere; and what is given back at once may
    yet find a hole in a smaller one. A replay tells.
    """
    free: list[int] = []
    ends: dict[int, int] = {}
    starts: dict[int, int] = {}
    first, last = [0] * requests.slots, [0] * requests.slots
    top = high = highest = 0
    for slot, units in requests.operations:
        if units:
            index = bisect_left(free, units << _ADDRESS_BITS)
            if index < len(free):
                if slot < 0:
                    continue
                key = free.pop(index)
                start, size = key & _ADDRESS_MASK, key >> _ADDRESS_BITS
                end = start + size
                del ends[start]
                if size - units > _SMALL_LIMIT:
                    cut = start + units
                    insort(free, size - units << _ADDRESS_BITS | cut)
                    ends[cut], starts[end] = end, cut
                    end = cut
                else:
                    del starts[end]
            else:
                start, end = top, top + units
                if end > highest:
                    highest = end
                if slot < 0:
                    continue
                top = end
                if end > high:
                    high = end
                    assert high <= _ADDRESS_MASK, "8 TiB of blocks"
                    if most is not None and high > most:
                        return ()
            first[slot], last[slot] = start, end
        else:
            start, end = first[slot], last[slot]
            before, after = starts.pop(start, None), ends.pop(end, None)
            if before is not None:
                del free[bisect_left(free, start - before << _ADDRESS_BITS | before)]
                del ends[before]
                start = before
            if end == top:
                top = start
                continue
            if after is not None:
                del free[bisect_left(free, after - end << _ADDRESS_BITS | end)]
                end = after
            insort(free, end - start << _ADDRESS_BITS | start)
            ends[start], starts[end] = end, start
    return highest, high


def _segment_units(units: int) -> int:
    if units <= _SMALL_LIMIT:
        return SMALL_SEGMENT_BYTES // ROUND_BYTES
    if units < _LEAST_POOL:
        return LARGE_SEGMENT_BYTES // ROUND_BYTES
    return -(-units // _STEP) * _STEP
