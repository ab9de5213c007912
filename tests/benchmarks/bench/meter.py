"""Counters of one process: resident memory, the device's allocator, bytes copied and read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.allocations import AllocationTrace
from tests.benchmarks.bench.work import Work, tensors_of


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def reset_peak_rss() -> None:
    """`VmHWM` starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def read_from_disk_bytes() -> int:
    """What this process made the kernel read from disk so far: not what came from its cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes:")).split()[1])


class Meter:
    """Measures calls on one device. On CUDA memory is counted above `baseline`, what the inputs had reserved before."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self._cuda, self._device = kind == "cuda", device
        self._baseline = (0, 0)

    def inputs_are_placed(self) -> None:
        if self._cuda:
            self._baseline = torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)

    def begin(self) -> None:
        reset_peak_rss()
        if self._cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)

    def now(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def memory(self) -> dict[str, Any]:
        """Peaks since `begin`; what a CPU's allocator had at most is known of the first call alone."""
        found: dict[str, Any] = {"rss_bytes": status_bytes("VmHWM")}
        if self._cuda:
            found["device_peak_bytes"] = torch.cuda.max_memory_allocated(self._device) - self._baseline[0]
            found["device_reserved_bytes"] = torch.cuda.max_memory_reserved(self._device) - self._baseline[1]
            found["pinned_bytes"] = _pinned_bytes()
        return found


def _pinned_bytes() -> int | None:
    """Page-locked memory that PyTorch's caching allocator holds; what is registered by hand is not in it."""
    stats = getattr(torch.cuda, "host_memory_stats", None)
    if stats is None:
        return None
    found = stats().get("allocated_bytes.peak")
    return None if found is None else int(found)


@contextlib.contextmanager
def counting_copies(found: dict[str, Any]) -> Iterator[None]:
    """Into `found`: the bytes that operators copy from the host to the device."""
    with _HostCopies() as copies:
        yield
    found["copied_bytes"] = copies.nbytes


@contextlib.contextmanager
def counting_allocations(work: Work, found: dict[str, Any]) -> Iterator[None]:
    """Into `found`: the peak of PyTorch's CPU allocator, with the weights that are in RAM before."""
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(work))
    with AllocationTrace() as trace:
        yield
    found["device_peak_bytes"] = held + trace.peak_bytes


class _HostCopies(TorchDispatchMode):
    """Bytes of tensors that operators copy from the CPU to another device."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if isinstance(out, torch.Tensor) and isinstance(source, torch.Tensor) and func in _COPIES:
            self.nbytes += source.nbytes if source.device.type == "cpu" != out.device.type else 0
        return out


_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
