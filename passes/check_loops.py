"""The checker's part on loops: every tile is replayed, what they write is complete, and bands come and go in order.

Like the rest of the checker it shares no code with what made the loops. It proves that tiles write every element of a result
once, that nothing they make outlives them, and that a slot is neither read nor refilled at the wrong time. Whether a tile reads
the rows that its operators need is known to the tile rules alone, and is what tests hold against the untiled operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from passes.check_cuts import Cut, is_whole
from passes.check_kernels import Kernels
from passes.check_memory import Memory, Storage
from passes.check_over import Grounds
from passes.loop import Run
from passes.spec import TensorSpec
from runtime import ops
from runtime.errors import CheckError
from runtime.layout import HostPlace, Layout

_SELECT = torch.ops.aten.select.int


class _Band(NamedTuple):
    """A band of the host value in storage `value`."""

    value: int
    start: int
    stop: int


@dataclass
class _Room:
    """A slot that was emptied for a band; `filled` once all of it is written."""

    band: _Band
    shape: tuple[int, ...]
    filled: bool = False


@dataclass
class _Tile:
    """One round: storages from `first` on are its own, names that are `given` are not. `saved`: where it has saved a band."""

    first: int
    given: frozenset[str]
    saved: set[int] = field(default_factory=set)


@dataclass
class _Loop:
    """What the tiles of a loop have done so far, by storage.

    Attributes:
        grounds: what tiles read and write of what was there before. saved: by value on the host the bands that were written.
        slots: what bands come and go through. coming: the band that is on its way. asked: slots to which one has come.
        rooms: by slot, what is written next to the host.
    """

    node: fx.Node
    grounds: Grounds
    saved: dict[int, list[Cut]] = field(default_factory=dict)
    slots: set[int] = field(default_factory=set)
    coming: dict[int, _Band] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    rooms: dict[int, _Room] = field(default_factory=dict)
    tile: _Tile = field(default_factory=lambda: _Tile(0, frozenset()))


class Replay(Protocol):
    """What the replay of a whole program does for that of its loops."""

    memory: Memory
    kernels: Kernels
    layout: Layout

    def step(self, node: fx.Node) -> None:
        """Replays one node."""

    def readable(self, value: fx.Node) -> None:
        """Raises CheckError where a value cannot be read here."""

    def error(self, invariant: str, message: str) -> CheckError: ...


class Loops:
    """Replays loops, and the values on the host that they read and write in bands."""

    def __init__(self, replay: Replay) -> None:
        self._replay, self._memory, self._kernels = replay, replay.memory, replay.kernels
        self._now: _Loop | None = None

    @property
    def node(self) -> fx.Node | None:
        """The loop of which a tile is being replayed."""
        return None if self._now is None else self._now.node

    def loop(self, node: fx.Node) -> None:
        """Tiles leave nothing behind but what they write, and write every element of a result exactly once (I5)."""
        for value in node.all_input_nodes:
            self._replay.readable(value)
        memory, operands = self._memory, cast(Sequence[fx.Node], node.args[0])
        outer, freed = memory.values, memory.freed
        values = [(o.name, value) for o in operands for value in outer[o.name] if value is not None]
        self._now = _Loop(node, Grounds(memory, values, self._replay.error))
        for run in node.meta["loop"].runs:
            bound, columns = run.placeholders[: len(operands)], run.placeholders[len(operands) :]
            given = {inner.name: outer[o.name] for inner, o in zip(bound, operands, strict=True)}
            self._check_names(run, columns, outer.keys() | given.keys())
            for row in run.table:
                if len(row) != len(columns):
                    raise self._error("I5", f"a tile of {node.name} has {len(row)} numbers for {len(columns)} columns")
                memory.values, memory.freed = given | {column.name: [] for column in columns}, set()
                self._kernels.numbers = {column.name: number for column, number in zip(columns, row, strict=True)}
                self._tile(run)
        memory.values, memory.freed, self._kernels.numbers = outer, freed, {}
        done, self._now = self._now, None
        for operand in operands:
            self._check_operand(done, operand)

    def _check_names(self, run: Run, columns: Sequence[fx.Node], taken: set[str]) -> None:
        """Names of a body are variables like those outside: each has one meaning."""
        known = set(taken)
        for node in (*columns, *run.operators):
            if node.name in known:
                raise self._error("I4", f"{node.name} has two meanings in the tiles of {self._loop.node.name}")
            known.add(node.name)

    def _tile(self, run: Run) -> None:
        loop, memory = self._loop, self._memory
        loop.tile = tile = _Tile(len(memory.storages), frozenset(memory.values))
        loop.grounds.next_tile()
        for node in run.operators:
            self._replay.step(node)
            self._check_shape(node)
        mine = memory.values.keys() - tile.given
        left = [name for name in mine for key in memory.keys(name) if name in memory.storages[key].values]
        if left:
            raise self._error("I4", f"a tile of {loop.node.name} leaves {min(left)} behind")
        unsaved = [slot for slot, room in loop.rooms.items() if room.filled]
        if unsaved:
            raise self._error("I5", f"a tile of {loop.node.name} writes a band and does not save it")
        loop.rooms.clear()

    def _check_shape(self, node: fx.Node) -> None:
        """A body is for parts of some sizes."""
        known, value = node.meta.get("val"), self._memory.values.get(node.name)
        if isinstance(known, torch.Tensor) and value and value[0] is not None and value[0][0].shape != tuple(known.shape):
            raise self._error(
                "I5", f"{node.name} has the shape {list(value[0][0].shape)} in a tile of {self._loop.node.name}, "
                f"whose body is for {list(known.shape)}"
            )  # fmt: skip

    def _check_operand(self, loop: _Loop, operand: fx.Node) -> None:
        """What the loop writes it writes whole; what is only there to be written, it writes. What was kept is nobody's."""
        for key, storage in self._memory.storages_of(operand).items():
            if key in loop.slots:
                if key in loop.coming:
                    raise self._error("I4", f"a band is on its way to {operand.name} when {loop.node.name} ends")
                continue
            if storage.host is not None:
                written, whole = key in loop.saved, self._memory.only(operand)[0].shape
                complete = is_whole(loop.saved.get(key, []), whole)
                unwritten = not storage.complete
            else:
                written, complete = loop.grounds.is_written(key), loop.grounds.is_complete(key)
                unwritten = storage.blank or bool(storage.places)
            if (written or unwritten) and not complete:
                raise self._error("I5", f"the tiles of {loop.node.name} do not write every element of {operand.name} once")
            if written:
                storage.complete, storage.blank = True, storage.host is None and loop.grounds.is_kept(key)
                storage.gone |= {name for place in storage.places for name in place.before}
                storage.places = []

    # Operators within a tile.

    def is_own(self, key: int) -> bool:
        """Whether a storage is no operand of the loop that runs: none does, or a tile has made it."""
        return self._now is None or key >= self._now.tile.first

    def check_arguments(self, node: fx.Node) -> None:
        """Raises CheckError where a tile takes a part that is not there; the kernel would take less, or from the other end."""
        if self._now is None or node.target not in (torch.ops.aten.slice.Tensor, _SELECT):
            return
        if not any(isinstance(bound, fx.Node) for bound in node.args[2:]):
            return  # the program's own slice, which may count from the end
        source, dim, *bounds = cast(Any, node.args)
        size = self._memory.only(source)[0].shape[dim]
        at = [self._number(bound) for bound in bounds[:2]]
        inside = 0 <= at[0] < size if node.target is _SELECT else 0 <= at[0] <= at[-1] <= size
        if not inside:
            where = ":".join(map(str, at))
            raise self._error("I5", f"{node.name} takes {where} of the {size} elements of {source} along dimension {dim}")

    def reads(self, node: fx.Node, written: Sequence[int]) -> None:
        """Checks what an operator of a tile reads of what was there before; it writes its first argument, if it writes."""
        if self._now is None:
            return
        leaves = [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
        first = 1 if written and node.target is torch.ops.aten.copy_.default else 0
        for spec, key in (v for value in leaves[first:] for v in self._memory.values[value.name] if v is not None):
            if key < self._now.tile.first and key not in self._now.slots and self._memory.storages[key].host is None:
                self._now.grounds.read(node, key, spec)

    def writes(self, node: fx.Node, key: int) -> None:
        """Checks what of which operand an operator of a tile writes."""
        if self._now is None or key >= self._now.tile.first:
            return
        target = self._memory.only(node.all_input_nodes[0])[0]
        if key not in self._now.slots:
            self._now.grounds.write(node, key, target)
            return
        room = self._now.rooms.get(key)
        if room is None or target.shape != room.shape:
            raise self._error("I4", f"{node.name} writes to a slot that was not emptied for it")
        room.filled = True

    # Values on the host: places, and the slots through which their bands come and go.

    def host(self, node: fx.Node) -> None:
        """Gives a value its place on the host, where nothing else may be (I2)."""
        index, shape, dim, dtype = cast(Any, node.args)
        with FakeTensorMode():
            places, value = self._replay.layout.hosted, ops.host(index, shape, dim, dtype)
        if not 0 <= index < len(places):
            raise self._error("I3", f"{node.name} has the place {index} on the host, and the layout has no such place")
        place = places[index]
        ends = place.offset + place.nbytes
        if value.numel() * value.dtype.itemsize > place.nbytes or place.offset < 0 or ends > self._replay.layout.host_bytes:
            raise self._error("I2", f"{node.name} does not fit its place on the host")
        for storage in self._memory.storages.values():
            if storage.host is not None and storage.values and _share_bytes(place, storage.host):
                raise self._error("I2", f"{node.name} is on the host where {min(storage.values)} still is")
        key = self._memory.add(Storage(0, host=place, bands=dim))
        self._memory.name(node, [(TensorSpec.of(value), key)])

    def band(self, node: fx.Node) -> None:
        """A band comes or goes through its slot (I3, I4)."""
        if self._now is None:
            raise self._error("I4", f"{node.name} is outside of a loop")
        value, slot, dim, *bounds = cast(Any, node.args)
        for argument in (value, slot):
            self._replay.readable(argument)
        (spec, key), (room, where) = self._memory.only(value), self._memory.only(slot)
        start, stop = map(self._number, bounds)
        storage, inside = self._memory.storages[key], 0 <= start <= stop <= spec.shape[dim]
        rest = prod(n for d, n in enumerate(spec.shape) if d != dim)
        fits = (stop - start) * rest <= prod(room.shape) and spec.dtype == room.dtype
        if storage.host is None or dim != storage.bands or not inside or not fits:
            raise self._error("I3", f"{node.name} is no band of a value on the host that fits its slot")
        self._now.slots.add(where)
        band = _Band(key, start, stop)
        if node.target is ops.save:
            self._save(node, band, where, dim)
        elif node.target is ops.ahead:
            self._ahead(node, band, where)
        else:
            view = _banded(spec, dim, stop - start)
            self._fetch(node, band, where) if node.target is ops.fetch else self._room(node, band, where, view)
            self._memory.name(node, [(view, where)])

    def _save(self, node: fx.Node, band: _Band, where: int, dim: int) -> None:
        room = self._loop.rooms.pop(where, None)
        if room is None or not room.filled or room.band != band:
            raise self._error("I3", f"{node.name} saves a band that is not in its slot")
        if band.value in self._loop.tile.saved:
            raise self._error("I5", f"{node.name} writes what the same tile has written")
        self._loop.tile.saved.add(band.value)
        self._loop.saved.setdefault(band.value, []).append(Cut(dim, band.start, band.stop))

    def _ahead(self, node: fx.Node, band: _Band, where: int) -> None:
        if band.start == band.stop:
            return  # nothing comes
        self._check_complete(node, band)
        self._check_unread(node, where)
        if where in self._loop.coming:
            raise self._error("I4", f"{node.name} asks for a band while another is on its way to the slot")
        self._loop.coming[where] = band

    def _fetch(self, node: fx.Node, band: _Band, where: int) -> None:
        """The first band of a slot comes when it is wanted, each later one was asked for."""
        self._check_complete(node, band)
        self._check_unread(node, where)
        coming = self._loop.coming.pop(where, None)
        if coming is None and where in self._loop.asked:
            raise self._error("I3", f"{node.name} reads a band that nobody asked for")
        if coming is not None and coming != band:
            raise self._error("I3", f"{node.name} reads another band than the one on its way")
        self._loop.asked.add(where)
        self._memory.storages[where].blank = False

    def _room(self, node: fx.Node, band: _Band, where: int, view: TensorSpec) -> None:
        self._check_unread(node, where)
        if where in self._loop.coming:
            raise self._error("I4", f"{node.name} writes to a slot to which a band is on its way")
        self._loop.rooms[where] = _Room(band, view.shape)

    def _check_complete(self, node: fx.Node, band: _Band) -> None:
        if not self._memory.storages[band.value].complete:
            raise self._error("I3", f"{node.name} reads a value on the host before all of it was written")

    def _check_unread(self, node: fx.Node, where: int) -> None:
        mine = self._memory.values.keys() - self._loop.tile.given
        views = self._memory.storages[where].values & mine
        if views:
            raise self._error("I4", f"{node.name} refills a slot that {min(views)} still reads")

    @property
    def _loop(self) -> _Loop:
        assert self._now is not None
        return self._now

    def _number(self, bound: Any) -> int:
        return self._kernels.numbers[bound.name] if isinstance(bound, fx.Node) else int(bound)

    def _error(self, invariant: str, message: str) -> CheckError:
        return self._replay.error(invariant, message)


def _banded(spec: TensorSpec, dim: int, size: int) -> TensorSpec:
    """A band of `size` in its slot: dimension `dim` is the outermost one, the others are in order."""
    strides, step = [0] * len(spec.shape), 1
    for d in reversed([dim, *(d for d in range(len(spec.shape)) if d != dim)]):
        strides[d], step = step, step * spec.shape[d]
    return TensorSpec(tuple(size if d == dim else n for d, n in enumerate(spec.shape)), tuple(strides), spec.dtype)


def _share_bytes(a: HostPlace, b: HostPlace) -> bool:
    return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes
