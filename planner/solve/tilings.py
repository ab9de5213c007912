"""Untiled or tiled, and how finely: the program in several tilings, each solved for the budget, and the fastest of them.

A tiling brings every operator under some cap. Caps fall by a fixed ratio from the untiled peak for as long as tiling helps, and
do not depend on the budget: a larger budget has all the tilings of a smaller one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from passes.base import Pass, run_passes
from passes.functionalise import Functionalise
from passes.program import Program
from passes.regions import Tile, find_region
from passes.split_norms import SplitNorms, splittable_norms
from passes.tile_regions import TileRegions, stretch_of
from planner.solve.constraints import FREE, TileConstraint
from planner.solve.decide import Schedule, Solver
from planner.solve.decisions import UNTILED, Tiling
from planner.solve.problem import Problem
from planner.solve.tile_cost import Hosting, TileCosts
from planner.solve.tile_search import TileSearch

# Caps fall by this share; they stop falling where the peak no longer does.
_RATIO = 0.8
# What a tiling needs in the end may be less than its cap by this share.
_BELOW = 0.75
# A tiling whose arithmetic alone takes so many times the best step found ends the search: lower caps only add to it.
_HOPELESS = 1.05
# A step that takes no more than this beyond the arithmetic of the coarsest tiling is not improved.
_PERFECT = 1.001
# Values of more than some such share of the cap live on the host, where no tiling without that keeps the cap.
_HOSTED = (0.5, 0.3, 0.12)
# Along which dimension they are cut: rows of an image, tokens; then columns, samples.
_AXES = (-2, -1)


def tile_program(program: Program, tiling: Tiling) -> Program:
    """The canonical program as a tiling says.

    Raises:
        PlanFileError: it names what the program does not have. Untileable: a region that cannot be cut so.
    """
    return run_passes(program, _passes(tiling))


def _same_operators(one: Program, other: Program) -> bool:
    """Whether the passes left everything as it was."""
    return [(n.name, n.target) for n in one.ops()] == [(n.name, n.target) for n in other.ops()]


def _passes(tiling: Tiling) -> tuple[Pass, ...]:
    return (
        Functionalise(),  # first: a tile must not write into what is not its own
        SplitNorms(tiling.norms),  # regions begin and end at the halves
        TileRegions(tiling.tiles, tiling.hosted),
    )


@dataclass(frozen=True, eq=False)
class Tilings:
    """The solvers of one canonical program: `base` of the program as it is, others of its tilings.

    `build` analyses a rewritten program; None where nothing may be tiled. `hosting`: whether activations may live on the host.
    """

    base: Solver
    build: Callable[[Program, Tiling], Problem] | None = None
    hosting: bool = False
    constraint: Callable[[fx.Node], TileConstraint] = lambda node: FREE

    @cached_property
    def minimum(self) -> Solver:
        """The solver with the schedule of least memory."""
        if self.build is None:
            return self.base
        *_, (_, tiling) = (0, UNTILED), *self._levels()
        least = self._solver(tiling)
        if self._forced:
            return least
        return min((self.base, least), key=lambda solver: solver.minimum.peak_bytes)

    def least_bytes(self, budget_bytes: int) -> int:
        """The least feasible budget where it is above `budget_bytes`; else some feasible one, without looking further."""
        first = next(self._candidates(budget_bytes), None)
        if first is not None and first.minimum.peak_bytes <= budget_bytes:
            return first.minimum.peak_bytes
        return self.minimum.minimum.peak_bytes

    def solve(self, budget_bytes: int, host_bytes: int | None = None) -> tuple[Solver, Schedule]:
        """The fastest schedule of all tilings; requires `budget_bytes >= minimum.minimum.peak_bytes`."""
        best: tuple[Solver, Schedule] | None = None
        perfect: float | None = None
        for solver in self._candidates(budget_bytes):
            least = solver.problem.compute_seconds
            perfect = _PERFECT * least if perfect is None else perfect
            if best is not None and least > _HOPELESS * best[1].time.step_seconds:
                break
            if solver.minimum.peak_bytes > budget_bytes or (best is not None and least >= best[1].time.step_seconds):
                continue
            schedule = solver.solve(budget_bytes, host_bytes)
            if best is None or schedule.time.step_seconds < best[1].time.step_seconds:
                best = solver, schedule
            if best[1].time.step_seconds <= perfect:
                break
        if best is None:
            best = self.minimum, self.minimum.solve(budget_bytes, host_bytes)
        return best

    def of(self, tiling: Tiling) -> Solver:
        """The solver of a given tiling.

        Raises:
            PlanFileError, Untileable: as `tile_program`.
        """
        return self._solver(tiling)

    def _candidates(self, budget_bytes: int) -> Iterator[Solver]:
        """Untiled, then finer and finer."""
        if not self._forced:
            yield self.base
        for cap, tiling in () if self.build is None else self._levels():
            if cap * _BELOW <= budget_bytes and tiling:
                yield self._solver(tiling)

    @cached_property
    def _forced(self) -> bool:
        """Whether something has to be tiled."""
        return self.build is not None and any(self.constraint(node).forced for node in self.base.problem.liveness.nodes)

    def _solver(self, tiling: Tiling) -> Solver:
        if not tiling:
            return self.base
        if tiling not in self._solvers:
            assert self.build is not None
            program = tile_program(self.base.problem.program, tiling)
            self._solvers[tiling] = Solver(self.build(program, tiling), self.base.repeats, self.base.pool)
        return self._solvers[tiling]

    @cached_property
    def _solvers(self) -> dict[Tiling, Solver]:
        return {}

    @cached_property
    def _split(self) -> Problem:
        """The program with all norms split, on which regions are looked for."""
        assert self.build is not None
        program = self.base.problem.program
        tiling = Tiling(splittable_norms(program))
        whole = tile_program(program, tiling)
        return self.base.problem if _same_operators(whole, program) else self.build(whole, tiling)

    def _levels(self) -> Iterator[tuple[int, Tiling]]:
        """Caps, falling, with the tiling of each, looked for when it is asked for; the last one needs the least memory."""
        yield from self._known
        for level in self._further:
            self._known.append(level)
            yield level

    @cached_property
    def _known(self) -> list[tuple[int, Tiling]]:
        return []

    @cached_property
    def _further(self) -> Iterator[tuple[int, Tiling]]:
        return self._find_levels()

    def _find_levels(self) -> Iterator[tuple[int, Tiling]]:
        search = self._search
        peak = cap = int(search.costs.total.max())
        if search.forced.any():
            cap = max(cap, search.tiles(cap).peak_bytes)  # it may take more than the program as it is, on the device
            peak, tiling = self._level(search, cap)
            yield cap, tiling
        while True:
            cap = int(cap * _RATIO)
            reached, tiling = self._level(search, cap)
            if reached >= peak:
                return
            peak = reached
            yield cap, tiling

    @cached_property
    def _search(self) -> TileSearch:
        return TileSearch(TileCosts(self._split), self.constraint)

    def _level(self, search: TileSearch, cap: int) -> tuple[int, Tiling]:
        """The tiling for a cap, with values on the host where it cannot be kept otherwise, and the bytes it needs."""
        found = search.tiles(cap)
        options = [(found, search.costs)]
        if found.peak_bytes > cap and self.hosting:
            for axis, share in itertools.product(_AXES, _HOSTED):
                costs = TileCosts(self._split, Hosting(int(cap * share), axis), search.costs.calls)
                options.append((TileSearch(costs, self.constraint).tiles(cap), costs))
                if options[-1][0].peak_bytes <= cap:
                    break
        best, costs = min(options, key=lambda option: (max(option[0].peak_bytes, cap), option[0].added_seconds))
        return best.peak_bytes, self._tiling(costs, best.tiles)

    def _tiling(self, costs: TileCosts, tiles: tuple[Tile, ...]) -> Tiling:
        """With the norms that lie in a region's stretch, whole or in part, and the results that live on the host."""
        names: set[str] = set()
        hosted: list[str] = []
        for tile in tiles:
            stretch, seed = stretch_of(self._split.program, tile)
            names |= {node.name for node in stretch}
            region = find_region(stretch, seed, tile.dim, costs.calls, costs.hosted)
            hosted += [node.name for node in region.results if node in costs.hosted]
        halves = {name: {name, f"{name}_statistics"} for name in self._split.tiling.norms}
        return Tiling(tuple(name for name, both in halves.items() if both & names), tiles, tuple(hosted))
