"""What fits where: published models, budgets and machines. Predicted, without weights and without a GPU.

    python examples/what_fits.py            # every preset; about a quarter of an hour of one core
    python examples/what_fits.py --quick    # two small presets
    python examples/what_fits.py --output examples/what_fits.md

A cell is the predicted seconds of one call, and how many times the physical bound of that machine and budget they are; where
nothing fits, the least budget that would. Each model is captured once.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from planner import InfeasibleBudget, Machine, Plan, plan
from planner.presets import Preset
from planner.sizes import format_bytes, format_seconds, parse_size

MACHINES = ("rtx-3060", "rtx-4060-ti", "rtx-4070", "rtx-4090")
BUDGETS = ("6GB", "8GB", "12GB", "16GB", "24GB")
QUICK = ("clip-l-text", "sd-vae-decoder")


TITLE = """\
# What fits where

Written by `python examples/what_fits.py --output examples/what_fits.md`: predicted for the machine models of
`vramplan machines`, not measured. A cell is the seconds of one call (one step of a denoiser) and how many times the physical
bound of that machine and budget they are; `needs` says the least budget, where none of this size fits; `-` is more than the
card has."""


def main() -> None:
    parser = argparse.ArgumentParser(description="predicted step seconds, by model, machine and budget")
    parser.add_argument("--quick", action="store_true", help="two small presets, two machines")
    parser.add_argument("--output", type=Path, help="write the table there too, as Markdown")
    arguments = parser.parse_args()
    presets, machines = (QUICK, MACHINES[-2:]) if arguments.quick else (Preset.names(), MACHINES)
    lines = [f"| model and call | machine | {' | '.join(BUDGETS)} |", "|---|---|" + "---:|" * len(BUDGETS)]
    print("\n".join(lines))
    started = time.perf_counter()
    for name in presets:
        captured, call = capture(name)
        for machine in machines:
            lines.append(f"| {call} | {machine} | {' | '.join(row(captured, machine))} |")
            print(lines[-1], flush=True)
    print(f"\n{len(presets)} models, {len(machines)} machines, {len(BUDGETS)} budgets: {time.perf_counter() - started:.0f} s")
    if arguments.output:
        arguments.output.write_text(f"{TITLE}\n\n" + "\n".join(lines) + "\n")


def capture(name: str) -> tuple[Plan, str]:
    """A plan that holds the capture (its budget does not matter), and what was captured, in words."""
    preset = Preset.load(name)
    module, args, kwargs = preset.build()
    sizes = ", ".join(f"{size} {value}" for size, value in preset.sizes(module).items())
    return (
        plan(module, "1TB", inputs=args, kwargs=kwargs, method=preset.method, machine=MACHINES[-1]),
        f"{name} in {preset.dtype}: {sizes}",
    )


def row(captured: Plan, machine: str) -> list[str]:
    """One cell per budget."""
    cells: list[str] = []
    p: Plan | None = None
    for budget in BUDGETS:
        if parse_size(budget) > Machine.preset(machine).capacity_bytes:
            cells.append("-")
        elif p is not None and p.budget_bytes >= p.unplanned_bytes:
            cells.append(cells[-1])  # everything stays on the device already: more memory changes nothing
        else:
            try:
                p = captured.replan(budget, machine=machine) if p is None else p.replan(budget)
            except InfeasibleBudget as error:
                cells.append(f"needs {format_bytes(error.minimum_bytes)}")
            else:
                cells.append(f"{format_seconds(p.step_seconds)}, {p.step_seconds / p.bound_seconds:.2f} x")
    return cells


if __name__ == "__main__":
    main()
