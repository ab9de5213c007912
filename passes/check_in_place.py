"""The checker's part on memory that is written over: an `alias` announces it, writes that cover it exactly once complete it.

Canonical programs have no `alias`, so what a module itself writes in place is none of this. Until such memory is complete
nothing reads it, but for the operator that writes over its own argument, and that only through that argument. Afterwards the
names that the memory had before are nobody's (I5). Results of loops are written by their tiles: see `passes.check_loops`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from passes.check_cuts import Cut, interval, is_whole
from passes.check_memory import Memory, Place
from passes.spec import TensorSpec
from runtime.errors import CheckError


class Replay(Protocol):
    """What the replay of a whole program does for that of its aliases."""

    memory: Memory

    def error(self, invariant: str, message: str) -> CheckError: ...


class InPlace:
    """Follows what is announced by an `alias` and written outside of loops, or in memory that a tile made itself."""

    def __init__(self, replay: Replay) -> None:
        self._replay, self._memory = replay, replay.memory

    def announce(self, node: fx.Node) -> None:
        """An operator gave a value: an `alias` is a name for what will be written there."""
        if node.target is not torch.ops.aten.alias.default:
            return
        spec, key = self._memory.only(node)
        storage, before = self._memory.storages[key], self._memory.names_in(key, spec) - {node.name}
        again = [place for place in storage.places if place.name in before]  # announced, and not written so far
        storage.places = [place for place in storage.places if place not in again]
        storage.places.append(Place(node.name, spec, frozenset(before), full=not again and not storage.blank))

    def write(self, node: fx.Node, key: int) -> None:
        """Notes what an operator writes of a storage, in which a result is complete once all of it is written."""
        storage = self._memory.storages[key]
        if not storage.places:
            return
        leaves = [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
        mine = [leaf for leaf in leaves if key in self._memory.keys(leaf.name)]
        if len(mine) > 1:
            raise self._error(f"{node.name} reads of {mine[0].name} what it may have written over")
        target, spec = mine[0], self._memory.only(mine[0])[0]
        place = next((place for place in storage.places if _part(spec, place.spec) is not None), storage.places[-1])
        if node.target is not torch.ops.aten.copy_.default and not place.full:
            raise self._error(f"{node.name} reads {target.name}, which nothing has written")
        if target.name in place.before:
            raise self._error(f"{node.name} writes {target.name}, over which {place.name} is to be written")
        part = _part(spec, place.spec)
        if part is None:
            raise self._error(f"{node.name} writes no interval of {place.name}")
        if any(part.dim != other.dim or _overlap(part, other) for other in place.cuts):
            raise self._error(f"{node.name} writes what is written of {place.name}")
        place.cuts.append(part)
        if is_whole(place.cuts, place.spec.shape or (1,)):
            self._complete(key, place, target.name)

    def _complete(self, key: int, place: Place, target: str) -> None:
        """What there was before is gone; so are the names through which it was written over, where the result has its own."""
        keeps = place.name if target != place.name else None
        storage = self._memory.storages[key]
        storage.gone |= self._memory.names_in(key, place.spec) - {keeps}
        storage.places.remove(place)

    def _error(self, message: str) -> CheckError:
        return self._replay.error("I5", message)


def _part(part: TensorSpec, whole: TensorSpec) -> Cut | None:
    """Which elements of what is to be written a view is; None for no interval of it."""
    if part.dtype != whole.dtype:
        return None
    if (part.shape, part.stride, part.offset) == (whole.shape, whole.stride, whole.offset):
        return Cut(0, 0, whole.shape[0] if whole.shape else 1)
    found = interval(part, whole)
    inside = found is not None and 0 <= found.start <= found.stop <= whole.shape[found.dim]
    return found if inside else None


def _overlap(part: Cut, other: Cut) -> bool:
    return part.start < other.stop and other.start < part.stop
