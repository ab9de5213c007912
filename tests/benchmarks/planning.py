"""What planning costs, by stage, for programs of 300 to 30,000 captured nodes, all from the meta device.

    python -m tests.benchmarks.planning                      # all four
    python -m tests.benchmarks.planning --cases vae t5       # some
    python -m tests.benchmarks.planning --update             # writes results/planning.{json,md}

Each case runs in a process of its own. A stage's memory is the most that is resident during it (`VmHWM`, reset before through
`/proc/self/clear_refs`); its CPU seconds are what the process worked, which others on the machine change less than the wall's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from planner.budget import Budget
from planner.capture import capture
from planner.machine import Machine
from planner.options import Options
from planner.pipeline import emit_program
from planner.plan import Plan
from planner.prepare import tilings_of
from planner.solve.tilings import Found, Tilings

MACHINE = "rtx-4090"
RESULTS = Path(__file__).parent / "results"
CASES = ("vae", "t5", "flux", "long_flux")
# Of the untiled peak of each case: the budget that is planned for, and the ones it is replanned for.
SHARE, OTHERS = 0.25, (0.35, 0.3)
Example = tuple[nn.Module, dict[str, Any]]


def vae() -> Example:
    """The decoder of the SDXL VAE at 1024 by 1024, fp16."""
    from diffusers.models.autoencoders.vae import Decoder

    with torch.device("meta"):
        module = Decoder(4, 3, ("UpDecoderBlock2D",) * 4, (128, 256, 512, 512), 2, 32).half().eval()
        return module, {"sample": torch.empty(1, 4, 128, 128, dtype=torch.float16)}


def t5() -> Example:
    """T5-XXL's encoder, 512 tokens, bf16."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        return T5EncoderModel(config).to(torch.bfloat16).eval(), {"input_ids": torch.zeros(1, 512, dtype=torch.long)}


def flux(layers: int = 19) -> Example:
    """FLUX.1-dev at 1024 by 1024: 4096 image tokens, 512 text tokens, bf16."""
    from diffusers import FluxTransformer2DModel

    half = torch.bfloat16
    with torch.device("meta"):
        module = FluxTransformer2DModel(guidance_embeds=True, num_layers=layers, num_single_layers=2 * layers)
        kwargs: dict[str, Any] = {
            "hidden_states": torch.empty(1, 4096, 64, dtype=half),
            "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=half),
            "pooled_projections": torch.empty(1, 768, dtype=half),
            "timestep": torch.empty(1, dtype=half),
            "img_ids": torch.empty(4096, 3, dtype=half),
            "txt_ids": torch.empty(512, 3, dtype=half),
            "guidance": torch.empty(1),
            "return_dict": False,
        }
        return module.to(half).eval(), kwargs


def long_flux() -> Example:
    """The same with four times as many blocks: 95 GB of weights."""
    return flux(76)


class Stages:
    """Seconds and memory of one stage after the other."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def run(self, name: str, function: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        wall, worked = time.perf_counter(), time.process_time()
        result = function()
        self.rows[name] = {
            "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - worked, "peak_rss_bytes": _high_water(),
        }  # fmt: skip
        return result


@contextlib.contextmanager
def exporting() -> Iterator[list[float]]:
    """The CPU seconds of every call of `torch.export.export` within it."""
    seconds: list[float] = []
    export = torch.export.export

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return export(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - started)

    with mock.patch.object(torch.export, "export", timed):
        yield seconds


def _high_water() -> int:
    """The most resident bytes since they were last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def measure(case: str) -> dict[str, Any]:
    """Every stage of planning one case."""
    module, kwargs = globals()[case]()
    machine, stages = Machine.preset(MACHINE), Stages()

    def options(budget_bytes: int) -> Options:
        return Options(Budget.parse(budget_bytes, "cuda"), machine, "cuda", kwargs=dict(kwargs))

    with exporting() as exported:
        captured = stages.run("capture", lambda: capture(module, (), kwargs))
    nodes = len(captured.graph.nodes)
    program = stages.run("canonicalise", lambda: run_passes(captured, CANONICALISE))
    tilings = stages.run("analyse", lambda: tilings_of(program, options(1 << 40)))
    budget = int(SHARE * tilings.of(tilings.base.problem.tiling).resident.peak_bytes)
    solver, schedule = stages.run("decide", lambda: decide(tilings, budget))
    decisions = schedule.decisions(solver.problem)
    stages.run("rewrite, check", lambda: emit_program(solver.problem, decisions, budget, schedule.pools))
    plan = Plan(module, options(budget), tilings)
    least = stages.run("least budget", lambda: plan.minimum_bytes)
    stages.run("print", lambda: str(plan))
    for number, share in enumerate(OTHERS):
        other = max(int(budget / SHARE * share), least)
        stages.run("replan" if number == 0 else "replan again", lambda: plan.replan(other))  # noqa: B023
    facts = {
        "nodes": nodes, "operators": len(tilings.base.problem.names), "weight_bytes": tilings.base.problem.total_weight_bytes,
        "export_seconds": sum(exported), "budget_bytes": budget, "times_bound": plan.step_seconds / plan.bound_seconds,
    }  # fmt: skip
    return {**facts, "stages": stages.rows}


