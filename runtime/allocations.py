"""What PyTorch's C++ allocator for CPU memory did while a piece of code ran: the counter behind I7 on `cpu`, and calibration.

The allocator reports to the profiler of the calling thread. The legacy profiler is asked, and not Kineto, which writes lines to
stderr for every trace and costs more. What a kernel allocates inside its worker threads is not reported by either; nor is what
libraries allocate past the allocator (MKL's packing buffers, compiled oneDNN kernels).
"""

from __future__ import annotations

import gc
from typing import Any, Self

import torch
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

_autograd: Any = torch._C._autograd


class AllocationTrace:
    """Within it, the allocations of this thread: `peak_bytes` and `end_bytes`, of what was allocated since it was entered.

    Memory that was there before and is freed within it does not count: a trace never says less than what its own code held.
    """

    def __init__(self) -> None:
        self.peak_bytes = self.end_bytes = 0
        self.events: list[int] = []

    @staticmethod
    def possible() -> bool:
        """Whether no other profiler is active in this thread: there is one at a time."""
        return not _autograd._profiler_enabled()

    def __enter__(self) -> Self:
        # Garbage of before must not be collected within: its death would be taken off what was allocated here.
        self._collects = gc.isenabled()
        gc.disable()
        config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
        _autograd._enable_profiler_legacy(config)
        return self

    def __exit__(self, *_: object) -> None:
        if self._collects:
            gc.enable()
        for thread in _autograd._disable_profiler_legacy():
            self.events += [event.cpu_memory_usage() for event in thread if event.kind() == "memory_alloc"]
        live = 0
        for nbytes in self.events:
            live += nbytes
            self.peak_bytes = max(self.peak_bytes, live)
        self.end_bytes = live
