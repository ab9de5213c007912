"""What was measured of the last call of a planned module."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Measured on the device by counters of its own (I7); field names are the plan's.

    Attributes:
        device: where it ran.
        calls: calls so far, of all programs of the module.
        peak_bytes: most bytes that the last call had on the device, arenas and inputs included; on `cpu` the first call of its
            program, because counting slows a call down.
        predicted_peak_bytes: what the plan said.
        budget_bytes: what the user said.
        predicted_reserved_bytes: likewise.
        reserved_bytes: most that the allocator held, or None where there is none.
        step_seconds: wall time of the last call.
        copied_bytes: host to device in the last call.
        copy_seconds: time the copy engine was busy, or None where the device cannot tell.
        link_fraction: achieved share of the machine's link bandwidth while copying, or None; above 1 on `cpu` where the system
            has the file in memory.
        host_bytes: where the weights live, each once: the host arena; on `cpu` the bytes of the scratch file on disk.
        host_pinned: whether they are page-locked; True on `cpu` and `accounting`, where there is nothing to lock.
    """

    device: str
    calls: int
    peak_bytes: int
    predicted_peak_bytes: int
    predicted_reserved_bytes: int
    budget_bytes: int
    reserved_bytes: int | None
    step_seconds: float
    copied_bytes: int
    copy_seconds: float | None
    link_fraction: float | None
    host_bytes: int
    host_pinned: bool
