"""Plans of the zoo whose timelines are looked at: all resident, half and least, for one call and for three."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import nn

from planner import Plan, plan
from planner.solve.decide import Solver
from planner.solve.tilings import Tilings
from tests.zoo import ZOO, Example


def wide() -> Example:
    """Few operators, whose weights and outputs are large for CUDA's allocator: it makes segments, and takes a pool."""
    layers = [nn.Sequential(nn.Linear(1024, 1024, device="meta"), nn.GELU()) for _ in range(6)]
    return nn.Sequential(*layers).eval(), (torch.empty(700, 1024, device="meta"),), {}


@cache
def zoo_plans(name: str, device: str = "accounting", allow: tuple[str, ...] = ("offload", "tile")) -> tuple[Plan, ...]:
    """The plans of one model, captured once."""
    module, args, kwargs = wide() if name == "wide" else ZOO[name]()
    most = plan(module, "1GB", inputs=args, kwargs=kwargs, device=device, machine="rtx-4090", allow=allow)
    plans = []
    for repeats in (1, 3):
        again = replace(most._options, repeats=repeats)
        made = most if repeats == 1 else Plan(most.target, again, Tilings(Solver(most.problem, repeats)))
        half = (made.minimum_bytes + made.unplanned_bytes) // 2
        plans += [made.replan(budget) for budget in (made.unplanned_bytes, half, made.minimum_bytes)]
    return tuple(plans)
