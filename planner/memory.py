"""How a device's memory rounds: the declared memory model over which a plan's budget is proved (I1)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from passes.cuda_allocator import CachingAllocator, round_bytes, segment_bytes
from passes.workspace import cublas_workspace_bytes
from runtime.layout import align

# An event of the activation allocator: (+key, bytes) makes a storage, (-key, 0) ends it; keys are positive.
AllocationEvent = tuple[int, int]


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

    def reserved_bytes(self, events: Iterable[AllocationEvent]) -> int:
        """What the allocator reserves at most while it serves the events: on CUDA segments, elsewhere the live peak."""
        if self.device == "cuda":
            allocator = CachingAllocator()
            handles: dict[int, int] = {}
            for key, nbytes in events:
                if key > 0:
                    handles[key] = allocator.alloc(nbytes)
                else:
                    allocator.free(handles.pop(-key))
            return allocator.peak_reserved_bytes
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
