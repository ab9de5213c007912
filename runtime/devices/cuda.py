"""The `cuda` device: a copy stream, events both ways, page-locked host memory, a cap on the caching allocator."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from runtime.devices.base import Copied, Measurement
from runtime.devices.copy_thread import CopyThread, Issued
from runtime.devices.cuda_pool import PoolSegments, TorchCache
from runtime.devices.event_log import EventLog
from runtime.devices.feeder import Fed
from runtime.executable import Executable
from runtime.homes import Home, MemoryHome
from runtime.host_memory import LockedBytes
from runtime.tables import Table
from runtime.weight_file import FileRange, Source

RING_BYTES = 64 * 1024 * 1024
# What the planner assumes a convolution plan may take at most (passes/workspace.py); read by cuDNN when it is first used.
_CONV_CAP_MIB = "64"


class CudaDevice:
    """Compute runs on the caller's current stream; copies on a stream of our own."""

    kind = "cuda"
    # The ring is used by the thread that looks rows up and by the one that issues copies.
    _ring_lock = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        os.environ.setdefault("CUDNN_CONV_WSCAP_DBG", _CONV_CAP_MIB)
        self.torch_device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._copies = torch.cuda.Stream(self.torch_device)
        self._saves = torch.cuda.Stream(self.torch_device)  # both directions of the link at once
        self._thread = CopyThread()
        self._pinned: set[int] = set()
        self._locked = LockedBytes()
        self._ring: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._ring_next = 0
        self._done: torch.cuda.Event | None = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._times: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._copied_bytes = self._read_bytes = 0
        self._log = EventLog()
        self._baseline_bytes = 0
        self._reserved_baseline = 0
        self._enforced = False
        self._pools = PoolSegments(TorchCache(self.torch_device))
        self._calling = False

    def allocate(self, nbytes: int) -> torch.Tensor:
        if not self._calling:
            self._pools.release()  # arenas stay, and lie in segments of their own
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def pin(self, buffer: torch.Tensor) -> bool:
        if buffer.numel() == 0:
            return True
        code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
        if int(code) != 0:
            return False
        self._pinned.add(buffer.data_ptr())
        self._locked.lock(buffer)
        return True

    def unpin(self, buffer: torch.Tensor) -> None:
        if buffer.data_ptr() in self._pinned:
            torch.cuda.synchronize(self.torch_device)
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
            self._pinned.discard(buffer.data_ptr())
            self._locked.unlock(buffer)

    def home(self) -> Home:
        return MemoryHome()

    def copy(self, pairs: Sequence[tuple[torch.Tensor, Copied]], after: list[Any], bundle: int | None = None) -> Any:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        issue = functools.partial(self._issue, pairs, after, bundle, begin, end, self._log)
        self._spans.append((begin, end))
        if bundle is not None:
            self._log.copies.append((bundle, sum(source.numel() for _, source in pairs), after[-1], begin, end))
        if self._thread.busy or any(isinstance(source, Fed) for _, source in pairs):
            return self._thread.put(issue)  # in order, as the simulator has them
        return issue()

    def _issue(
        self,
        pairs: Sequence[tuple[torch.Tensor, Copied]],
        after: list[Any],
        bundle: int | None,
        begin: torch.cuda.Event,
        end: torch.cuda.Event,
        call: EventLog,
    ) -> torch.cuda.Event:
        """Issues a copy on the copy stream; what is read from disk when it is there."""
        first = pairs[0][1] if pairs else None
        if isinstance(first, Fed):
            self._take(first, bundle, call)  # so that the copy begins when it does
        for event in after:
            self._copies.wait_event(event)
        with torch.cuda.device(self.torch_device), torch.cuda.stream(self._copies):
            begin.record(self._copies)
            for target, source in pairs:
                self._copied_bytes += source.numel()
                if isinstance(source, Fed):
                    target.copy_(self._take(source, bundle, call), non_blocking=True)
                    self._read_bytes += source.numel()
                    sent = torch.cuda.Event()
                    sent.record(self._copies)
                    source.give_back(sent)
                elif isinstance(source, torch.Tensor) and source.is_pinned():
                    target.copy_(source, non_blocking=True)
                else:
                    self._copy_through_ring(target, source)
            end.record(self._copies)
        return end

    @staticmethod
    def _take(source: Fed, bundle: int | None, call: EventLog) -> torch.Tensor:
        started = time.perf_counter()
        slot = source.take()
        if bundle is not None:
            call.note_read(bundle, time.perf_counter() - started)
        return slot

    def _copy_through_ring(self, target: torch.Tensor, source: Source) -> None:
        """Through two page-locked slots: the host fills one while the other is on its way."""
        for start in range(0, source.numel(), self._slot_bytes):
            with self._ring_lock:
                nbytes = min(self._slot_bytes, source.numel() - start)
                slot, sent = self._next_slot()
                if isinstance(source, FileRange):
                    source.file.read_into(memoryview(slot[:nbytes].numpy()), source.offset + start)  # type: ignore[arg-type]
                    self._read_bytes += nbytes
                else:
                    slot[:nbytes].copy_(source[start : start + nbytes])
                target[start : start + nbytes].copy_(slot[:nbytes], non_blocking=True)
                sent.record(self._copies)

    def bounce(self, slots: list[torch.Tensor]) -> None:
        if slots and [id(slot) for slot, _ in self._ring] == [id(slot) for slot in slots]:
            return
        torch.cuda.synchronize(self.torch_device)
        self._ring, self._ring_next = [(slot, torch.cuda.Event()) for slot in slots], 0

    @property
    def _slot_bytes(self) -> int:
        return self._ring[0][0].numel() if self._ring else RING_BYTES // 2

    def _next_slot(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        """A page-locked slot whose last copy is through, and the event to record behind the next."""
        if not self._ring:
            for _ in range(2):
                slot = torch.empty(RING_BYTES // 2, dtype=torch.uint8, pin_memory=True)
                self._ring.append((slot, torch.cuda.Event()))
        slot, sent = self._ring[self._ring_next]
        self._ring_next = 1 - self._ring_next
        sent.synchronize()
        return slot, sent

    def look_up(self, table: Table, indices: torch.Tensor, result: torch.Tensor) -> None:
        """On the caller's stream, through the ring: `result` is that stream's. The host waits for the indices."""
        stream = torch.cuda.current_stream(self.torch_device)
        positions = table.positions(indices.to("cpu"))
        row_bytes = table.view.row_bytes
        if row_bytes == 0 or positions.size == 0:
            return
        target = result.view(-1).view(torch.uint8)
        rows = max(1, self._slot_bytes // row_bytes)
        for first in range(0, positions.size, rows):
            piece = positions[first : first + rows]
            nbytes = piece.size * row_bytes
            with self._ring_lock:
                slot, sent = self._next_slot()
                if nbytes > slot.numel():  # a single row that is larger than a slot
                    slot = torch.empty(nbytes, dtype=torch.uint8)
                table.read(piece, slot[:nbytes])
                target[first * row_bytes : first * row_bytes + nbytes].copy_(slot[:nbytes], non_blocking=True)
                sent.record(stream)

    def save(self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        self._saves.wait_event(after)
        end = torch.cuda.Event()
        with torch.cuda.stream(self._saves):
            target.copy_(source, non_blocking=True)
            end.record(self._saves)
        return end

    def bands(self, *, begin: bool) -> None:
        return None

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def evict(self, buffer: torch.Tensor, bundle: int | None = None) -> None:
        if bundle is not None:
            self._log.evictions.append((bundle, self.mark()))

    def wait(self, event: Any, bundle: int | None = None) -> None:
        reached = self.mark() if bundle is not None else None
        event = event.event() if isinstance(event, Issued) else event
        torch.cuda.current_stream(self.torch_device).wait_event(event)
        if bundle is not None:
            self._log.waits.append((bundle, reached, self.mark()))

    def settle(self, event: Any, bundle: int | None = None) -> None:
        event = event.settled() if isinstance(event, Issued) else event
        if event is not None:
            self.wait(event)

    def loaded(self, program: object) -> None:
        return None

    def turn(self, program: Executable | None) -> None:
        return None

    def skip(self, bundle: int) -> None:
        return None

    def reserve(self, *sizes: int) -> None:
        self._pools.make(*sizes)

    @contextlib.contextmanager
    def call(self, inputs: list[torch.Tensor], arenas: list[torch.Tensor]) -> Iterator[None]:
        del arenas  # bundles that came over the seam go with their eviction
        stream = torch.cuda.current_stream(self.torch_device)
        if self._done is not None:
            stream.wait_event(self._done)  # the last call may have run on another stream
        self._copies.wait_stream(stream)  # no copy before the last call's readers are through (I4)
        self._pools.renew()  # before the peaks are reset: it is allocated for a moment
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        self._spans, self._copied_bytes, self._read_bytes, self._log = [], 0, 0, EventLog()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        self._calling = True
        try:
            with torch.cuda.device(self.torch_device):
                yield
        except BaseException:
            self._thread.settle()
            self._saves.synchronize()
            self._copies.synchronize()  # copies under way must not land in memory that is about to be given back
            raise
        finally:
            self._calling = False
            end.record(stream)
            self._done = end
            self._times = (begin, end)

    def measurement(self) -> Measurement | None:
        if self._times is None:
            return None
        self._thread.settle()  # what it records is part of the call
        torch.cuda.synchronize(self.torch_device)
        copy_seconds = sum(a.elapsed_time(b) for a, b in self._spans) / 1e3
        seconds = self._times[0].elapsed_time(self._times[1]) / 1e3
        return Measurement(
            torch.cuda.max_memory_allocated(self.torch_device) - self._baseline_bytes,
            torch.cuda.max_memory_reserved(self.torch_device) - self._reserved_baseline,
            seconds,
            self._copied_bytes,
            copy_seconds,
            self._log.timeline(self._times[0], seconds),
            self._locked.peak_bytes,
            self._read_bytes,
        )

    def enforce(self, budget_bytes: int) -> None:
        """Caps what this process's allocator may reserve: what others in it hold now, plus the budget."""
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()
        self._baseline_bytes = torch.cuda.memory_allocated(self.torch_device)
        self._reserved_baseline = torch.cuda.memory_reserved(self.torch_device)
        self.lower(budget_bytes)

    def lower(self, budget_bytes: int) -> None:
        total = torch.cuda.get_device_properties(self.torch_device).total_memory
        self._pools.limit_bytes = self._reserved_baseline + budget_bytes
        torch.cuda.set_per_process_memory_fraction(share_of(self._pools.limit_bytes, total), self.torch_device)
        self._enforced = True

    def free_bytes(self, input_bytes: int) -> int | None:
        torch.cuda.synchronize(self.torch_device)
        self._pools.make()
        torch.cuda.empty_cache()
        free = int(torch.cuda.mem_get_info(self.torch_device)[0])
        if self._pools.limit_bytes is not None:
            free = min(free, self._pools.limit_bytes - torch.cuda.memory_reserved(self.torch_device))
        return free + input_bytes

    def close(self) -> None:
        self._thread.close()
        torch.cuda.synchronize(self.torch_device)
        if self._enforced:
            torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)
            self._enforced = False
        self._pools.limit_bytes = None
        self._pools.make()
        self._ring.clear()
        torch.cuda.empty_cache()


def share_of(nbytes: int, total_bytes: int) -> float:
    """The least fraction of which the allocator, which multiplies it by `total_bytes` and rounds down, makes `nbytes`."""
    return min(1.0, math.nextafter(nbytes / total_bytes, math.inf))
