"""Which weights may be stored in a smaller type, in the order in which that is worth most for the error that it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from passes.cast_weights import STORAGE_TYPES, Cast
from passes.program import Program


@dataclass(frozen=True)
class Candidate:
    """One weight in a storage type. `noise`: its relative error by that; `gain`: how much of that error's power the result has.

    `measured`: whether the noise is that of its values, and not of typical ones.
    """

    cast: Cast
    saved_bytes: int
    noise: float
    gain: float
    measured: bool

    @property
    def power(self) -> float:
        """What it adds to the square of the result's relative error."""
        return self.gain * self.noise**2


@dataclass(frozen=True)
class Casting:
    """Candidates, those that save most for the error first: the first k of them are the casts of k weights.

    `scale`: by how much errors that were measured exceed what is estimated here.
    """

    candidates: tuple[Candidate, ...] = ()
    scale: float = 1.0

    @property
    def casts(self) -> tuple[Cast, ...]:
        """All of them."""
        return tuple(candidate.cast for candidate in self.candidates)

    def error(self, casts: Iterable[Cast]) -> float:
        """The relative error of the result, estimated, with those weights cast; NaN where one of them is no candidate."""
        powers = {candidate.cast.weight: candidate.power for candidate in self.candidates}
        return float(self.scale * sum(powers.get(cast.weight, math.nan) for cast in casts) ** 0.5)

    def is_measured(self) -> bool:
        """Whether the noise of all weights is that of their values, and not of typical ones."""
        return all(candidate.measured for candidate in self.candidates)

    def within(self, max_error: float) -> Casting:
        """As many as keep the estimated error within a bound."""
        powers = accumulate(candidate.power for candidate in self.candidates)
        count = sum(1 for power in powers if self.scale * power**0.5 <= max_error)
        return Casting(self.candidates[:count], self.scale)

    def count_for(self, nbytes: float) -> int:
        """How many save so many bytes; one at least, all where they save less."""
        saved = accumulate(candidate.saved_bytes for candidate in self.candidates)
        return min(1 + sum(1 for known in saved if known < nbytes), len(self.candidates))


NO_CASTS = Casting()


def saved_bytes(program: Program, key: str, dtype: str) -> int:
    """By storing a weight in a type, scales aside."""
    spec = program.weights[key].spec
    return spec.numel * (spec.dtype.itemsize - STORAGE_TYPES[dtype].itemsize)


def ordered(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """The most bytes for the error first; of equals as they come."""
    return tuple(sorted(candidates, key=lambda each: each.power / each.saved_bytes))
