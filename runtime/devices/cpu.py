"""The `cpu` device: the budget is RAM and the home of weights is disk. Threads read them into the arenas ahead of use.

Operators run in the calling thread, one after the other, so that a buffer is free for the next copy as soon as `evict` returns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from runtime.allocations import AllocationTrace
from runtime.devices.base import Measurement
from runtime.devices.readers import Arrival, Readers
from runtime.homes import DiskHome, Home
from runtime.weight_file import Source


class CpuDevice:
    """See the module.

    `peak_bytes` is what PyTorch's C++ allocator says of a call, with arenas and inputs. Asking it slows a call down, so it is
    asked in the first call of each program; in every one with `measure_every_call`.
    """

    kind = "cpu"

    def __init__(self, disk_bytes: int | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.measure_every_call = False
        self._disk_bytes = disk_bytes
        self._readers = Readers()
        self._program: object = None
        self._peaks: dict[int, tuple[object, int]] = {}  # by identity of the program, which the entry keeps alive
        self._last: Measurement | None = None
        self._copied_bytes = 0

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, buffer: torch.Tensor) -> bool:
        return True  # nothing to lock: files are read straight into the arenas

    def unpin(self, buffer: torch.Tensor) -> None:
        return None

    def home(self) -> Home:
        return DiskHome(self._disk_bytes)

    def copy(self, pairs: list[tuple[torch.Tensor, Source]], after: list[Any]) -> Arrival:
        self._copied_bytes += sum(source.numel() for _, source in pairs)
        return self._readers.copy(pairs)

    def allocated(self) -> None:
        return None

    def evict(self, buffer: torch.Tensor) -> None:
        return None  # compute is synchronous: its readers are through

    def wait(self, event: Any) -> None:
        event.wait()

    def loaded(self, program: object) -> None:
        self._program = program

    @contextlib.contextmanager
    def call(self, inputs: list[torch.Tensor], arenas: list[torch.Tensor]) -> Iterator[None]:
        self._copied_bytes, busy, started = 0, self._readers.busy_seconds(), time.perf_counter()
        fixed = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*inputs, *arenas)}
        wanted = self.measure_every_call or id(self._program) not in self._peaks
        trace = AllocationTrace() if wanted and AllocationTrace.possible() else None
        try:
            with trace or contextlib.nullcontext():
                yield
        finally:
            self._readers.drain()  # after a crash no read may land in memory that is given back
        seconds = time.perf_counter() - started
        if trace is not None:
            self._peaks[id(self._program)] = self._program, sum(fixed.values()) + trace.peak_bytes
        if id(self._program) in self._peaks:
            busy = self._readers.busy_seconds() - busy
            _, peak = self._peaks[id(self._program)]
            self._last = Measurement(peak, None, seconds, self._copied_bytes, busy or None)

    def measurement(self) -> Measurement | None:
        return self._last

    def enforce(self, budget_bytes: int) -> None:
        return None

    def close(self) -> None:
        self._readers.close()