def decide(tilings: Tilings, budget_bytes: int) -> Found:
    """As a plan decides: first whether the budget can be kept."""
    assert tilings.least_bytes(budget_bytes) <= budget_bytes
    return tilings.solve(budget_bytes)


COLD = ("capture", "canonicalise", "analyse", "decide", "rewrite, check")


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as they are committed: CPU seconds and peak memory by stage, and how the totals grow."""
    stages = list(next(iter(results.values()))["stages"])
    lines = [
        "# What planning costs",
        "",
        f"Written by `python -m tests.benchmarks.planning --update`: CPU seconds and the most resident memory, for {MACHINE},",
        f"a budget of {SHARE:.0%} of what the model takes resident. Load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores;",
        "cores that are shared work up to half as fast.",
        "",
        f"| | {' | '.join(results)} |",
        "|---|" + "---|" * len(results),
    ]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("captured nodes", lambda r: f"{r['nodes']:,}"),
        ("weights", lambda r: f"{r['weight_bytes'] / 1e9:.1f} GB"),
    ]
    for stage in stages:
        if stage == COLD[1]:
            rows.append(("of that `torch.export`", lambda r: f"{r['export_seconds']:.1f} s"))
        rows.append((stage, lambda r, s=stage: _cell(r["stages"][s])))  # type: ignore[misc]
        if stage == COLD[-1]:
            rows.append(("**cold plan**", lambda r: f"**{cold(r):.1f} s**"))
    for title, cell in rows:
        lines.append(f"| {title} | {' | '.join(cell(r) for r in results.values())} |")
    if len(results) > 1:
        first, last = list(results.values())[-2:]
        n, m = first["nodes"], last["nodes"]
        allowed = m * math.log(m) / (n * math.log(n))
        lines += ["", f"From {n:,} to {m:,} nodes a cold plan takes {cold(last) / cold(first):.0f} times as long; "
                  f"n log n would be {allowed:.0f} times."]  # fmt: skip
    return "\n".join([*lines, ""])


def cold(result: dict[str, Any]) -> float:
    """CPU seconds of all that a first plan takes."""
    return sum(float(result["stages"][stage]["cpu_seconds"]) for stage in COLD)


def _cell(row: dict[str, float]) -> str:
    return f"{row['cpu_seconds']:.1f} s, {row['peak_rss_bytes'] / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--update", action="store_true", help="write results/planning.{json,md}")
    parser.add_argument("--measure", choices=CASES)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure)))
        return
    results: dict[str, dict[str, Any]] = {}
    for case in chosen.cases:
        command = [sys.executable, "-m", "tests.benchmarks.planning", "--measure", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, f"{cold(results[case]):.1f} s of CPU for a cold plan", file=sys.stderr, flush=True)
    text = table(results)
    print(text)
    if chosen.update:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()}
        (RESULTS / "planning.json").write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
        (RESULTS / "planning.md").write_text(text)


if __name__ == "__main__":
    main()
