"""How near to the limit plans are: full-size models, budgets and machines, predicted, and what today's switches would do.

    python -m tests.benchmarks.limits             # all of it, about six minutes of one core
    python -m tests.benchmarks.limits --only t5-xxl-encoder
    python -m tests.benchmarks.limits --update    # writes tests/benchmarks/results/limits.{md,json}

Every row is a plan that was solved, emitted, checked and simulated; nothing here is measured. `goal` is what this project asks
of itself: at most 1.05 x the physical bound wherever the linear program's bound is within 1.03 of it, and never above 1.02 x
the linear program's bound plus the copy of one bundle. `switches` is the least speed-up over any simulated policy of today's
libraries, ours planned within that policy's own peak; everything resident is none of them. `solved in`: another budget for a
program that is captured and analysed, what earlier budgets of it have found at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from planner import InfeasibleBudget, Machine, Plan, plan
from planner.presets import Preset
from planner.sizes import format_seconds, parse_size

RESULTS = Path(__file__).parent / "results"
# With how many calls follow each other: steps of a denoiser.
MODELS = {"flux1-dev": 28, "sdxl-unet": 30, "t5-xxl-encoder": 1, "wan2.1-14b": 50, "cogvideox-5b": 50}
BUDGETS = ("6GB", "8GB", "12GB", "16GB")
MACHINES = ("rtx-3060", "rtx-4090", "h200")

TITLE = """\
# How near to the limit

Written by `python -m tests.benchmarks.limits --update`. Predicted on machine models, not measured; the policies of other
libraries are simulated on the same models. See the module for what the columns mean.
"""


@dataclass(frozen=True)
class Row:
    """One plan; seconds of one call in its steady state."""

    model: str
    machine: str
    budget: str
    step_seconds: float
    physical_seconds: float
    lp_seconds: float
    bundle_seconds: float
    resource: str
    why: str
    solve_seconds: float
    least_speedup: float | None
    against: str

    @property
    def over_physical(self) -> float:
        return self.step_seconds / self.physical_seconds

    @property
    def met(self) -> bool:
        """Whether the goals of the module's docstring hold."""
        near = self.lp_seconds > 1.03 * self.physical_seconds or self.over_physical <= 1.05
        return near and self.step_seconds <= 1.02 * self.lp_seconds + self.bundle_seconds


def measure(captured: Plan, model: str, machine: str, budget: str) -> Row | None:
    """One row; None where the card is smaller than the budget or nothing fits."""
    if parse_size(budget) > Machine.preset(machine).capacity_bytes:
        return None
    begun = time.perf_counter()
    try:
        p = captured.replan(budget)
    except InfeasibleBudget:
        return None
    solved = time.perf_counter() - begun
    rows = [row for row in p.compare().rows[2:] if row.speedup is not None]  # behind ours and everything resident
    worst = min(rows, key=lambda row: row.speedup or 0.0, default=None)
    bundle = max((p.machine.copy_seconds(b.nbytes) for b in p.layout.bundles), default=0.0)
    return Row(
        model, machine, budget, p.step_seconds, p.bound_seconds, p.gap.lp_seconds, bundle, p.gap.resource, p.gap.why, solved,
        worst.speedup if worst else None, worst.policy if worst else "",
    )  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """The table, and under it why the linear program is not reached."""
    lines = [TITLE, "| model | machine | budget | step | / physical | / LP | binds | goal | switches | solved in |"]
    lines.append("|---|---|---|---:|---:|---:|---|---|---|---:|")
    reasons = []
    for row in rows:
        against = f"{row.least_speedup:.2f} x ({row.against})" if row.least_speedup else ""
        lines.append(
            f"| {row.model} | {row.machine} | {row.budget} | {format_seconds(row.step_seconds)} | {row.over_physical:.3f} | "
            f"{row.step_seconds / row.lp_seconds:.3f} | {row.resource} | {'met' if row.met else 'missed'} | {against} | "
            f"{row.solve_seconds:.2f} s |"
        )
        if row.why:
            reasons.append(f"- {row.model}, {row.machine}, {row.budget}: {row.why}")
    return "\n".join([*lines, "", "Why the bound of the linear program is not reached:", "", *reasons]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(MODELS), action="append", help="this model; may be given again")
    parser.add_argument("--update", action="store_true", help="write the results")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for model in arguments.only or MODELS:
        preset = Preset.load(model)
        module, args, kwargs = preset.build()
        roomy = plan(
            module, "1TB", inputs=args, kwargs=kwargs, method=preset.method, machine=MACHINES[0], repeats=MODELS[model]
        )
        for machine in MACHINES:
            captured = roomy.replan("1TB", machine=machine)
            for budget in BUDGETS:
                row = measure(captured, model, machine, budget)
                if row is not None:
                    rows.append(row)
                    print(
                        f"{model} {machine} {budget}: {format_seconds(row.step_seconds)}, {row.over_physical:.3f} x physical, "
                        f"{row.step_seconds / row.lp_seconds:.3f} x LP, {'met' if row.met else 'MISSED'}, {row.resource}, "
                        f"{row.least_speedup} ({row.against}), {row.solve_seconds:.2f} s",
                        flush=True,
                    )
    print(f"{sum(row.met for row in rows)} of {len(rows)} met")
    if arguments.update:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "limits.md").write_text(markdown(rows))
        (RESULTS / "limits.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
