"""What `print(plan)` says of rewriting: casts, tiles, samples one after another, the host, what stops a lower peak."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from passes.regions import Tile
from planner.sizes import format_bytes
from planner.solve.casting import saved_bytes

if TYPE_CHECKING:
    from planner.plan_facts import PlanFacts


def cast_rows(plan: PlanFacts) -> list[tuple[str, str]]:
    """How many weights are stored in which type, what that saves, and what it is estimated to cost; nothing without casts."""
    casts = plan.decisions.tiling.casts
    if not casts:
        return []
    types = ", ".join(f"{number} stored as {dtype}" for dtype, number in Counter(cast.dtype for cast in casts).items())
    saved = sum(saved_bytes(plan.program, cast.weight, cast.dtype) for cast in casts)
    noise = "their values" if plan._tilings.casting.is_measured() else "typical values"
    error = f"relative error of the result about {plan.cast_error:.2g}, estimated from {noise}"
    return [("casts", f"{types}, which takes {format_bytes(saved)} less; {error}")]


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
        moved = len(plan.decisions.tiling.moved)
        if moved:
            operators = "1 operator runs" if moved == 1 else f"{moved} operators run"
            text += f"; {operators} earlier, over whose input results are written"
        rows.append(("tiles", text))
    rows += [("unrolled", _unrolled(plan, tile)) for tile in plan.decisions.tiling.unrolled]
    slices = plan.decisions.tiling.slices
    if slices:
        weights = "1 weight comes" if len(slices) == 1 else f"{len(slices)} weights come"
        largest = max(weight.nbytes for weight in plan.problem.program.weights.values() if weight.rows is not None)
        parts = f"{sum(cut.count for cut in slices)} slices of rows, the largest of {format_bytes(largest)}"
        rows.append(("slices", f"{weights} in {parts}"))
    stopped = plan._tilings.what_stops
    if stopped:
        rows.append(("floor", f"no budget below {format_bytes(plan.minimum_bytes)}, since {stopped}"))
    return rows


def _unrolled(plan: PlanFacts, tile: Tile) -> str:
    """Which stretch runs once for every slice of its samples."""
    samples = int(plan.program.node(tile.seed).meta["val"].shape[tile.dim])
    most = -(-samples // min(tile.count, samples))
    each = "one" if most == 1 else f"{most} at most"
    return (
        f"{tile.first} to {tile.last} run {-(-samples // most)} times, each for {each} of {samples} samples "
        f"(dimension {tile.dim} of {tile.seed}), and read their weights as often"
    )
