"""Seconds that planning takes: the FLUX.1-dev transformer (23.8 GB) from the meta device, for three budgets.

python -m tests.benchmarks.planning
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from planner.budget import Budget
from planner.capture import capture
from planner.machine import Machine
from planner.memory import MemoryModel
from planner.options import Options
from planner.plan import Plan
from planner.sizes import format_bytes
from planner.solve.decide import Solver
from planner.solve.problem import build_problem

BUDGETS = ("6GB", "12GB", "20GB")


def flux() -> tuple[nn.Module, dict[str, object]]:
    """FLUX.1-dev at 1024 by 1024: 4096 image tokens, 512 text tokens, bfloat16."""
    with torch.device("meta"):
        module = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16).eval()
        half = torch.bfloat16
        kwargs: dict[str, object] = {
            "hidden_states": torch.empty(1, 4096, 64, dtype=half),
            "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=half),
            "pooled_projections": torch.empty(1, 768, dtype=half),
            "timestep": torch.empty(1, dtype=half),
            "img_ids": torch.empty(4096, 3, dtype=half),
            "txt_ids": torch.empty(512, 3, dtype=half),
            "guidance": torch.empty(1),
            "return_dict": False,
        }
    return module, kwargs


def main() -> None:
    module, kwargs = flux()
    machine = Machine.preset("rtx-4090")
    started = time.perf_counter()
    program = capture(module, (), kwargs)
    captured = time.perf_counter()
    program = run_passes(program, CANONICALISE)
    canonical = time.perf_counter()
    problem = build_problem(program, machine, MemoryModel.of("cuda", machine.capability))
    analysed = time.perf_counter()
    print(f"{len(problem.names)} operators, {format_bytes(problem.total_weight_bytes)} of weights")
    print(f"capture      {captured - started:6.2f} s")
    print(f"canonicalise {canonical - captured:6.2f} s")
    print(f"analyse      {analysed - canonical:6.2f} s")
    solver = Solver(problem)
    for size in BUDGETS:
        started = time.perf_counter()
        p = Plan(module, Options(Budget.parse(size, "cuda"), machine, "cuda", kwargs=dict(kwargs)), solver)
        seconds = time.perf_counter() - started
        print(
            f"{size:>5}: solve, emit, check {seconds:6.2f} s; peak {format_bytes(p.peak_bytes)}, step {p.step_seconds:.3f} s, "
            f"{p.step_seconds / p.bound_seconds:.3f} x the bound"
        )


if __name__ == "__main__":
    main()
