"""What `print(plan)` says of tiling: how much runs in tiles, what lives on the host, and what stops a lower peak."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from passes.program import module_path, operator_name, tensors_of
from passes.tile_rules.base import rule_of
from planner.sizes import format_bytes
from planner.solve.tilings import Tilings

if TYPE_CHECKING:
    from planner.plan_facts import PlanFacts


def tile_rows(plan: PlanFacts) -> list[tuple[str, str]]:
    """Labels and texts; nothing where nothing is tiled and nothing in the way."""
    rows = []
    loops = [node.meta["loop"] for node in plan.problem.liveness.nodes if "loop" in node.meta]
    if loops:
        counts = sorted({loop.count for loop in loops})
        of = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        regions = "1 region runs" if len(loops) == 1 else f"{len(loops)} regions run"
        added = plan.problem.compute_seconds / plan.untiled_seconds - 1
        text = f"{regions} in {of} tiles, which takes {max(added, 0):.1%} longer than whole operators"
        hosted = len(plan.decisions.tiling.hosted)
        if hosted:
            values = "1 value lives" if hosted == 1 else f"{hosted} values live"
            text += f"; {values} on the host, in bands ({format_bytes(plan.layout.host_bytes)} page-locked)"
        rows.append(("tiles", text))
    slices = plan.decisions.tiling.slices
    if slices:
        weights = "1 weight comes" if len(slices) == 1 else f"{len(slices)} weights come"
        largest = max(weight.nbytes for weight in plan.problem.program.weights.values() if weight.rows is not None)
        parts = f"{sum(cut.count for cut in slices)} slices of rows, the largest of {format_bytes(largest)}"
        rows.append(("slices", f"{weights} in {parts}"))
    stopped = what_stops(plan._tilings)
    if stopped:
        rows.append(("floor", f"no budget below {format_bytes(plan.minimum_bytes)}, since {stopped}"))
    return rows


def what_stops(tilings: Tilings) -> str:
    """The operator without a rule that keeps the least peak from being lower; empty where it is something else."""
    if not tilings.freedom.tiles:
        return ""
    least = tilings.minimum
    captured = {node.name: node.target for node in tilings.base.problem.liveness.nodes}
    node = least.problem.liveness.nodes[least.minimum.peak_position]
    for near in (node, *node.all_input_nodes, *node.users):
        reason = _refusal(near)
        if reason and captured.get(near.name) == near.target:  # not what rewriting put there
            place = module_path(near)
            where = f" in {place}" if place else ""
            return f"{near.name}{where} runs whole: {operator_name(near.target)} {reason}"
    return ""


def _refusal(node: fx.Node) -> str:
    """Why an operator can be cut along none of its dimensions, where it has no rule at all."""
    if not isinstance(node.target, torch._ops.OpOverload) or not any(t.numel() > 1 for t in tensors_of(node)):
        return ""
    if node.target._schema.is_mutable:
        return "writes to its argument"
    return "" if rule_of(node.target) is not None else "has no tile rule"
