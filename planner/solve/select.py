"""Which bundles to stream: families of selections, none of which depends on the budget that is asked for.

So a larger budget has every selection that a smaller one has, and is never slower.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from planner.bounds import physical_bound
from planner.solve.bundles import TINY_BYTES, BundleSpan, hold_tiny, make_bundles, spread_evenly, spread_fractions
from planner.solve.problem import Problem
from planner.solve.relax import Relaxation, relax
from planner.solve.segments import Segments

MIB = 1024 * 1024
# (bundle target, what is too small to stream). The finest comes last: it sets the minimum budget.
GRANULARITIES = ((64 * MIB, TINY_BYTES), (16 * MIB, TINY_BYTES), (0, TINY_BYTES), (0, 0))
# Even selections stream so many bytes as powers of this, up to so many times all weights: what is not there in time is owed.
_TARGET_RATIO = 1.005
_MOST_TARGET = 16
# A bundle is chosen once this share of it is due.
_PHASES = (0.5, 0.95)
# Linear programs are solved for budgets in this ratio, and in so many steps between two of them interpolated.
_BUDGET_RATIO = 1.2
_BETWEEN = 40
# With more visits than these, every other target and step and fewer granularities and sizes do, or every fourth: bundles are a
# small share there.
_MANY_VISITS, _VERY_MANY_VISITS = 400, 2000

Selection = tuple[BundleSpan, ...]


@dataclass(frozen=True, eq=False)
class Selections:
    """The selections of one problem; `seam`: whether calls follow each other and prefetch for the next."""

    problem: Problem
    segments: Segments
    seam: bool
    least_bytes: int
    most_bytes: int

    def least_seconds(self, selection: Selection) -> float:
        """What no schedule of the selection can beat."""
        machine = self.problem.machine
        return max(self.problem.compute_seconds, sum(machine.copy_seconds(span.nbytes) for span in selection))

    def even(self, budget_bytes: int, enough: Callable[[], float]) -> Iterator[Selection]:
        """Evenly by compute time, the fewest bytes first, as long as one may beat `enough()`.

        Of large bundles and small ones, of all weights and of those up to some size: a buffer is taken as a whole.
        """
        needed = physical_bound(self.problem, budget_bytes).streamed_bytes
        exponent = math.ceil(math.log(max(needed, 1)) / math.log(_TARGET_RATIO))
        exponent += -exponent % self._stride
        while (target := _TARGET_RATIO**exponent) <= _MOST_TARGET * self.problem.total_weight_bytes:
            if target / self.problem.machine.link_peak_bandwidth >= enough():
                break
            yield from self._even_at(exponent)
            coarse = 20 if self._stride == 4 else 10  # beyond all weights the bytes that are owed change little
            exponent += self._stride if target < self.problem.total_weight_bytes else coarse - exponent % coarse
        yield from self._even_at(None)

    def _even_at(self, exponent: int | None) -> Sequence[Selection]:
        """The selections for one target, by its logarithm; None is everything."""
        if exponent not in self._known:
            target = math.inf if exponent is None else _TARGET_RATIO**exponent
            found: dict[Selection, None] = {}
            for spans in self._some_granularities:
                sizes = sorted({span.nbytes for span in spans})
                enough = [size for size in sizes if sum(s.nbytes for s in spans if s.nbytes <= size) >= target]
                for largest in dict.fromkeys([*enough[: max(1, 3 - self._stride)], math.inf]):
                    for phase in _PHASES:
                        selection = spread_evenly(self.problem, spans, min(target, 1e30), largest, phase)
                        if selection:
                            found |= dict.fromkeys((selection, self._to_the_end(selection, spans)))
            self._known[exponent] = list(found)
        return self._known[exponent]

    def _to_the_end(self, selection: Selection, spans: Selection) -> Selection:
        """The last streamed bundle exchanged for the last there is: what is computed behind it, no copy is hidden by."""
        exchanged = {*selection[-1].weights, *spans[-1].weights}
        if self.seam or selection[-1] == spans[-1] or exchanged & self.problem.revisited:
            return selection
        return (*selection[:-1], spans[-1])

    @cached_property
    def _known(self) -> dict[int | None, list[Selection]]:
        return {}

    @cached_property
    def uniform(self) -> list[tuple[Selection, float]]:
        """Whole roles: what has the same name but for numbers is streamed everywhere or nowhere. Fewest bytes first."""
        nbytes: dict[str, int] = {}
        for weight in self._names:
            nbytes[self.role(weight)] = nbytes.get(self.role(weight), 0) + self.problem.weight_bytes[weight]
        chosen: dict[Selection, float] = {}
        for order in (sorted(nbytes, key=lambda r: -nbytes[r]), sorted(nbytes, key=lambda r: nbytes[r])):
            for count in range(1, len(order) + 1):
                taken = set(order[:count])
                for spans in self.granularities[:1] + self.granularities[-1:]:
                    fractions = {w: 1.0 for w in self._names if self.role(w) in taken}
                    selection = spread_fractions(self.problem, spans, fractions, 0)
                    if selection:
                        chosen[selection] = self.least_seconds(selection)
        return sorted(chosen.items(), key=lambda item: sum(s.nbytes for s in item[0]))

    def relaxed(self, budget_bytes: int, enough: Callable[[], float]) -> Iterator[Selection]:
        """Roundings of linear programs for budgets up to this one, the largest first, as long as one may beat `enough()`."""
        for low, high, share, at in self._grid(budget_bytes):
            if physical_bound(self.problem, at).seconds >= enough():
                return
            a, b = self._relaxed(low), self._relaxed(high)
            if a is None or b is None:
                continue
            fractions = {
                name: ((1 - share) * a.streamed.get(name, 0.0) + share * b.streamed.get(name, 0.0))
                / self.problem.weight_bytes[name]
                for name in a.streamed.keys() | b.streamed.keys()
            }
            needed = physical_bound(self.problem, at).streamed_bytes
            for spans in self._some_granularities:
                selection = spread_fractions(self.problem, spans, fractions, needed)
                if selection:
                    yield selection

    def split_roles(self, selection: Selection) -> int:
        """How many roles are streamed in part: what makes a plan hard to read."""
        streamed = {weight for span in selection for weight in span.weights}
        some = {self.role(weight) for weight in streamed}
        rest = {self.role(weight) for weight in self._names if weight not in streamed}
        return len(some & rest)

    def role(self, weight: str) -> str:
        """The weight's name with its numbers taken out."""
        return self._roles[weight]

    @cached_property
    def _roles(self) -> Mapping[str, str]:
        weights = self.problem.program.weights
        return {key: re.sub(r"\d+", "*", weights[key].name) for key in self.problem.weight_bytes}

    @cached_property
    def _names(self) -> list[str]:
        return [w for w, n in self.problem.weight_bytes.items() if w not in self.problem.pinned and n > TINY_BYTES]

    @cached_property
    def granularities(self) -> list[Selection]:
        """Everything that may be streamed, in bundles of several sizes."""
        found = [make_bundles(self.problem, target, tiny) for target, tiny in GRANULARITIES]
        return list(dict.fromkeys([*found, hold_tiny(self.problem, found[-1])]))

    @cached_property
    def _stride(self) -> int:
        count = len(self.problem.visits)
        return 1 if count <= _MANY_VISITS else 2 if count <= _VERY_MANY_VISITS else 4

    @cached_property
    def _some_granularities(self) -> list[Selection]:
        return self.granularities[:: self._stride]

    def _grid(self, budget_bytes: int) -> Iterator[tuple[int, int, float, int]]:
        """(lower budget, higher budget, share of the higher, budget in between), the last falling from `budget_bytes` on."""
        ends = [float(self.least_bytes)]
        while ends[-1] < self.most_bytes:
            ends.append(min(ends[-1] * _BUDGET_RATIO**self._stride, float(self.most_bytes)))
        for low, high in reversed(list(pairwise(ends))):
            for step in range(_BETWEEN, 0, -1):
                at = low + (high - low) * step / _BETWEEN
                if at <= budget_bytes:
                    yield int(low), int(high), step / _BETWEEN, int(at)

    def _relaxed(self, budget_bytes: int) -> Relaxation | None:
        if budget_bytes not in self._solved:
            self._solved[budget_bytes] = relax(self.problem, self.segments, budget_bytes, seam=self.seam)
        return self._solved[budget_bytes]

    @cached_property
    def _solved(self) -> dict[int, Relaxation | None]:
        return {}
