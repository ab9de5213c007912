"""The `cpu` device: the budget is RAM and the home of weights is disk. Threads read them into the arenas ahead of use.

Operators run in the calling thread, one after the other, so that a buffer is free for the next copy as soon as `evict` returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from runtime.allocations import AllocationTrace, note
from runtime.devices.base import Copied, Measurement
from runtime.devices.call_log import CallLog
from runtime.devices.feeder import Fed
from runtime.devices.readers import Arrival, Readers
from runtime.executable import Executable
from runtime.homes import DiskHome, Home
from runtime.tables import Table

# Blocks of at least this size are maps of their own. From malloc they would be cut out of the heap (its threshold for maps
# grows up to 32 MiB), which small values then keep from shrinking: 75 MB of staged weights left 1 GB resident.
_MAPPED_BYTES = 64 * 1024
_HUGE_PAGE_BYTES = 2 * 1024 * 1024
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it


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
        self._threads = torch.get_num_threads()
        self._copied_bytes = 0
        self._log = CallLog(time.perf_counter())

    def allocate(self, nbytes: int) -> torch.Tensor:
        return _mapped(nbytes) if nbytes >= _MAPPED_BYTES else torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, buffer: torch.Tensor) -> bool:
        return True  # nothing to lock: files are read straight into the arenas

    def unpin(self, buffer: torch.Tensor) -> None:
        return None

    def home(self) -> Home:
        return DiskHome(self._disk_bytes)

    def copy(self, pairs: Sequence[tuple[torch.Tensor, Copied]], after: list[Any], bundle: int | None = None) -> Arrival:
        nbytes = sum(source.numel() for _, source in pairs)
        self._copied_bytes += nbytes
        arrival = self._readers.copy([(target, source) for target, source in pairs if not isinstance(source, Fed)])
        if bundle is not None:
            self._log.copy(bundle, nbytes, arrival)
        return arrival

    def bounce(self, slots: list[torch.Tensor]) -> None:
        return None

    def save(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> None:
        target.copy_(source)

    def bands(self, *, begin: bool) -> None:
        return None

    def look_up(self, table: Table, indices: torch.Tensor, result: torch.Tensor) -> None:
        table.read(table.positions(indices), result)

    def mark(self) -> None:
        return None  # compute is synchronous: what was issued has run

    def evict(self, buffer: torch.Tensor, bundle: int | None = None) -> None:
        if bundle is not None:
            self._log.evict(bundle)

    def wait(self, event: Any, bundle: int | None = None) -> None:
        started = time.perf_counter()
        event.wait()
        if bundle is not None:
            self._log.waited(bundle, started, event)

    def settle(self, event: Any, bundle: int | None = None) -> None:
        event.settle()

    def loaded(self, program: object) -> None:
        self._program = program
        if _trim is not None:
            _trim(0)  # what planning and building freed, malloc still has

    def turn(self, program: Executable | None) -> None:
        return None

    def skip(self, bundle: int) -> None:
        return None

    def reserve(self, *sizes: int) -> None:
        return None

    @contextlib.contextmanager
    def call(self, inputs: list[torch.Tensor], arenas: list[torch.Tensor]) -> Iterator[None]:
        self._check_threads()
        self._copied_bytes, busy, started = 0, self._readers.busy_seconds(), time.perf_counter()
        self._log = CallLog(started)
        fixed = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*inputs, *arenas)}
        del arenas  # bundles that came over the seam go with their eviction
        wanted = self.measure_every_call or id(self._program) not in self._peaks
        trace = AllocationTrace() if wanted and AllocationTrace.possible() else None
        try:
            with trace or contextlib.nullcontext():
                yield
        except BaseException:
            self._readers.drain()  # no read may land in memory that is given back
            raise
        seconds = time.perf_counter() - started
        if trace is not None:
            self._peaks[id(self._program)] = self._program, sum(fixed.values()) + trace.peak_bytes
        if id(self._program) in self._peaks:
            busy = self._readers.busy_seconds() - busy
            _, peak = self._peaks[id(self._program)]
            self._last = Measurement(peak, None, seconds, self._copied_bytes, busy or None, self._log.timeline(seconds))

    def _check_threads(self) -> None:
        threads = torch.get_num_threads()
        if threads > self._threads:
            warnings.warn(
                f"the model was built with {self._threads} threads and runs with {threads}: kernels keep scratch for each, and "
                "the peak may pass what was predicted. Call torch.set_num_threads before plan()",
                stacklevel=2,
            )
            self._threads = threads  # said once

    def measurement(self) -> Measurement | None:
        return self._last

    def enforce(self, budget_bytes: int) -> None:
        return None

    def free_bytes(self, input_bytes: int) -> int | None:
        return None  # the system gives memory that it does not have, and ends whoever uses it

    def lower(self, budget_bytes: int) -> None:
        return None

    def close(self) -> None:
        self._readers.close()


def _mapped(nbytes: int) -> torch.Tensor:
    """Bytes that go back to the system with the last tensor over them."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    note(nbytes)
    weakref.finalize(tensor.untyped_storage(), note, -nbytes).atexit = False
    return tensor
