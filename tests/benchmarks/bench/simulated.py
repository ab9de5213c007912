"""The CUDA cases on models of machines that are not here: ours beside simulated switches; nothing runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from planner import InfeasibleBudget, Machine, PipelinePlan, Plan, plan
from planner.baselines import Baseline, baselines
from planner.pipeline_compare import pipeline_baselines
from planner.presets import Preset
from planner.sizes import format_bytes, format_seconds, parse_size
from tests.benchmarks.bench.cases import Case, sdxl_without_weights

MACHINES = ("rtx-4090", "h200")
Row = dict[str, Any]
TITLE = """\
# Side by side, simulated

Written by `python -m tests.benchmarks.bench --simulated --update`. **Nothing here was measured**: plans and switches run on
models of an RTX 4090 and an H200, in the simulator that plans are chosen by, and where it is not certain what a switch costs it
is taken to be cheap (`planner/baselines.py`). `peak`: reserved by the device's allocator. `× bound`: seconds over what nothing
in that much memory can beat. `faster`: how much faster a plan is than the best that takes no more memory. Prefix residency is a
naive planner within the least of the budgets, and no switch: nothing is compared with it. `p.compare()`
tells what a plan takes in the memory of each switch.
"""
REPEATS = {"flux": 28, "sdxl-unet": 30, "wan": 50}


def simulate(cases: Sequence[Case], out: Path) -> None:
    """Writes bench-simulated.json and .md; of cases that are not among these, what was written before stays."""
    path = out / "bench-simulated.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for case in cases:
        began = time.perf_counter()
        found[case.name] = {"title": case.title, "machines": dict(_machines(case))}
        print(f"{case.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        (out / "bench-simulated.md").write_text(markdown(found))
    print(markdown(found))


def _machines(case: Case) -> Iterator[tuple[str, list[Row]]]:
    for machine in MACHINES:
        budgets = [budget for budget in case.budgets if parse_size(budget) <= Machine.preset(machine).capacity_bytes]
        yield machine, list(rows_of(_roomy(case, machine), budgets))


def _roomy(case: Case, machine: str) -> Plan | PipelinePlan:
    """A plan for more memory than there is, to be planned again for less."""
    if case.preset is None:
        pipe, call = sdxl_without_weights()
        return plan(pipe, "1TB", call=call, machine=machine, device="cuda")
    name, sizes = case.preset
    preset = Preset.load(name)
    module, args, kwargs = preset.build(**sizes)
    repeats = REPEATS.get(case.name, 1)
    return plan(
        module, "1TB", inputs=args, kwargs=kwargs, method=preset.method, machine=machine, repeats=repeats, device="cuda"
    )


def rows_of(captured: Plan | PipelinePlan, budgets: Sequence[str]) -> Iterator[Row]:
    """Ours at every budget that is feasible, then the policies of today's switches."""
    for budget in budgets:
        try:
            p = captured.replan(budget)
        except InfeasibleBudget as error:
            yield {"method": f"`plan(..., {budget!r})`", "least_bytes": error.minimum_bytes}
            continue
        yield {
            "method": f"`plan(..., {budget!r})`", "budget_bytes": p.budget_bytes, "peak_bytes": p.reserved_bytes,
            "seconds": p.step_seconds, "bound_seconds": p.bound_at(p.reserved_bytes).seconds,
        }  # fmt: skip
    for row in _policies(captured, parse_size(budgets[0])):
        yield {
            "method": row.policy, "peak_bytes": row.peak_bytes, "seconds": row.step_seconds, "bound_seconds": row.bound_seconds
        }  # fmt: skip


def _policies(captured: Plan | PipelinePlan, budget_bytes: int) -> Iterable[Baseline]:
    if isinstance(captured, PipelinePlan):
        return pipeline_baselines(captured)
    return baselines(captured._tilings.base, captured.target, budget_bytes)


def against_best(row: Row, rows: Sequence[Row]) -> str:
    """Of a row of ours: how many times faster it is than the best of what people use that takes no more memory."""
    own = ("prefix residency", "`plan(")
    others = [each for each in rows if "seconds" in each and not each["method"].startswith(own)]
    within = [each for each in others if each["peak_bytes"] <= row["peak_bytes"]]
    if not within:
        return ""
    best = min(within, key=lambda each: each["seconds"])
    return f"{best['seconds'] / row['seconds']:.2f} × than {best['method']}"


def markdown(found: dict[str, Any]) -> str:
    lines = [TITLE]
    for name, case in found.items():
        lines += [f"## {case['title']}, simulated", "", f"`--simulated --cases {name}`", ""]
        for machine, rows in case["machines"].items():
            lines += [f"| {machine} | peak | seconds | × bound | faster |", "|---|---:|---:|---:|---|"]
            lines += ["| " + " | ".join(_cells(row, rows)) + " |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    if "seconds" not in row:
        return [row["method"], f"does not fit: {format_bytes(row['least_bytes'])} at least", "", "", ""]
    return [
        row["method"],
        format_bytes(row["peak_bytes"]),
        format_seconds(row["seconds"]),
        f"{row['seconds'] / row['bound_seconds']:.2f}",
        against_best(row, rows) if "budget_bytes" in row else "",
    ]
