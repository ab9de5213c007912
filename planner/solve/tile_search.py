"""Which regions run in tiles, so that no operator needs more than a cap: the fewest added seconds, by dynamic programming.

The operators above the cap are covered by regions whose tiles stay below it. Regions begin and end where few bytes are live,
and at norms whose statistics are merged; of every stretch between two such places the dimension and number of tiles are chosen
that add the fewest seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import fx

from passes.mark_state import written_nodes
from passes.regions import Tile, is_view
from passes.tile_rules.base import REDUCTIONS
from planner.solve.constraints import FREE, TileConstraint
from planner.solve.tile_cost import Estimate, TileCosts

# Numbers of tiles that are tried, rising.
COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# A region has at most so many operators, and spans at most so many places where it could have been cut.
_LONGEST = 96
_MOST_CUTS = 8
# How far around the operators above the cap a region may begin and end, in operators.
_MARGIN = 24
# How many more counts are tried for bands.
_FINER = 3
# Where a dimension has no more elements than this, few tiles may be possible where many are not.
_FEW = 128
# Bytes that nothing has; and what an operator counts for that has to be tiled and is not: more than any bytes above the cap.
_ALL, _FORCED = 1e18, 1e14


@dataclass(frozen=True)
class _Choice:
    """The cheapest way to run operators [start, stop) in tiles; `missed` of those that have to be tiled are not."""

    start: int
    stop: int
    seed: fx.Node
    tile: Tile
    estimate: Estimate
    missed: int = 0

    def moved(self, by: int, seed: fx.Node, nodes: Sequence[fx.Node]) -> _Choice:
        """The same for an equal stretch, `by` operators further on."""
        start, stop = self.start + by, self.stop + by
        tile = replace(self.tile, first=nodes[start].name, last=nodes[stop - 1].name, seed=seed.name)
        return replace(self, start=start, stop=stop, seed=seed, tile=tile)


@dataclass(frozen=True)
class Found:
    """The regions for a cap, and the seconds that they add."""

    tiles: tuple[Tile, ...]
    added_seconds: float


# Bytes above the cap (summed over operators) and seconds up to some place; where the last region begins, if one ends there.
_Best = tuple[tuple[float, float], tuple[int, _Choice | None]]


@dataclass(eq=False)
class TileSearch:
    """Chooses regions for any cap on one problem, as far as `constraint` lets it."""

    costs: TileCosts
    constraint: Callable[[fx.Node], TileConstraint] = lambda node: FREE

    @cached_property
    def constraints(self) -> list[TileConstraint]:
        """By operator."""
        return [self.constraint(node) for node in self.costs.nodes]

    @cached_property
    def forced(self) -> np.ndarray:
        """The operators that have to be tiled wherever that is possible; bool[n]."""
        return np.array([constraint.forced for constraint in self.constraints])

    def tiles(self, cap_bytes: int) -> Found | None:
        """Regions that bring every operator to at most the cap; None where none are found."""
        while True:
            chosen: list[_Choice] = []
            for found, left in self._covers(cap_bytes):
                chosen += found
                if left:
                    return None
            if self._hold(chosen):
                added = sum(choice.estimate.inner.added_seconds for choice in chosen)
                return Found(tuple(choice.tile for choice in chosen), added)

    def left(self, cap_bytes: int, among: Collection[int] | None = None) -> list[int]:
        """The operators, of those at some positions, that stay above the cap whatever is tiled, by position."""
        while True:
            covers = list(self._covers(cap_bytes, among))
            if self._hold([choice for found, _ in covers for choice in found]):
                return [i for _, left in covers for i in left if among is None or i in among]

    def _hold(self, chosen: Sequence[_Choice]) -> bool:
        """Whether every tile can be computed; where not, the choice is not made again."""
        hold = all(self.costs.holds(c.start, c.stop, c.seed, c.tile.dim, c.tile.count, c.tile.grain) for c in chosen)
        if not hold:
            self._covered.clear()
            self._chosen.clear()
        return hold

    def _covers(self, cap_bytes: int, among: Collection[int] | None = None) -> Iterator[tuple[list[_Choice], list[int]]]:
        """Regions for every run of operators above the cap, and those of them that none of these brings below it.

        `among`: only for runs in which one of these positions is.
        """
        free = 0
        needed = (self.costs.total > cap_bytes) | self.costs.touching
        for first, last in self._hot(cap_bytes):
            if among is not None and not any(first <= i <= last for i in among):
                continue
            found: list[_Choice] = []
            if last >= free:
                begin, end = self._within(first, last, max(first - _MARGIN, free), min(last + 1 + _MARGIN, len(needed)))
                found = self._equal_cover(max(first, free), last + 1, begin, end, cap_bytes)
            for choice in found:
                needed[choice.start : choice.stop] = False
            free = max([free, *(choice.stop for choice in found)])
            yield found, [int(i) for i in np.flatnonzero(needed[first : last + 1]) + first]

    def _hot(self, cap_bytes: int) -> list[tuple[int, int]]:
        """Runs of operators above the cap; those with few operators between them are one."""
        hot = [int(i) for i in np.flatnonzero((self.costs.total > cap_bytes) | self.costs.touching | self.forced)]
        runs: list[list[int]] = []
        for i in hot:
            if runs and i - runs[-1][1] <= 4 and not self._writes[runs[-1][1] : i + 1].any():
                runs[-1][1] = i
            else:
                runs.append([i, i])
        return [(a, b) for a, b in runs]

    @cached_property
    def _writes(self) -> np.ndarray:
        """Whether an operator writes to its argument, so that no region has it, or gives what is written; bool[n]."""
        places = {n for node in self.costs.nodes for n in written_nodes(node) if is_view(n)}
        return np.array([node in places or bool(written_nodes(node)) for node in self.costs.nodes], dtype=bool)

    def _within(self, first: int, last: int, begin: int, end: int) -> tuple[int, int]:
        """As much of [begin, end) around the operators from first to last as regions there can reach."""
        before, behind = np.flatnonzero(self._writes[begin:first]), np.flatnonzero(self._writes[last + 1 : end])
        return begin + int(before[-1]) + 1 if len(before) else begin, last + 1 + int(behind[0]) if len(behind) else end

    def _equal_cover(self, first: int, stop: int, begin: int, end: int, cap_bytes: int) -> list[_Choice]:
        """As `_cover`, which is asked once for all that are equal, as those of a model's blocks are."""
        ends = [i - begin for i in range(begin, end + 1) if i in self._merged_ends]
        limits = tuple(self.constraints[begin:end]) if self._limited else ()
        around = self.costs.surroundings(begin, end), self._separable(end), tuple(ends), limits
        key = cap_bytes, first - begin, stop - begin, around
        stretches = self.costs.stretches
        if key not in self._covered:
            found = self._cover(first, stop, begin, end, cap_bytes)
            self._covered[key] = begin, [(choice, stretches.place(choice.seed, begin, end)) for choice in found]
        other, placed = self._covered[key]
        return [choice.moved(begin - other, stretches.node(place, begin, end), self.costs.nodes) for choice, place in placed]

    @cached_property
    def _covered(self) -> dict[object, tuple[int, list[tuple[_Choice, tuple[bool, int]]]]]:
        """Regions that were found, by what they depend on: where it begins, and their seeds by place."""
        return {}

    @cached_property
    def _limited(self) -> bool:
        return any(constraint != FREE for constraint in self.constraints)

    def _cover(self, first: int, stop: int, begin: int, end: int, cap_bytes: int) -> list[_Choice]:
        """The regions that cover the operators [first, stop) best: those left above the cap, by how much, then seconds.

        best[j]: the best for all operators before the j-th place.
        """
        places = self._places(first, stop, begin, end)
        best: list[_Best] = [((0.0, 0.0), (-1, None))]
        for j in range(1, len(places)):
            left = [self._excess(i, cap_bytes) for i in range(places[j - 1], places[j])]
            before = best[j - 1][0]
            found: _Best = ((before[0] + sum(left), before[1]), (j - 1, None))
            for i in range(j - 1, max(-1, j - 1 - _MOST_CUTS), -1):
                if places[j] - places[i] > _LONGEST or self._blocked(places[i], places[j]):
                    break
                if best[i][0] >= found[0]:
                    continue  # a region only adds to that
                if not any(self._excess(k, cap_bytes) for k in range(places[i], places[j])):
                    continue
                choice = self._choose(places[i], places[j], cap_bytes)
                if choice is None:
                    continue
                rank = best[i][0][0] + _FORCED * choice.missed, best[i][0][1] + choice.estimate.inner.added_seconds
                if rank < found[0]:
                    found = rank, (i, choice)
            best.append(found)
        chosen, j = [], len(places) - 1
        while j > 0:
            j, choice = best[j][1]
            if choice is not None:
                chosen.append(choice)
        return chosen[::-1]

    def _excess(self, i: int, cap_bytes: int) -> float:
        """Bytes by which an untiled operator is over the cap; more than anything where it has to be tiled."""
        if self.costs.touching[i]:
            return _ALL
        return float(max(0, self.costs.total[i] - cap_bytes)) + _FORCED * bool(self.forced[i])

    def _places(self, first: int, stop: int, begin: int, end: int) -> list[int]:
        """Where regions may begin and end: at both ends, where live bytes are least, behind merged results."""
        live = self.costs.live_before
        found = {first, stop}
        for i in range(begin, end + 1):
            low = live[i] <= live[max(0, i - 1)] and live[i] <= live[min(len(live) - 1, i + 1)]
            if (low or (i > 0 and i in self._merged_ends)) and self._separable(i):
                found.add(i)
        return sorted(p for p in found if self._separable(p))

    @cached_property
    def _merged_ends(self) -> set[int]:
        """Behind each operator whose result can be merged from parts, and in front of its first reader."""
        ends = set()
        for i, node in enumerate(self.costs.nodes):
            if node.target in REDUCTIONS and str(node.target).startswith("vramplan."):
                ends |= {i + 1, min((self.costs.position.get(user, i + 1) for user in node.users), default=i + 1)}
        return ends

    def _separable(self, place: int) -> bool:
        """Not between an operator and the members of its result."""
        if place >= len(self.costs.nodes):
            return True
        node = self.costs.nodes[place]
        return getattr(node.target, "__name__", "") != "getitem"

    def _blocked(self, start: int, stop: int) -> bool:
        """Whether the stretch holds a norm's statistics together with what reads them, or what must not be tiled."""
        if self._forbidden[stop] != self._forbidden[start]:
            return True
        made, read = self._statistics
        return any(at < stop for at in read[bisect_left(made, start) : bisect_left(made, stop)])

    @cached_property
    def _forbidden(self) -> np.ndarray:
        """How many operators before the i-th one must not be tiled; int64[n + 1]."""
        return np.cumsum([0, *(not constraint.allowed for constraint in self.constraints)])

    @cached_property
    def _statistics(self) -> tuple[list[int], list[int]]:
        """The positions of norms' statistics, rising, and of what reads each of them first."""
        at, nodes = self.costs.position, self.costs.nodes
        made = [node for node in nodes if str(node.target).startswith("vramplan.group_statistics")]
        read = {at[node]: min((at[user] for user in node.users if user in at), default=len(nodes)) for node in made}
        return list(read), list(read.values())

    def _choose(self, start: int, stop: int, cap_bytes: int) -> _Choice | None:
        """The fewest tiles along the first dimension that keep the stretch under the cap; None where none do.

        Looked for once for all that are equal, with as much around them.
        """
        around, stretches = self.costs.around_bytes(start, stop), self.costs.stretches
        if around > cap_bytes:
            return None
        limits = tuple(self.constraints[start:stop]) if self._limited else ()
        key = cap_bytes, stretches.number(start, stop), around, self.costs.held_before(start), limits
        if key not in self._chosen:
            found = self._search(start, stop, cap_bytes)
            self._chosen[key] = None if found is None else (found, stretches.place(found.seed, start, stop))
        known = self._chosen[key]
        if known is None:
            return None
        choice, place = known
        return choice.moved(start - choice.start, stretches.node(place, start, stop), self.costs.nodes)

    @cached_property
    def _chosen(self) -> dict[object, tuple[_Choice, tuple[bool, int]] | None]:
        """What was found, with its seed by place."""
        return {}

    def _search(self, start: int, stop: int, cap_bytes: int) -> _Choice | None:
        seen: list[object] = []
        dims = {constraint.dim for constraint in self.constraints[start:stop] if constraint.dim is not None}
        for seed, dim in self.costs.seeds(start, stop):
            if dims and dim not in dims and dim - seed.meta["val"].dim() not in dims:
                continue
            region = self.costs.region(start, stop, seed, dim)
            if region is None or (shape := [(n, region.dims[n]) for n in region.nodes]) in seen:
                continue
            seen.append(shape)
            choice = self._fewest(start, stop, seed, dim, cap_bytes)
            if choice is not None:
                return choice
        return None

    def _fewest(self, start: int, stop: int, seed: fx.Node, dim: int, cap_bytes: int) -> _Choice | None:
        """The least number of tiles that is under the cap; None where no number is."""
        if self.costs.least_bytes(start, stop, seed, dim) > cap_bytes:
            return None
        fixed = [constraint.count for constraint in self.constraints[start:stop] if constraint.count is not None]
        counts = (max(fixed),) if fixed else COUNTS

        def choice(index: int) -> _Choice | None:
            estimate = self.costs.estimate(start, stop, seed, dim, counts[index], 1 if fixed else None)
            if estimate is None or estimate.peak_bytes > cap_bytes:
                return None
            names = self.costs.nodes[start].name, self.costs.nodes[stop - 1].name
            tile = Tile(*names, seed.name, dim, counts[index], estimate.inner.grain)
            return _Choice(start, stop, seed, tile, estimate, self._missed(start, stop, seed, dim))

        last = len(counts) - 1
        if choice(last) is None:
            return (
                next((found for i in range(last) if (found := choice(i)) is not None), None) if self._odd(seed, dim) else None
            )
        index = bisect_left(range(last), True, key=lambda i: choice(i) is not None)
        # Of bands more may be better: the first one to come and the last one to go are copied while nothing else happens.
        finer = range(index, min(index + _FINER, len(counts))) if self.costs.touching[start:stop].any() else (index,)
        choices = [found for i in finer if (found := choice(i)) is not None]
        return min(choices, key=lambda found: found.estimate.inner.added_seconds, default=None)

    @staticmethod
    def _odd(seed: fx.Node, dim: int) -> bool:
        """Whether parts may be of a few elements, as groups of channels are."""
        return bool(seed.meta["val"].shape[dim] <= _FEW)

    def _missed(self, start: int, stop: int, seed: fx.Node, dim: int) -> int:
        """How many operators that have to be tiled run whole."""
        if not self.forced[start:stop].any():
            return 0
        region = self.costs.region(start, stop, seed, dim)
        assert region is not None
        return sum(1 for node in region.whole if self.costs.born(node))
