"""What `print(plan)` says of a pipeline's plan: phase by phase, what runs, what it takes, what stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.show import WIDTH, wrap
from planner.show_host import shared_host_rows
from planner.sizes import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.pipeline_plan import PipelinePlan

_STAYS = {"always": "for good", "phase": "for the phase", "call": "for a call"}
_COLUMNS = "    {:<34} {:>6} {:>9} {:>9} {:>9} {:>9}  {}"


def describe_pipeline(plan: PipelinePlan) -> str:
    """The plan as text of at most 100 columns; the same plan always gives the same text."""
    ratio = plan.step_seconds / plan.bound_seconds if plan.bound_seconds else 1.0
    bound = format_seconds(plan.bound_seconds)
    between = "copies and reads in between" if plan.bound.read_bytes else "copies in between"
    limit = "the arithmetic alone" if plan.bound.seconds <= plan.bound.compute_seconds else f"arithmetic, and {between}"
    held = max(plan.held_beside(key) for key in plan.parts)
    rows = [
        ("budget", f"{format_bytes(plan.budget_bytes)} on {plan.device}, planned for {plan.machine.name}"),
        ("peak", f"{_peak(plan)} (all of it at once would take {format_bytes(plan.unplanned_bytes)})"),
        ("at", plan.peak_at),
        ("call", f"{format_seconds(plan.step_seconds)} predicted, {ratio:.2f} x the bound of {bound}"),
        ("bound", f"{limit}; what the pipeline's own Python takes is not known"),
        ("weights", f"{format_bytes(plan.weight_bytes)} in {len(_components(plan))} components"),
        ("Python", f"holds at most {format_bytes(held)} of tensors beside a call"),
    ]
    rows += [("in parts", f"{key}, whose own Python runs: {reason.splitlines()[0]}") for key, reason in plan.opaque.items()]
    rows += _host(plan)
    if plan.early:
        rows.append(("early", _early(plan)))
    lines = [f"{plan.title}: {len(plan.run.steps)} calls of components, {len(plan.parts)} programs"]
    for label, text in rows:
        lines += wrap(label, text)
    for site in plan.run.asked:
        lines += wrap("doubt", f"may go another way with real values: {site}")
    lines.append(_COLUMNS.format("phase", "calls", "seconds", "bytes", "weights", "streamed", "stay").rstrip())
    for number, phase in enumerate(plan.phases):
        for place, key in enumerate(phase):
            lines.append(_row(plan, f"{number + 1 if place == 0 else '+'} {key}", key))
    return "\n".join(lines)


def _row(plan: PipelinePlan, label: str, key: str) -> str:
    part = plan.parts[key]
    numbers = [part.weight_bytes, part.streamed_bytes]
    sizes = [format_bytes(plan.bytes_at(key)), *map(format_bytes, numbers)]
    seconds = format_seconds(plan.seconds_of(key))
    return _COLUMNS.format(label[:34], plan.calls_of(key), seconds, *sizes, _STAYS[plan.stays[key]])[:WIDTH].rstrip()


def _early(plan: PipelinePlan) -> str:
    """Which weights come before their call, and what that saves."""
    each = [f"{format_bytes(plan.early_bytes(e))} of {e.of} come during {e.during}" for e in plan.early]
    return f"{', '.join(each)}, which saves {format_seconds(plan.saved_seconds)}"


def _host(plan: PipelinePlan) -> list[tuple[str, str]]:
    """A row for the host's memory, where that has a budget, and one for the disk, where some weights are there."""
    layouts = [part.layout.host for part in plan.parts.values() if part.layout.host is not None and part.layout.host.slots]
    ring = f", {format_bytes(sum(each.ring_bytes for each in layouts))} of them {len(layouts)} rings" if layouts else ""
    return shared_host_rows(plan, "run", ring)


def _peak(plan: PipelinePlan) -> str:
    if plan.reserved_bytes == plan.peak_bytes:
        return format_bytes(plan.peak_bytes)
    return f"{format_bytes(plan.peak_bytes)} allocated, {format_bytes(plan.reserved_bytes)} reserved"


def _components(plan: PipelinePlan) -> set[str]:
    return {key.partition(".")[0] for key in plan.parts}
