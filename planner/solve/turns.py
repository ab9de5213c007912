"""The calls of a pipeline's run one after the other: what is on the device at each, what comes before it, what goes after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from planner.solve.phases import MemberShare, MemberShares


@dataclass(frozen=True)
class Turn:
    """One call.

    Attributes:
        key, phase: of its member, and of the run.
        there: the other members whose arenas are on the device while it runs; after: those that still are when it is over.
        loads: whether its resident weights have to come before it.
        last: whether its own arenas, which stayed so far, go when it is over.
        again: whether its arenas were on the device before it.
        brings: whether weights of the next member may come while it runs: that has to wait for them, and nobody who is there
            has them.
    """

    key: str
    phase: int
    there: frozenset[str]
    after: frozenset[str]
    loads: bool
    last: bool
    again: bool
    brings: bool = False


def turns_of(order: Sequence[tuple[str, int]], shares: MemberShares, phases: Mapping[str, Sequence[int]]) -> tuple[Turn, ...]:
    """The calls of `order`, members and phases, as the runtime has them come and go; `phases` are those of each member."""
    turns: list[Turn] = []
    loaded = frozenset(key for key, share in shares.items() if share.stay == "always")

    def staying(keys: frozenset[str], phase: int | None) -> frozenset[str]:
        return frozenset(k for k in keys if _stays(shares[k], phase, phases[k]))

    for at, (key, phase) in enumerate(order):
        following = order[at + 1][1] if at + 1 < len(order) else None
        there = staying(loaded - {key}, phase)
        fresh = key not in loaded
        known = any(shares[other].resident == shares[key].resident for other in there)
        loaded = staying(there | {key}, following)
        last = shares[key].stay == "phase" and key not in loaded
        turns.append(Turn(key, phase, there, loaded, fresh and not known and bool(shares[key].resident), last, not fresh))
    for at, (turn, after) in enumerate(pairwise(turns)):
        wanted = shares[after.key].resident
        known = any(shares[key].resident == wanted for key in {*turn.there, turn.key})
        turns[at] = replace(turn, brings=after.loads and not known)
    return tuple(turns)


def _stays(share: MemberShare, phase: int | None, phases: Sequence[int]) -> bool:
    return share.stay == "always" or (share.stay == "phase" and phase in phases)
