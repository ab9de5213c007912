"""How a device's memory rounds: the declared memory model over which a plan's budget is proved (I1)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from passes.cuda_allocator import round_bytes, segment_bytes
from passes.cuda_replay import Trace
from passes.workspace import cublas_workspace_bytes
from runtime.layout import align

# An event of the activation allocator: (+key, bytes) makes a storage, (-key, 0) ends it; keys are positive.
AllocationEvent = tuple[int, int]


@dataclass(frozen=True)
class Reserved:
    """What an allocator reserves at most, and the pools that it has to be given first (`Device.reserve`); all in bytes."""

    reserved_bytes: int
    pools: tuple[int, ...] = ()


@dataclass(frozen=True)
class MemoryModel:
    """Rules of one device kind. `fixed_bytes` is taken once, whatever the plan (library workspaces)."""

    device: str
    weight_alignment: int
    activation_rounding: int
    fixed_bytes: int = 0

    @classmethod
    def of(cls, device: str, capability: tuple[int, int] | None = None) -> MemoryModel:
        """The model of `cuda`, or of `cpu` and `accounting`, where storages count as they are.

        On `cpu` that is what PyTorch's C++ allocator is asked for, the scratch of kernels included (`passes.calibrate`).
        Outside are malloc's headers, its rounding and what it holds for reuse, Python, code, and libraries' private memory.
        """
        if device == "cuda":
            return cls("cuda", 512, 512, cublas_workspace_bytes(capability or (8, 0)))
        return cls(device, 64, 1)

    def round_activation(self, nbytes: int) -> int:
        return align(nbytes, self.activation_rounding)

    def reserved_alone(self, nbytes: int) -> int:
        """What one long-lived arena of `nbytes` takes; on CUDA whole segments, which nothing else is counted on to share."""
        return segment_bytes(round_bytes(nbytes)) if self.device == "cuda" and nbytes else nbytes

    def reserve(self, events: Iterable[AllocationEvent] | Trace, limit: int | None = None) -> Reserved | None:
        """What the allocator reserves at most while it serves the events; None where that is more than `limit` bytes.

        On CUDA segments, with the pools that make them fewest; elsewhere the live peak. A limit never changes the answer, it
        only makes "no" come sooner. Where many schedules share their activations, prepare those once: `Trace.of(steps)`, and
        then `trace.holding(bundles)`.
        """
        if self.device == "cuda":
            found = (events if isinstance(events, Trace) else Trace.of([events])).best_pools(limit)
            return None if found is None else Reserved(found.reserved_bytes, found.sizes)
        if isinstance(events, Trace):
            raise TypeError(f"a Trace counts as CUDA does, in blocks of 512 B; give reserve() of {self.device!r} the events")
        peak = _live_peak(events)
        return None if limit is not None and peak > limit else Reserved(peak)

    def reserved_bytes(self, events: Iterable[AllocationEvent]) -> int:
        """What the allocator reserves at most while it serves the events, without a pool."""
        return Trace.of([events]).reserved_bytes() if self.device == "cuda" else _live_peak(events)


def _live_peak(events: Iterable[AllocationEvent]) -> int:
    live = peak = 0
    sizes: dict[int, int] = {}
    for key, nbytes in events:
        if key > 0:
            sizes[key] = nbytes
            live += nbytes
            peak = max(peak, live)
        else:
            live -= sizes.pop(-key)
    return peak
