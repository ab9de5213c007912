"""The checker's part on memory that the tiles of a loop read and write: what they read there was not written over before.

Tiles run in order, and so do the operators of each. Whatever one reads of a memory must be apart from all that was written
there up to then, exactly, element by element; results are written whole and once. Rows that would be written over are kept in
small buffers: what is read of those is followed by what is still there, in one join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from passes.check_cuts import Box, Cut, box, contains, follows, interval, is_whole, joined, overlap
from passes.check_kernels import Value
from passes.check_memory import Memory, Place
from passes.spec import TensorSpec
from runtime.errors import CheckError

aten = torch.ops.aten


@dataclass
class Ground:
    """One memory, while a loop runs.

    Attributes:
        frame: the tensor in which parts of it are boxes; None where operands are not.
        places: what is to be written there. blank: nothing is there so far. held: where there is what operands are, all of it
            where that is None. whole: the first operand there.
        written: what tiles have written so far. mine: of that what the tile has that runs. cuts: the same by place.
        kept: of a buffer for what is kept, from which memory its rows are. again: tiles have read it, or written it anew.
    """

    frame: TensorSpec | None
    places: list[Place]
    blank: bool
    held: list[Box] | None
    whole: TensorSpec
    written: list[Box] = field(default_factory=list)
    mine: list[Box] = field(default_factory=list)
    cuts: dict[str, list[Cut]] = field(default_factory=dict)
    kept: tuple[int, Box] | None = None
    again: bool = False


class Grounds:
    """What tiles do to the memories of a loop's operands, by key. `error` makes what is raised."""

    def __init__(self, memory: Memory, values: Iterable[tuple[str, Value]], error: Callable[[str, str], CheckError]) -> None:
        self._memory, self._error = memory, error
        specs: dict[int, list[tuple[str, TensorSpec]]] = {}
        for name, (spec, key) in values:
            specs.setdefault(key, []).append((name, spec))
        self._of = {key: self._ground(key, operands) for key, operands in specs.items()}

    def _ground(self, key: int, operands: list[tuple[str, TensorSpec]]) -> Ground:
        storage = self._memory.storages[key]
        frames = [storage.frame, *(spec for _, spec in operands)]
        whole = operands[0][1]
        frame = next((f for f in frames if f is not None and all(box(spec, f) is not None for _, spec in operands)), None)
        if storage.blank:
            return Ground(frame, storage.places, True, [], whole)
        if not storage.places or frame is None:
            return Ground(frame, storage.places, False, None, whole)
        names = {place.name for place in storage.places}
        held = [found for name, spec in operands if name not in names and (found := box(spec, frame)) is not None]
        return Ground(frame, storage.places, False, held, whole)

    def next_tile(self) -> None:
        for ground in self._of.values():
            ground.mine = []

    def is_written(self, key: int) -> bool:
        return bool(self._of[key].written)

    def is_kept(self, key: int) -> bool:
        """Whether a buffer held what some tiles keep for others: nothing reads it afterwards."""
        return self._of[key].kept is not None and self._of[key].again

    def is_complete(self, key: int) -> bool:
        """Whether every element of what is to be written in a memory was."""
        ground = self._of[key]
        places = {place.name: place.spec for place in ground.places} or {"": ground.whole}
        return all(is_whole(ground.cuts.get(name, []), spec.shape or (1,)) for name, spec in places.items())

    def read(self, node: fx.Node, key: int, spec: TensorSpec) -> None:
        """An operator of a tile reads part of a memory."""
        ground = self._of[key]
        if ground.kept is not None:
            self._read_kept(node, key, spec)
            return
        if ground.held is None and not ground.written:
            return
        part = None if ground.frame is None else box(spec, ground.frame)
        if ground.held is not None and not any(part is not None and contains(held, part) for held in ground.held):
            raise self._error("I5", f"{node.name} reads {self._name(key)}, which nothing has written")
        if any(part is None or overlap(part, other) for other in ground.written):
            who = "the same tile" if any(part is not None and overlap(part, other) for other in ground.mine) else "another tile"
            raise self._error("I5", f"{node.name} reads what {who} has written over")

    def write(self, node: fx.Node, key: int, target: TensorSpec) -> None:
        """An operator of a tile writes part of a memory."""
        ground = self._of[key]
        if self._keep(node, ground, target):
            return
        if not ground.blank and not ground.places:
            raise self._error("I5", f"{node.name} writes over {self._name(key)}, and no result is to be written there")
        places = {place.name: place.spec for place in ground.places} or {"": ground.whole}
        cuts = [(name, cut) for name, spec in places.items() if (cut := _inner(target, spec)) is not None]
        part = None if ground.frame is None else box(target, ground.frame)
        if not cuts or part is None:
            raise self._error("I5", f"{node.name} writes no interval of its operand")
        if any(overlap(part, other) for other in ground.written):
            who = "the same tile" if any(overlap(part, other) for other in ground.mine) else "another tile"
            raise self._error("I5", f"{node.name} writes what {who} has written")
        name, cut = cuts[0]
        ground.cuts.setdefault(name, []).append(cut)
        ground.mine.append(part)
        ground.written = joined(ground.written, part)

    def _keep(self, node: fx.Node, ground: Ground, target: TensorSpec) -> bool:
        """Notes which rows of which memory a whole new buffer holds from now on; False where it is for something else."""
        source = node.args[1] if node.target is aten.copy_.default else None
        if not ground.blank or target != ground.whole or not isinstance(source, fx.Node):
            return False
        spec, key = self._memory.only(source)
        other = self._of.get(key)
        part = None if other is None or other.frame is None else box(spec, other.frame)
        if part is None or spec.shape != target.shape or (ground.written and ground.kept is None):
            return False
        if ground.mine:
            raise self._error("I5", f"{node.name} writes what the same tile has written")
        ground.again |= ground.kept is not None
        ground.kept, whole = (key, part), Cut(0, 0, target.shape[0])
        ground.mine, ground.cuts = [part], {"": [whole]}
        ground.written = [part]
        return True

    def _read_kept(self, node: fx.Node, key: int, spec: TensorSpec) -> None:
        """What was kept is read with what follows it, where that was."""
        ground = self._of[key]
        ground.again = True
        args: Any = node.args
        parts = [self._memory.only(part) for part in args[0]] if node.target is aten.cat.default else []
        dim = (args[1] if len(args) > 1 else 0) % max(len(spec.shape), 1)
        boxes = [self._origin(*part) for part in parts]
        pairs = pairwise(boxes)
        fits = len(boxes) > 1 and all(a and b and a[0] == b[0] and follows(a[1], b[1], dim) for a, b in pairs)
        if not fits or any(part[1] == key and part[0] != ground.whole for part in parts):
            raise self._error("I5", f"{node.name} reads what was kept in {self._name(key)}, and not what follows it there")

    def _origin(self, spec: TensorSpec, key: int) -> tuple[int, Box] | None:
        """The memory, and the elements of it, that a value is or was copied from."""
        ground = self._of.get(key)
        if ground is None:
            return None
        part = None if ground.frame is None else box(spec, ground.frame)
        return ground.kept if ground.kept is not None else (key, part) if part is not None else None

    def _name(self, key: int) -> str:
        return min(self._memory.storages[key].values, default="its operand")


def _inner(part: TensorSpec, whole: TensorSpec) -> Cut | None:
    """Which interval of a result a view is; None for none of it."""
    if not whole.shape:
        return Cut(0, 0, 1) if part == whole else None
    found = interval(part, whole)
    inside = found is not None and 0 <= found.start <= found.stop <= whole.shape[found.dim]
    return found if inside else None
