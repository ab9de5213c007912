"""`vramplan run`: builds a plan, calls it with random inputs and puts what was measured beside what was predicted."""

from __future__ import annotations

import dataclasses
import os
import time
from argparse import Namespace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from planner.cli.commands import Answer, make_plan, plan_data, target_of
from planner.cli.random_weights import RandomWeights
from planner.cli.targets import Target
from planner.plan import Plan
from planner.sizes import format_bytes, format_seconds
from runtime.errors import PlannerError
from runtime.report import Report
from runtime.write_file import check_folder

_MEASURED = (
    "device", "calls", "peak_bytes", "reserved_bytes", "step_seconds", "copied_bytes", "copy_seconds", "link_fraction",
    "host_bytes",
)  # fmt: skip


def run(arguments: Namespace) -> Answer:
    """Plans, builds, calls and measures.

    Raises:
        PlannerError: the weights do not fit host memory, or the device is not here; and as `plan()`.
    """
    if arguments.calls < 1:
        raise PlannerError(f"--calls {arguments.calls}: at least one call is needed to measure anything; write --calls 2")
    if arguments.trace:
        check_folder(arguments.trace, "the trace")
    target = target_of(arguments)
    origin = "checkpoint" if target.load is not None else "random" if lacks_weights(target.module) else "factory"
    if origin != "checkpoint":
        require_host_memory(target)
    p = make_plan(target, arguments)
    if origin == "checkpoint" and p.device != "cpu":  # where it stays on disk
        require_host_memory(target)
    weights = target.load() if target.load is not None else RandomWeights(target.module) if origin == "random" else None
    m = p.build(weights=weights)
    try:
        seconds = _call(p, m, target, arguments.calls)
        report = p.report()
        if arguments.trace:
            p.save_trace(arguments.trace, measured=True)
    finally:
        p.restore()
    measured = {name: value for name, value in dataclasses.asdict(report).items() if name in _MEASURED}
    data = {"plan": plan_data(target, p), "weights": origin, "call_seconds": seconds, "measured": measured}
    if arguments.trace:
        data["file"] = arguments.trace
    return Answer(_text(p, report, origin), data)


def require_host_memory(target: Target, available_bytes: int | None = None) -> None:
    """Raises PlannerError where the host cannot hold the module's weights once."""
    tensors = {id(t): t for t in (*target.module.parameters(), *target.module.buffers())}.values()
    missing = sum(t.numel() * t.dtype.itemsize for t in tensors if t.is_meta)
    available = host_bytes_available() if available_bytes is None else available_bytes
    if missing > available:
        raise PlannerError(
            f"the weights of {target.name} take {format_bytes(missing)} of host memory, and {format_bytes(available)} "
            f"are free; `vramplan plan {target.name}` needs no weights, or give a smaller dtype: --dtype bfloat16"
        )


def host_bytes_available() -> int:
    """What Linux can give without swapping; elsewhere the free pages."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def lacks_weights(module: nn.Module) -> bool:
    """Whether a module is on the meta device."""
    return any(parameter.is_meta for parameter in module.parameters())


def _call(p: Plan, m: Any, target: Target, calls: int) -> list[float]:
    device = "cpu" if p.device == "accounting" else p.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        args, kwargs = target.concrete()
    args, kwargs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        getattr(m, target.method)(*args, **kwargs)
        if p.device.startswith("cuda"):
            torch.cuda.synchronize(p.device)
        seconds.append(time.perf_counter() - started)
    return seconds


def _text(p: Plan, report: Report, origin: str) -> str:
    def size(n: int | None) -> str:
        return "-" if n is None else f"{n:,} B"

    rows = [
        ("", "predicted", "measured"),
        ("peak", size(p.peak_bytes), size(report.peak_bytes)),
        ("reserved", size(p.reserved_bytes), size(report.reserved_bytes)),
        ("step", format_seconds(p.step_seconds), format_seconds(report.step_seconds)),
        ("copied", size(p.streamed_bytes + p.band_bytes), size(report.copied_bytes)),
    ]
    lines = [
        f"{p.title} on {report.device}, planned for {p.machine.name}: call {report.calls}, {origin} weights",
        f"  budget    {format_bytes(p.budget_bytes)}",
        *(f"  {name:<9} {predicted:>20}  {measured:>20}".rstrip() for name, predicted, measured in rows),
    ]
    return "\n".join(lines)
