"""The predicted allocations of one call as a snapshot of PyTorch's memory history, which its visualiser draws.

The form is that of `torch.cuda.memory._dump_snapshot`: `segments` as they are after the call, `device_traces` with every
allocation and free in order. On CUDA segments are those of the simulated caching allocator (`passes.cuda_allocator`), the one
that it is given beforehand among them, and of the arenas, each in its own; elsewhere nothing is cached, and every storage is a
segment of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from passes.cuda_allocator import CachingAllocator
from planner.memory import MemoryModel
from planner.memory_use import KINDS, Allocation, Moment, timed_moments

if TYPE_CHECKING:
    from planner.plan import Plan

Frames = list[dict[str, Any]]

# What is there before the call lies from here on, the pool apart from it; both are multiples of every rounding.
_ARENAS, _POOL = 0x7F00_0000_0000, 0x7F80_0000_0000
_SPACING = 512


def memory_history(plan: Plan) -> dict[str, Any]:
    """The snapshot as plain data."""
    return _History(plan).snapshot()


@dataclass(frozen=True)
class _Block:
    """Something that is allocated; `handle` names it in the pool, where it is of the pool."""

    address: int
    nbytes: int
    kind: str
    frames: Frames
    handle: int | None = None


class _History:
    def __init__(self, plan: Plan) -> None:
        self.title = plan.title
        self.memory: MemoryModel = plan.problem.memory
        self.pool = CachingAllocator() if self.memory.device == "cuda" else None
        self.pools = plan.layout.pools
        self.events: list[dict[str, Any]] = []
        self.live: dict[int, _Block] = {}  # by key
        self.segments: dict[int, int] = {}  # bytes by address, without those of the pool
        self._next_address = _ARENAS
        self._modules: dict[str, Frames] = {}
        for moment, start, _ in timed_moments(plan.problem, plan.emitted, plan.timeline):
            self._micros = round(start * 1e6)
            self._follow(moment)
        # With categories the visualiser wants one of this name, and draws nothing where none has it.
        self._event("snapshot", _Block(0, 0, "unknown", []))

    def snapshot(self) -> dict[str, Any]:
        return {"segments": list(self._segments()), "device_traces": [self.events]}

    def _follow(self, moment: Moment) -> None:
        if moment.step == "begin":
            self._begin(moment)
        else:
            for taken in moment.takes:
                self._take(taken, self._frames(moment, taken.label))
        if moment.workspace_bytes:
            workspace = Allocation(0, moment.workspace_bytes, "workspace", f"workspace of {moment.name}")
            self._take(workspace, self._frames(moment, workspace.label))
            self._give(0)
        for key in moment.gives:
            self._give(key)

    def _begin(self, moment: Moment) -> None:
        """What is there before anything runs: arenas in segments of their own, the rest as it comes."""
        for kind in KINDS:
            arenas = [taken for taken in moment.takes if taken.arena and taken.kind == kind]
            nbytes = sum(taken.nbytes for taken in arenas)
            if arenas:  # what libraries hold is known as a whole
                self._arena(arenas, nbytes if kind == "libraries" else self.memory.reserved_alone(nbytes))
        if self.pool is not None:  # made and freed, pools are what the allocator cuts from then on
            handles = [self.pool.alloc(nbytes) for nbytes in self.pools]
            for handle, nbytes in zip(handles, self.pools, strict=True):
                self._event("segment_alloc", _Block(_POOL + self.pool.address(handle), nbytes, "unknown", []))
            for handle in handles:
                self.pool.free(handle)
        for taken in moment.takes:
            if not taken.arena:
                self._take(taken, self._frames(moment, taken.label))

    def _arena(self, parts: Sequence[Allocation], reserved_bytes: int) -> None:
        """Blocks one behind the other in a segment that nothing else shares."""
        address = self._segment(reserved_bytes)
        for part in parts:
            self._allocate(part, _Block(address, part.nbytes, part.kind, [self._frame(part.label, self.title, 0)]))
            address += part.nbytes

    def _segment(self, nbytes: int) -> int:
        address = self._next_address
        self._next_address += -(-nbytes // _SPACING) * _SPACING
        self.segments[address] = nbytes
        self._event("segment_alloc", _Block(address, nbytes, "unknown", []))
        return address

    def _take(self, taken: Allocation, frames: Frames) -> None:
        if not taken.nbytes:
            return
        if self.pool is None:
            self._allocate(taken, _Block(self._segment(taken.nbytes), taken.nbytes, taken.kind, frames))
            return
        before = self.pool.reserved_bytes
        handle = self.pool.alloc(taken.nbytes)
        address, grown = _POOL + self.pool.address(handle), self.pool.reserved_bytes - before
        if grown:  # a new segment, which its first block begins
            self._event("segment_alloc", _Block(address, grown, "unknown", []))
        self._allocate(taken, _Block(address, taken.nbytes, taken.kind, frames, handle))

    def _allocate(self, taken: Allocation, block: _Block) -> None:
        self.live[taken.key] = block
        self._event("alloc", block)

    def _give(self, key: int) -> None:
        block = self.live.pop(key, None)
        if block is None:  # it had no bytes
            return
        self._event("free_requested", block)
        self._event("free_completed", block)
        if self.pool is None:
            self._event("segment_free", _Block(block.address, self.segments.pop(block.address), "unknown", []))
        elif block.handle is not None:
            self.pool.free(block.handle)

    def _event(self, action: str, block: _Block) -> None:
        event = {"action": action, "addr": block.address, "size": block.nbytes, "stream": 0, "time_us": self._micros}
        self.events.append({**event, "frames": block.frames, "category": block.kind})

    # Where something comes from, as a stack of calls: the operator, then its module and those around it.

    def _frames(self, moment: Moment, label: str) -> Frames:
        if moment.step != "operator":
            return [self._frame(label, self.title, moment.position)]
        name = f"{label} {moment.target}" if moment.target else label
        return [self._frame(name, moment.path or self.title, moment.position), *self._around(moment.path)]

    def _around(self, path: str) -> Frames:
        if path not in self._modules:
            owner, _, name = path.rpartition(".")
            frame = self._frame(name, owner or self.title, 0) if path else self._frame(self.title, "vramplan", 0)
            self._modules[path] = [frame, *(self._around(owner) if path else ())]
        return self._modules[path]

    @staticmethod
    def _frame(name: str, filename: str, line: int) -> dict[str, Any]:
        return {"name": name, "filename": filename, "line": line}

    # The state after the call.

    def _segments(self) -> Iterator[dict[str, Any]]:
        blocks = sorted(self.live.values(), key=lambda block: block.address)
        for address, nbytes in sorted(self.segments.items()):
            within = [b for b in blocks if address <= b.address < address + max(nbytes, 1)]
            yield _segment_view(address, nbytes, [(b.address, b.nbytes, b) for b in within])
        if self.pool is None:
            return
        by_handle = {block.handle: block for block in blocks}
        for segment in self.pool.snapshot():
            taken = [(_POOL + b.address, b.nbytes, by_handle[b.handle]) for b in segment.blocks if b.handle is not None]
            yield _segment_view(_POOL + segment.address, segment.nbytes, taken)


def _segment_view(address: int, nbytes: int, taken: Sequence[tuple[int, int, _Block]]) -> dict[str, Any]:
    """A segment with blocks (address, bytes, what is in it) in order of address; what lies between them is free."""
    blocks: list[dict[str, Any]] = []
    cursor = address
    for at, size, block in taken:
        if at > cursor:
            blocks.append({"address": cursor, "size": at - cursor, "requested_size": 0, "state": "inactive", "frames": []})
        own = {"address": at, "size": size, "requested_size": block.nbytes, "state": "active_allocated"}
        blocks.append({**own, "frames": block.frames})
        cursor = at + size
    if cursor < address + nbytes:
        rest = address + nbytes - cursor
        blocks.append({"address": cursor, "size": rest, "requested_size": 0, "state": "inactive", "frames": []})
    allocated = sum(size for _, size, _ in taken)
    return {
        "device": 0,
        "address": address,
        "total_size": nbytes,
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": sum(block.nbytes for _, _, block in taken),
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": blocks,
    }
