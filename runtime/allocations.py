"""What PyTorch's C++ allocator for CPU memory did while a piece of code ran: the counter behind I7 on `cpu`, and calibration.

The allocator reports to the profiler of the calling thread. The legacy profiler is asked, and not Kineto, which writes lines to
stderr for every trace and costs more. What a kernel allocates inside its worker threads is not reported by either; nor is what
libraries allocate past the allocator (MKL's packing buffers, compiled oneDNN kernels).
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig, _RecordFunctionFast

_autograd: Any = torch._C._autograd
_thread = threading.local()  # `traces`: whether one of ours is active


class AllocationTrace:
    """Within it, the allocations of this thread: `peak_bytes` and `end_bytes`, of what was allocated since it was entered.

    Memory that was there before and is freed within it does not count, unless it is as large as something that is here: the
    allocator reports its death where an earlier trace saw something at the same address, and says no more than its size.
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
        # Only allocations. A record of every operator is small, lives as long as the trace, and each lies in a hole of the heap
        # in which an activation of the same size as the last one no longer fits: the process grew by hundreds of megabytes.
        _autograd._enable_record_function(False)
        _thread.traces = True
        return self

    def __exit__(self, *_: object) -> None:
        _thread.traces = False
        _autograd._enable_record_function(True)
        if self._collects:
            gc.enable()
        self.events = of_its_own(_bytes_of(event) for thread in _autograd._disable_profiler_legacy() for event in thread)
        live = 0
        for nbytes in self.events:
            live += nbytes
            self.peak_bytes = max(self.peak_bytes, live)
        self.end_bytes = live


def of_its_own(events: Iterable[int]) -> list[int]:
    """Allocations (positive, in bytes) and deaths (negative) in order, without deaths of a size that nothing here has."""
    there, own = Counter[int](), list[int]()
    for nbytes in events:
        if nbytes > 0 or there[-nbytes]:
            there[abs(nbytes)] += 1 if nbytes > 0 else -1
            own.append(nbytes)
    return own


_NOTE = "vramplan bytes "


def note(nbytes: int) -> None:
    """Tells the trace that is active in this thread, if one is, of memory that comes from (or, negative, goes) elsewhere."""
    if not getattr(_thread, "traces", False):
        return
    _autograd._enable_record_function(True)
    with _RecordFunctionFast(f"{_NOTE}{nbytes}"):
        pass
    _autograd._enable_record_function(False)


def _bytes_of(event: Any) -> int:
    if event.kind() == "memory_alloc":
        return int(event.cpu_memory_usage())
    noted = event.kind() == "push" and event.name().startswith(_NOTE)
    return int(event.name().removeprefix(_NOTE)) if noted else 0
