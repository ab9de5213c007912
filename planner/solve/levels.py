"""Levels: rewritings of one program that bring every operator under a cap, for caps that fall by a fixed ratio.

Caps do not depend on the budget: a larger budget has all the levels of a smaller one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import fx

from passes.base import run_passes
from passes.big_weights import readers_of, sliceable
from passes.find_region import find_region
from passes.move_up import movable
from passes.program import Program
from passes.recompute import recomputable
from passes.regions import Region, Tile
from passes.slice_weights import WeightSlices, slices_of
from passes.split_norms import splittable_norms
from passes.tile_regions import stretch_of
from passes.write_in_place import in_place_overload
from planner.solve.constraints import FREE, TileConstraint
from planner.solve.decisions import Tiling
from planner.solve.held_bytes import held_beyond
from planner.solve.problem import Problem
from planner.solve.rewriting import Rewriting, tile_passes, without_regions
from planner.solve.tile_cost import Hosting, TileCosts
from planner.solve.tile_search import TileSearch

# Caps fall by this share for as long as they can be kept.
_RATIO = 0.8
# So many halvings between two caps find what a means comes to.
_BISECTIONS = 4
# How far above what it comes to a means is also tried, rising; with operators moved up at more places, since what an allocator
# reserves for few large memories jumps.
_ABOVE = (1.05,)
_ABOVE_MOVED = (1.02, 1.04, 1.06, 1.08, 1.1, 1.12)
# So many times regions are sought again, where those that were found hold memory beyond their values.
_ROUNDS = 8
# A cap that everything keeps.
_ANY = 1 << 62
# Values of more than some such share of the cap live on the host, where no tiling without that keeps the cap.
_HOSTED = (0.5, 0.3, 0.12)
# Along which dimension they are cut: rows of an image, tokens; then columns, samples.
_AXES = (-2, -1)
# A weight comes in slices of at most this share of the cap, rounded down to a power of two, so that caps share them; and of no
# less than what a link copies in the time that it takes to begin.
_SLICE = 0.25
_LEAST_SLICE = 1 << 20


@dataclass(frozen=True)
class Freedom:
    """What may be done to a program.

    `tiles`: regions run in tiles, and weights come in slices, as far as `constraint` lets the operators. `hosting`: activations
    live on the host. `tables`: the weights whose rows may be looked up there, by placeholder.
    """

    tiles: bool = False
    hosting: bool = False
    tables: tuple[str, ...] = ()
    constraint: Callable[[fx.Node], TileConstraint] = lambda node: FREE


NONE = Freedom()


@dataclass(frozen=True, eq=False)
class Levels:
    """The levels of a canonical program's `rewriting`. `base`: the problem of the first, which all levels go on from.

    `build` analyses a rewritten program.
    """

    rewriting: Rewriting
    base: Problem
    build: Callable[[Program, Tiling], Problem]
    freedom: Freedom

    @property
    def looked_up(self) -> Tiling:
        """As the base, with rows of the tables looked up on the host."""
        return replace(self.base.tiling, lookups=self.freedom.tables)

    @cached_property
    def forced(self) -> Tiling | None:
        """The tiling of what has to be tiled and no more; None where nothing has to be."""
        if not any(self.freedom.constraint(node).forced for node in self.base.liveness.nodes):
            return None
        return self._tiled(_ANY, self.base.tiling)

    def _at(self, index: int) -> Tiling | None:
        """The tiling of a level, of which 0 is the coarsest; None where none is found that keeps the cap."""
        if index not in self._known:
            self._known[index] = self._level(self._cap(index))
        return self._known[index]

    def _cap(self, index: int) -> int:
        return int(self._costs.total.max() * _RATIO ** (index + 1))

    def __iter__(self) -> Iterator[tuple[int, Tiling]]:
        """Caps, falling, with their tilings, each looked for when it is asked for; the last one needs the least memory."""
        before: Tiling | None = None
        for index in itertools.count():
            tiling = self._at(index) if self._cap(index) >= max(self._floor, 1) else None
            if before is not None and not before.hosted and (tiling is None or _means(tiling) != _means(before)):
                yield from self._finest(index, before)
                if (
                    not before.moved
                    and not (tiling and tiling.moved)
                    and (moved := self._moved(self._cap(index), before)).moved
                ):
                    yield from self._finest(index, moved)
            if tiling is None:
                return
            yield self._cap(index), tiling
            before = tiling

    def _finest(self, index: int, like: Tiling) -> Iterator[tuple[int, Tiling]]:
        """What the same means as those of a tiling come to between two levels, by bisection; others cost more.

        And what they come to a little above it: the last few bytes take many tiles.
        """
        key = index, bool(like.moved)
        if key not in self._between:
            low, high, found = self._cap(index), self._cap(index - 1), None
            parts = without_regions(like)
            search = self._search(parts, over=bool(like.over or like.moved))
            for _ in range(_BISECTIONS):
                middle = (low + high) // 2
                kept = self._kept(middle, parts, search)
                low, high, found = (low, middle, kept[1]) if kept is not None else (middle, high, found)
            finest = [(high, found)] if found is not None else []
            for times in (_ABOVE_MOVED if like.moved else _ABOVE) if finest else ():
                above = int(high * times)
                if above < self._cap(index - 1) and (kept := self._kept(above, parts, search)) is not None:
                    finest.insert(0, (above, kept[1]))
            self._between[key] = finest
        yield from self._between[key]

    @cached_property
    def _between(self) -> dict[tuple[int, bool], list[tuple[int, Tiling]]]:
        return {}

    @cached_property
    def _known(self) -> dict[int, Tiling | None]:
        return {}

    @cached_property
    def _whole(self) -> Program:
        """The program whose tables are looked up, nothing sliced and nothing cast."""
        return self.rewriting.of(replace(self.looked_up, casts=()))

    @property
    def _costs(self) -> TileCosts:
        """Of the program whose tables are looked up."""
        return self._search(self.looked_up).costs

    @cached_property
    def _floor(self) -> int:
        """What no level gets below: inputs, results, what of the weights cannot be cut."""
        if not self._sliceable:
            return self._costs.floor_bytes
        whole = [
            nbytes
            for key, nbytes in self._costs.problem.weight_bytes.items()
            if key.removesuffix("__values").removesuffix("__scales") not in self._sliceable
        ]
        live = self._costs.live_before
        return max(int(live[0]), int(live[-1])) + max(whole, default=0)

    @cached_property
    def _sliceable(self) -> dict[str, list[int]]:
        """The weights that may come in slices, with the positions of the operators that read them."""
        found, position = {}, {name: i for i, name in enumerate(self._costs.problem.names)}
        for key in sliceable(self._whole):
            if self._whole.weights[key].nbytes <= _LEAST_SLICE:
                continue
            readers = [reader.node for reader in readers_of(self._whole.node(key))]
            if key in self.base.pinned or key in self._cast_otherwise:
                continue
            if all(self.freedom.constraint(reader).allowed for reader in readers):
                found[key] = [position[reader.name] for reader in readers]
        return found

    @cached_property
    def _cast_otherwise(self) -> set[str]:
        """The weights whose scales are not by rows."""
        return {cast.weight for cast in self.base.tiling.casts if cast.dim != 0}

    def _level(self, cap: int) -> Tiling | None:
        """The tiling for a cap, with slices of weights where it cannot be kept otherwise."""
        tiling = self._tiled(cap, self.looked_up)
        if tiling is None and (slices := self._slices(cap)):
            return self._tiled(cap, replace(self.looked_up, slices=slices))
        return tiling

    def _slices(self, cap: int) -> tuple[WeightSlices, ...]:
        """Of the large weights, where that brings their readers under the cap: others need tiles, which read weights whole."""
        most = 1 << max(int(cap * _SLICE), _LEAST_SLICE).bit_length() - 1
        found = []
        for cut in slices_of(self._whole, most):
            saved = self._bytes_with(cut.weight) - most
            fits = [self._costs.total[i] - saved <= cap for i in self._sliceable.get(cut.weight, ())]
            if fits and all(fits):
                found.append(cut)
        return tuple(found)

    def _bytes_with(self, key: str) -> int:
        """What is there of a weight when it is read: itself, or what is stored of it and that cast back."""
        nbytes = self._costs.problem.weight_bytes
        if key in nbytes:
            return nbytes[key]
        return nbytes[f"{key}__values"] + nbytes[f"{key}__scales"] + self._whole.weights[key].nbytes

    def _tiled(self, cap: int, parts: Tiling) -> Tiling | None:
        """The regions for a cap, by the first means that keep it.

        Tiles alone; results over larger values; that with operators moved up; then values that live on the host or are computed
        twice.
        """
        if cap < self._search(parts).costs.floor_bytes:
            return None
        for over in (False, True):
            found = self._kept(cap, parts, self._search(parts, over))
            if found is not None:
                return found[1]
        moved = self._moved(cap, parts)
        if moved != parts and (found := self._kept(cap, moved, self._search(moved, over=True))) is not None:
            return found[1]
        twice = self._recomputed(cap, parts, self._search(parts, over=True))
        options = [self._kept(cap, twice, self._search(twice, over=True)) if twice != parts else None]
        for hosting in self._hostings(cap, parts):
            hosted = self._kept(cap, parts, hosting)
            if hosted is None and (twice := self._recomputed(cap, parts, hosting)) != parts:
                hosted = self._kept(cap, twice, self._hosting(twice, hosting.costs.hosting))
            if hosted is not None:
                options.append(hosted)
                break
        kept = [option for option in options if option is not None]
        return min(kept, key=lambda option: option[0])[1] if kept else None

    def _kept(self, cap: int, parts: Tiling, search: TileSearch) -> tuple[float, Tiling] | None:
        """What a search finds for a cap: the seconds of the arithmetic by estimate, and the tiling."""
        first = search
        if cap <= self._failed.get(first, -1):
            return None
        search = self._learned.get(first, first)
        found, rounds = search.tiles(cap), 1
        while found is not None:
            tiling = _with_regions(parts, search.costs, found.tiles)
            again = self._with_held(tiling, search) if search.costs.windows and rounds < _ROUNDS else search
            if again is search:
                self._learned[first] = search
                return search.costs.problem.compute_seconds + found.added_seconds, tiling
            search, found, rounds = again, again.tiles(cap), rounds + 1
        self._failed[first] = cap
        return None

    @cached_property
    def _learned(self) -> dict[TileSearch, TileSearch]:
        """By search the one that knows what tilings for larger caps hold beyond their values."""
        return {}

    @cached_property
    def _failed(self) -> dict[TileSearch, int]:
        """The largest cap that each search did not keep; it is not asked for smaller ones."""
        return {}

    def _with_held(self, tiling: Tiling, search: TileSearch) -> TileSearch:
        """A search that knows what a tiling holds of the memory of larger values; the same one where that is known."""
        costs = search.costs
        held = held_beyond(costs, tiling.tiles)
        known = np.zeros_like(held) if costs.held is None else costs.held
        return search if (held == known).all() else TileSearch(costs.with_held(held), self.freedom.constraint)

    def _moved(self, cap: int, parts: Tiling) -> Tiling:
        """With the operators moved up that end what is there at an operator above the cap."""
        parts = without_regions(parts)
        search = self._search(parts, over=True)
        places = movable(search.costs.problem.program) if search.costs.over else {}
        order = {node.name: i for node, i in search.costs.position.items()}
        spans = {name: range(order[place], order[name] + 1) for name, place in places.items()}
        left = search.left(cap, {i for span in spans.values() for i in span}) if places else []
        wanted = tuple(name for name, span in spans.items() if any(i in span for i in left))
        return replace(parts, moved=wanted)

    def _recomputed(self, cap: int, parts: Tiling, search: TileSearch) -> Tiling:
        """With the norms whose input can be computed again, and that a search leaves above the cap together with it."""
        positions = {node.name: i for node, i in search.costs.position.items()}
        norms = {positions[name]: name for name in recomputable(search.costs.problem.program)}
        left = search.left(cap, norms) if norms else []
        return replace(parts, recomputed=tuple(norms[i] for i in left))

    def _hostings(self, cap: int, parts: Tiling) -> Iterator[TileSearch]:
        """Searches with values on the host, the largest alone first."""
        if not self.freedom.hosting:
            return
        seen: list[TileSearch] = []
        for axis, share in itertools.product(_AXES, _HOSTED):
            search = self._hosting(parts, Hosting(int(cap * share), axis))
            if search.costs.hosted and search not in seen:
                seen.append(search)
                yield search

    def _hosting(self, parts: Tiling, hosting: Hosting | None) -> TileSearch:
        """A search with such values on the host; where they are the same, the same for all caps."""
        base = self._search(parts).costs
        costs = TileCosts(base.problem, hosting, over=True, calls=base.calls)
        key = parts, costs.hosted, hosting.axis if hosting is not None else 0
        return self._hosted.setdefault(key, TileSearch(costs, self.freedom.constraint))

    @cached_property
    def _hosted(self) -> dict[object, TileSearch]:
        return {}

    def _search(self, parts: Tiling, over: bool = False) -> TileSearch:
        """For regions in the program with weights in parts and all norms split; `over`: with results over larger values.

        Through windows, too, where operators are moved up for that.
        """
        if over:
            base = self._search(parts).costs
            if not base.has_larger:
                return self._search(parts)
            if parts not in self._over:
                self._over[parts] = TileSearch(base.with_larger(windows=bool(parts.moved)), self.freedom.constraint)
            return self._over[parts]
        if parts not in self._searches:
            program = self.rewriting.of(parts)
            whole = replace(parts, norms=splittable_norms(program))
            program = run_passes(program, tile_passes(whole))
            same = parts == self.base.tiling and _same_operators(program, self.base.program)
            problem = self.base if same else self.build(program, whole)
            self._searches[parts] = TileSearch(TileCosts(problem), self.freedom.constraint)
        return self._searches[parts]

    @cached_property
    def _over(self) -> dict[Tiling, TileSearch]:
        return {}

    @cached_property
    def _searches(self) -> dict[Tiling, TileSearch]:
        return {}


def _means(tiling: Tiling) -> tuple[bool, ...]:
    """What a tiling does besides tiles, all of which costs more."""
    return tuple(map(bool, (tiling.slices, tiling.over, tiling.moved, tiling.recomputed, tiling.hosted)))


def _same_operators(one: Program, other: Program) -> bool:
    """Whether the passes left everything as it was."""
    return [(n.name, n.target) for n in one.ops()] == [(n.name, n.target) for n in other.ops()]


def _with_regions(parts: Tiling, costs: TileCosts, tiles: tuple[Tile, ...]) -> Tiling:
    """With the norms that lie in a region's stretch, and the results that live on the host or are over larger values."""
    names: set[str] = set()
    regions: list[Region] = []
    hosted: list[str] = []
    over: list[str] = []
    apart: set[str] = set()
    nodes = {node.name: node for node in costs.problem.program.graph.nodes}
    for tile in tiles:
        stretch, seed = stretch_of(nodes, tile)
        names |= {node.name for node in stretch}
        region = find_region(stretch, seed, tile.dim, costs.calls, costs.hosted)
        hosted += [node.name for node in region.results if node in costs.hosted]
        places = costs.written_over(region)
        over += [node.name for node in places.chosen]
        apart |= {n.name for node in places.chosen for n in _made_of(places.over[node].value, regions)}
        regions.append(region)
    halves = {name: {name, f"{name}_statistics"} for name in costs.problem.tiling.norms}
    norms = tuple(name for name, both in halves.items() if both & names or name in parts.recomputed)
    return replace(parts, norms=norms, tiles=tiles, hosted=tuple(hosted), over=tuple(over), apart=tuple(sorted(apart)))


def _made_of(value: fx.Node, regions: Sequence[Region]) -> list[fx.Node]:
    """The results of elementwise operators that are there while a large value comes to be.

    It takes most of the memory: what it is made of should lie where nothing else has been, not within the only room for it.
    """
    region = next((region for region in regions if value in region.results), None)
    made = value.all_input_nodes if region is None else region.operands
    return [node for node in made if in_place_overload(node.target) is not None]
