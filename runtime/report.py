"""What was measured of the last call of a planned module."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import PlannerError
from runtime.timeline import Timeline
from runtime.trace import measured_events, write_trace


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
        copied_bytes: of weights, host to device in the last call; rows of tables that are looked up are not counted.
        copy_seconds: time the copy engine was busy, or None where the device cannot tell.
        link_fraction: achieved share of the machine's link bandwidth while copying, or None; above 1 on `cpu` where the system
            has the file in memory.
        host_bytes: where the weights live, each once: the host arena; on `cpu` the bytes of the scratch file on disk.
        host_pinned: whether they are page-locked; True on `cpu` and `accounting`, where there is nothing to lock.
        timeline: copies, waits and evictions of the last call by the device's clock (on `accounting` a virtual one); None where
            nothing was recorded.
        locked_bytes: most that was page-locked on the host so far (on `accounting`: would have been), in whole pages: weights,
            the ring, values that live there; 0 on `cpu`.
        read_bytes: of weights, from disk in the last call: into the ring, and before programs of a pipeline.
        bundles: the names of the weights in every bundle of the timeline; empty where several programs served the call.
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
    timeline: Timeline | None = field(default=None, repr=False)
    bundles: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    locked_bytes: int = 0
    read_bytes: int = 0

    def save_trace(self, path: str | Path) -> None:
        """Writes the measured timeline as a trace for chrome://tracing or ui.perfetto.dev; `p.save_trace` writes the predicted.

        Lanes, names and units are those of `p.save_trace`, and `p.save_trace(path, measured=True)` puts both into one file.

        Raises:
            PlannerError: there is no timeline, or the file cannot be written.
        """
        about = {"device": self.device, "budget_bytes": self.budget_bytes, "peak_bytes": self.peak_bytes}
        about |= {"step_seconds": self.step_seconds, "copied_bytes": self.copied_bytes}
        write_trace(path, measured_events(self.measured_timeline, self.bundles), about)

    @property
    def disk_stall_seconds(self) -> float:
        """How long compute waited in the last call for copies that waited for the disk, by the device's clock."""
        return 0.0 if self.timeline is None else self.timeline.disk_stall_seconds

    @property
    def measured_timeline(self) -> Timeline:
        """The timeline.

        Raises:
            PlannerError: there is none.
        """
        if self.timeline is None:
            raise PlannerError(
                f"the last call on {self.device} has no timeline: one call of one program has, not what ran in parts; "
                "p.parts[name].save_trace(path) writes what is predicted of a part"
            )
        return self.timeline
