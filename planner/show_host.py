"""What `print(plan)` says of the host's memory, where that has a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.check_host import check_host
from planner.sizes import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.generation import GenerationPlan
    from planner.parted import PartedPlan
    from planner.pipeline_plan import PipelinePlan
    from planner.plan import Plan


def host_rows(plan: Plan) -> list[tuple[str, str]]:
    """A row for the host, and one for the disk, where weights are there."""
    host = plan.layout.host
    if host is None:
        return []
    ring = f", {format_bytes(host.ring_bytes)} of them a ring of {host.slots} slots" if host.slots else ""
    rows = [("host", f"{format_bytes(host.budget_bytes)}, of which {format_bytes(check_host(plan.emitted))} are taken{ring}")]
    homes = plan.homes
    if not host.reads and not (homes is not None and homes.scratch_bytes):
        return rows
    said = []
    if host.reads:
        said.append(f"{format_bytes(host.read_bytes)} read per step in {len(host.reads)} reads{_waits(plan)}")
    if homes is not None and homes.scratch_bytes:
        said.append(f"{format_bytes(homes.scratch_bytes)} written by build()")
    return [*rows, ("disk", "; ".join(said))]


def shared_host_rows(plan: GenerationPlan | PartedPlan | PipelinePlan, per: str, ring: str = "") -> list[tuple[str, str]]:
    """A row for what several programs take of the host together, where that has a budget; one for the disk, as `host_rows`.

    `per`: what is read once "in a ...". `ring`: what is to be said of rings.
    """
    host = plan.budget.host_bytes
    if plan.locked_bytes is None or host is None:
        return []
    rows = [("host", f"{format_bytes(host)}, of which {format_bytes(plan.locked_bytes)} are taken{ring}")]
    if plan.spills:
        written = f"; {format_bytes(plan.written_bytes)} written by build()" if plan.written_bytes else ""
        rows.append(("disk", f"{format_bytes(plan.read_bytes)} read in a {per}{written}"))
    return rows


def disk_rows(phase: Plan, loaded_bytes: int) -> list[tuple[str, str]]:
    """A row for one of several programs, where it reads anything: before its calls, `loaded_bytes`, and in each of them."""
    host, disk = phase.layout.host, phase.machine.disk_bandwidth
    said = []
    if loaded_bytes:
        said.append(f"{format_bytes(loaded_bytes)} read before it in {format_seconds(loaded_bytes / disk)}")
    if host is not None and host.reads:
        nbytes, seconds = format_bytes(host.read_bytes), format_seconds(host.read_bytes / disk)
        said.append(f"{nbytes} read per step in {seconds}{_waits(phase)}")
    return [("disk", "; ".join(said))] if said else []


def _waits(plan: Plan) -> str:
    waits = plan.timeline.disk_stall_seconds
    return f", compute waits {format_seconds(waits)}" if waits else ", ahead of use"
