"""What `print(plan)` says of a plan in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.names import Names
from planner.show import WIDTH, measured_times, ratio, wrap
from planner.show_host import shared_host_rows
from planner.sizes import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.parted import PartedPlan

MAX_ROWS = 14


def describe_parts(plan: PartedPlan) -> str:
    """The plan as text of at most 100 columns; the same plan always gives the same text."""
    found = plan.exploration
    paths = "its only path" if found.paths == 1 else f"{found.paths} paths" + ("" if found.complete else ", not all there are")
    python = f"holds tensors of at most {format_bytes(max(found.python.values()))} between parts"
    python += f", in {found.python_at}" if found.python_at else ""
    rows = [
        ("budget", f"{format_bytes(plan.budget_bytes)} on {plan.device}, planned for {plan.machine.name}"),
        ("peak", f"{format_bytes(plan.peak_bytes)} (the least possible budget is {format_bytes(plan.minimum_bytes)})"),
        ("at", plan.peak_at),
        ("step", f"{format_seconds(plan.step_seconds)} predicted besides its Python, {ratio(plan)}"),
        *_more(plan),
        ("Python", f"{python}; found on fakes, along {paths}"),
        ("because", found.reasons[""]),
    ]
    if plan.profiled is not None:
        rows.append(("times", measured_times(plan.profiled)))
    if plan.validation is not None:
        rows.append(("validated", str(plan.validation)))
    lines = [f"{plan.title}: its Python runs as it is, {len(plan.parts)} calls in it as programs"]
    for label, text in rows:
        lines += wrap(label, text)
    lines.append("  parts")
    lines += _parts(plan)
    if len(found.reasons) > 1:
        lines.append("  opaque besides")
        lines += _opaque(plan)
    return "\n".join(lines)


def _more(plan: PartedPlan) -> list[tuple[str, str]]:
    """What another GB would buy; or, where the host's memory has a budget, what it holds and what comes from disk."""
    rows = [] if plan.spills else [("1 GB more", plan.gap.describe_more())]
    return [*rows, *shared_host_rows(plan, "call")]


def _parts(plan: PartedPlan) -> list[str]:
    rows: dict[str, list[str]] = {}
    for key, part in plan.parts.items():
        family = _family(key.partition("#")[0])
        how = "kept" if key in plan.kept and not part.layout.streamed_bytes else "streamed"
        rows.setdefault(f"{family}|{how}", []).append(key)
    lines = []
    for row, keys in rows.items():
        family, _, how = row.partition("|")
        nbytes = sum(w.nbytes for k in keys for w in plan.parts[k].program.weights.values())
        calls = sum(plan.exploration.calls[k] for k in keys)
        lines.append(f"    {family[:48]:<48}  {calls:>4} calls  {format_bytes(nbytes):>8}  {how}"[:WIDTH])
    return _shortened(lines)


def _opaque(plan: PartedPlan) -> list[str]:
    names = Names(plan.target)
    rows: dict[tuple[str, str], int] = {}
    for path, reason in plan.exploration.reasons.items():
        if path and not reason.startswith("it runs within"):
            nbytes = sum(map(names.nbytes, plan.exploration.weights.get(path, ())))
            row = _family(path), reason
            rows[row] = rows.get(row, 0) + nbytes
    return _shortened([f"    {path[:40]:<40}  {format_bytes(n):>8}  {reason}"[:WIDTH] for (path, reason), n in rows.items()])


def _family(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - MAX_ROWS
    return lines if more <= 0 else [*lines[:MAX_ROWS], f"    ... and {more} more"]
