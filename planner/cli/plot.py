"""`vramplan plot`: a plan as a picture; as a trace and as an allocation history too, where they are asked for."""

from __future__ import annotations

from argparse import Namespace

from planner.cli.commands import Answer, make_plan, plan_data, target_of
from planner.plot import suffix_of
from planner.sizes import format_bytes
from runtime.write_file import check_folder


def plot(arguments: Namespace) -> Answer:
    """Plans and draws; what cannot be written is said before anything is planned.

    Raises:
        PlannerError: no such folder or kind of picture, or the plan is one in parts; and as `plan()`.
    """
    suffix_of(arguments.output)
    wanted = {"the plot": arguments.output, "the trace": arguments.trace, "the memory history": arguments.history}
    files = {what: path for what, path in wanted.items() if path}
    for what, path in files.items():
        check_folder(path, what)
    target = target_of(arguments)
    p = make_plan(target, arguments)
    p.plot(arguments.output)
    if arguments.trace:
        p.save_trace(arguments.trace)
    if arguments.history:
        p.save_memory_history(arguments.history)
    peak = f"{p.title}: {format_bytes(p.peak_bytes)} of {format_bytes(p.budget_bytes)} at {p.peak_at}"
    lines = [peak, *(f"{what} is in {path}" for what, path in files.items())]
    return Answer("\n".join(lines), {**plan_data(target, p), "file": arguments.output, "files": list(files.values())})
