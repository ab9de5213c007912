"""What the executor needs of a device; one implementation a file."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from runtime.devices.feeder import Fed
from runtime.executable import Executable
from runtime.homes import Home
from runtime.tables import Table
from runtime.timeline import Timeline
from runtime.weight_file import Source


@dataclass(frozen=True)
class Measurement:
    """Counters of one call, by means the planner does not share (I7).

    `peak_bytes`: most bytes live (accounting) or allocated (cuda, cpu) by the program, inputs included. `reserved_bytes`: most
    that the allocator held, where there is one. `copied_bytes` went from host to device, in `copy_seconds` of copy-engine time
    where the device can tell; rows of tables that are looked up are in neither. `seconds` are by the device's clock, which on
    `accounting` is a virtual one. `locked_bytes`: most that was page-locked on the host so far. `read_bytes` came from disk
    to be copied, rows that were looked up aside.
    """

    peak_bytes: int
    reserved_bytes: int | None
    seconds: float
    copied_bytes: int
    copy_seconds: float | None
    timeline: Timeline | None = None
    locked_bytes: int = 0
    read_bytes: int = 0


# What a copy to the device reads.
Copied = Source | Fed


class Device(Protocol):
    """A place to run. Events are opaque; compute runs on the caller's current stream, in program order."""

    kind: str
    torch_device: torch.device

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A byte buffer (uint8, 1-d) on the device, aligned for any dtype."""
        ...

    def pin(self, buffer: torch.Tensor) -> bool:
        """Page-locks a host buffer; False where that fails and copies go through a bounded ring."""
        ...

    def unpin(self, buffer: torch.Tensor) -> None: ...

    def home(self) -> Home:
        """Where the host keeps the weights: memory, or disk where memory is the device."""
        ...

    def copy(self, pairs: Sequence[tuple[torch.Tensor, Copied]], after: list[Any], bundle: int | None = None) -> Any:
        """Copies host to device on the copy engine, after the given events; returns the event of its end.

        What comes from a feeder is copied when it is read, and its slot given back.

        Where a `bundle` is named, here and below, the timeline of the call has it.
        """
        ...

    def bounce(self, slots: list[torch.Tensor]) -> None:
        """What is not page-locked passes through these slots (two, page-locked) from now on; none: through the device's own."""
        ...

    def save(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Copies device bytes to page-locked host memory, after the given event; returns the event of its end."""
        ...

    def bands(self, *, begin: bool) -> None:
        """A loop that has the link to itself begins or ends here."""
        ...

    def look_up(self, table: Table, indices: torch.Tensor, result: torch.Tensor) -> None:
        """Puts the rows at `indices` (integers on the device) into `result`, contiguous on the device, in program order.

        It waits for the indices to be computed, and takes no device memory of its own. Its bytes are no copy engine's, and not
        among the `copied_bytes` of the measurement.

        Raises:
            RowError: an index is outside of the table. StoreError: its file cannot be read.
        """
        ...

    def mark(self) -> Any:
        """The event that all compute before this point in program order has run: what it read or freed may be written."""
        ...

    def evict(self, buffer: torch.Tensor, bundle: int | None = None) -> None:
        """Says that nothing after this point in program order reads the buffer."""
        ...

    def wait(self, event: Any, bundle: int | None = None) -> None:
        """Makes compute wait for an event of the copy engine."""
        ...

    def settle(self, event: Any, bundle: int | None = None) -> None:
        """As `wait`, for a copy that nobody needs any more: it is over afterwards, however it went."""
        ...

    def loaded(self, program: object) -> None:
        """The program that the next calls run. What is measured once per program is measured in its first call."""
        ...

    def turn(self, program: Executable | None) -> None:
        """In a call that several programs serve this one runs from here on; None: what happens is between two of them."""
        ...

    def skip(self, bundle: int) -> None:
        """The program came to the prefetch of a bundle that nobody needs, which is left out."""
        ...

    def reserve(self, *sizes: int) -> None:
        """Has the allocator, where there is one, hold free segments of so many bytes, from which the next calls are served.

        To be called when the arenas of a program are allocated, and before it runs; they take the place of the pools before.
        What is allocated outside of calls lies beside them, what is allocated in them lies in them.
        """
        ...

    def call(self, inputs: list[torch.Tensor], arenas: list[torch.Tensor]) -> contextlib.AbstractContextManager[Any]:
        """Surrounds one call: orders it behind the last one, and measures."""
        ...

    def measurement(self) -> Measurement | None:
        """Of the last call; None before the first."""
        ...

    def enforce(self, budget_bytes: int) -> None:
        """Has the device's allocator refuse what passes the budget, where it can."""
        ...

    def free_bytes(self, input_bytes: int) -> int | None:
        """What a call could take now, with its inputs, which are there; None where the device cannot tell.

        To be asked when nothing of a program is loaded.
        """
        ...

    def lower(self, budget_bytes: int) -> None:
        """As `enforce`, for less than before; what others hold counts as it did then."""
        ...

    def close(self) -> None:
        """Undoes `enforce` and gives back what is cached."""
        ...


def open_device(name: str, disk_bytes: int | None = None) -> Device:
    """`accounting`, `cpu`, `cuda` or `cuda:1`; `disk_bytes` limits what the weights take where their home is disk."""
    if name == "cpu":
        from runtime.devices.cpu import CpuDevice

        return CpuDevice(disk_bytes)
    if name == "accounting":
        from runtime.devices.accounting import AccountingDevice

        return AccountingDevice()
    from runtime.devices.cuda import CudaDevice

    return CudaDevice(torch.device(name))
