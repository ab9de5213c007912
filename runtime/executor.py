"""The executor: holds the arenas of one target and runs its programs, one loaded at a time, in the same memory.

Inside an emitted program it is `rt`: `prefetch`, `onload` and `evict` are called in program order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from runtime.arena import Arena
from runtime.bands import Bands
from runtime.devices.base import Copied, Device
from runtime.devices.feeder import Feeder, parts_of
from runtime.devices.ring import Ring
from runtime.early import Arriving
from runtime.emit import attribute_names, compile_source
from runtime.executable import Executable, WeightView
from runtime.layout import Bundle, HostLayout
from runtime.store import HostStore
from runtime.tables import Table
from runtime.weight_file import Source


class Executor:
    """Runs executables on a device. `state` maps module names to the device tensors that programs write (I6).

    `alone`: a call of the module is a call of its program; not so where several executors serve one call. `shared` has their
    resident arenas by what is in them: a program whose weights lie there as another's do takes that arena too.
    """

    def __init__(
        self,
        device: Device,
        store: HostStore,
        state: Mapping[str, torch.Tensor],
        *,
        alone: bool = True,
        shared: MutableMapping[Any, Arena] | None = None,
    ) -> None:
        self.device, self.store, self._alone = device, store, alone
        self._shared = shared
        self._state = state
        self._program: Executable | None = None
        self._run: Any = None
        self._resident: Arena | None = None
        self._staging: torch.Tensor | None = None
        self._w = SimpleNamespace()
        bands = self._bands = Bands(device)
        self.host, self.fetch, self.ahead = bands.host, bands.fetch, bands.ahead
        self.room, self.save, self.begin_bands, self.end_bands = bands.room, bands.save, bands.begin, bands.end
        # Per bundle: where its bytes are on the host, what calls copy them from, its memory, its typed weights, the copies, the
        # event of its arrival.
        self._sources: dict[int, list[tuple[int, Source]]] = {}
        self._streams: dict[int, list[tuple[int, Copied]]] = {}
        self._buffers: dict[int, torch.Tensor] = {}
        self._views: dict[int, tuple[torch.Tensor, ...]] = {}
        self._copies: dict[int, list[tuple[torch.Tensor, Copied]]] = {}
        self._arrived: dict[int, Any] = {}
        self._tables: dict[str, Table] = {}
        self._ring: Ring | None = None
        self._feeder: Feeder | None = None
        self._process = os.getpid()
        # Of the call that runs: what comes early for another program, behind how many prefetches, and whether it is the last.
        self._beside: Arriving | None = None
        self._prefetched, self._last = 0, False

    @property
    def program(self) -> Executable | None:
        return self._program

    def load(self, program: Executable, early: Arriving | None = None) -> None:
        """Makes `program` the one that runs: lays the arenas anew and copies in what has to be there when a call begins.

        Where the program before has the same weights resident at the same places, they stay. What came `early` is taken.
        """
        if program is self._program:
            return
        kept = self._resident if self._program is not None and _residents(self._program) == _residents(program) else None
        self.unload()
        try:
            self._load(program, kept, early)
        except BaseException:
            if early is not None:
                early.drop()
            self.unload()
            raise

    def _load(self, program: Executable, kept: Arena | None, early: Arriving | None) -> None:
        """`kept`: the arena of resident weights, where they are in it already."""
        layout = program.layout
        self._run = compile_source(program.source, program.name)
        copied = self._make_resident(program, kept, early)
        self._staging = self.device.allocate(layout.staging_bytes) if layout.staging_bytes else None
        nothing = torch.empty(0, dtype=torch.uint8, device=self.device.torch_device)
        attributes = attribute_names([s.weight for s in (*layout.resident, *layout.state)])
        for slot in layout.resident:
            number, offset = self._resident.at(slot.offset) if self._resident is not None else (0, 0)
            home = self._resident.buffers[number] if self._resident is not None else nothing
            setattr(self._w, attributes[slot.weight], program.weights[slot.weight].argument(home, offset))
        for slot in layout.state:
            setattr(self._w, attributes[slot.weight], self._state[program.weights[slot.weight].name])
        self._program = program
        self._bands.load(layout)
        for bundle in layout.bundles:
            self._sources[bundle.index] = self._locate(bundle)
            self._streams[bundle.index] = [*self._sources[bundle.index]]
            if bundle.offset is not None:
                assert self._staging is not None
                self._place(bundle, self._staging[bundle.offset : bundle.offset + bundle.nbytes])
        self._tables = self._find_tables()
        self._load_ring(layout.host)
        if self._alone:
            self.device.reserve(*layout.pools)
            self.device.loaded(program)
        self._copy_resident(copied)

    def has_resident(self, program: Executable) -> bool:
        """Whether another executor holds the program's resident weights."""
        return self._shared is not None and _residents(program) in self._shared

    def _make_resident(self, program: Executable, kept: Arena | None, early: Arriving | None) -> int:
        """Makes the resident arena; in how many of its buffers the weights are already: the last program's, or another's."""
        nbytes = program.layout.resident_bytes
        lies = _residents(program)
        self._resident = kept if kept is not None or self._shared is None else self._shared.get(lies)
        if self._resident is not None or not nbytes:
            if early is not None:
                early.drop()
            return len(self._resident.buffers) if self._resident is not None else 0
        came = early.claim() if early is not None else None
        there = [] if came is None else [came]
        nbytes -= sum(buffer.numel() for buffer in there)
        self._resident = Arena(*there, *([self.device.allocate(nbytes)] if nbytes else []))
        if self._shared is not None:
            self._shared[lies] = self._resident
        return len(there)

    def _load_ring(self, host: HostLayout | None) -> None:
        """Makes the ring of a program whose weights are on disk in part, and what fills it."""
        if host is None or not host.slots:
            return
        with _disable_current_modes():  # the ring is none of the device's memory, whoever counts that
            self._ring = Ring(host)
            self.device.pin(self._ring.buffer)
            self._use_ring()
            if host.reads:
                self._feeder = Feeder(host, self._ring)
                self._feed(host)

    def _use_ring(self) -> None:
        """What is not read ahead goes through this program's slots, until another one's is loaded or runs."""
        if self._ring is not None:
            self.device.bounce(self._ring.bounce)

    def _feed(self, host: HostLayout) -> None:
        """Tells the feeder what it reads; bundles take that from it, and the rest from memory."""
        assert self._program is not None
        assert self._feeder is not None
        self._feeder.read_from(parts_of(host, self._sources))
        held, reads = set(host.held), list(enumerate(host.reads))
        for index in {read.bundle for read in host.reads}:
            bundle = self._program.layout.bundles[index]
            own = dataclasses.replace(bundle, slots=tuple(slot for slot in bundle.slots if slot.weight in held))
            fed = [(read.start, self._feeder.source(number)) for number, read in reads if read.bundle == index]
            self._streams[index] = [*self._locate(own), *fed]
            if index in self._buffers:
                self._copies[index] = _onto(self._buffers[index], self._streams[index])

    def refresh(self) -> None:
        """Copies the resident weights from the host: at load, and when the module's weights were written since."""
        self._use_ring()
        self._copy_resident(0)
        self._drop_carried()

    def _copy_resident(self, first: int) -> None:
        """Into the buffers of the arena from the given one on."""
        assert self._program is not None
        names, arena = self._program.weights, self._resident or Arena()
        for number, buffer in enumerate(arena.buffers[first:], first):
            places = arena.inside(number, self._program.layout.resident)
            runs = self.store.runs([(names[slot.weight], offset) for slot, offset in places])
            # Behind whatever still reads this memory: its last owner, or the call before.
            self.device.wait(self.device.copy(_onto(buffer, runs), [self.device.mark()]))

    def _copy_carried(self) -> None:
        """Copies the bundles that a call expects from the one before it, where there was none."""
        assert self._program is not None
        if self._process != os.getpid():
            self._drop_carried()  # a forked child has no threads that would end what its parent began
            self._process = os.getpid()
        for bundle in self._program.layout.bundles:
            if not bundle.carried or bundle.index in self._arrived:
                continue
            if bundle.offset is None:
                self._place(bundle, self.device.allocate(bundle.nbytes))
            own = _onto(
                self._buffers[bundle.index], self._sources[bundle.index]
            )  # not from the feeder, which reads for prefetches
            self._arrived[bundle.index] = self.device.copy(own, [self.device.mark()])

    def _drop_carried(self) -> None:
        """Forgets what the last call has prefetched for the next, which then copies it itself, and what it has read ahead."""
        self._settle()
        if self._feeder is not None:
            self._feeder.reset()
        for index in [index for index in self._buffers if self._is_loose(index)]:
            self._forget(index)

    def _settle(self) -> None:
        """Waits for copies that no `onload` has waited for: nothing may land in memory that is used otherwise from now on."""
        while self._arrived:
            index, event = self._arrived.popitem()
            self.device.settle(event, index)

    def relocate(self) -> None:
        """Asks the store again where the streamed weights, and those that are looked up, are."""
        assert self._program is not None
        self._tables = self._find_tables()
        for bundle in self._program.layout.bundles:
            self._sources[bundle.index] = self._locate(bundle)
            self._streams[bundle.index] = [*self._sources[bundle.index]]
        if self._feeder is not None and self._program.layout.host is not None:
            self._drop_carried()
            with _disable_current_modes():
                self._feed(self._program.layout.host)
        for index, buffer in self._buffers.items():
            self._copies[index] = _onto(buffer, self._streams[index])

    def _locate(self, bundle: Bundle) -> list[tuple[int, Source]]:
        assert self._program is not None
        return self.store.runs([(self._program.weights[s.weight], s.offset) for s in bundle.slots])

    def _find_tables(self) -> dict[str, Table]:
        assert self._program is not None
        views = self._program.tables
        return {name: Table.of(view, self.store.runs([(view, 0)])) for name, view in views.items()}

    def unload(self) -> None:
        """Gives up the loaded program and all arena memory; state stays."""
        self._settle()
        self._unload_ring()
        self._bands.unload()
        self._program = self._run = self._resident = self._staging = None
        self._w = SimpleNamespace()
        for table in (self._sources, self._streams, self._buffers, self._views, self._copies, self._arrived, self._tables):
            table.clear()

    def _unload_ring(self) -> None:
        if self._feeder is not None:
            self._feeder.reset()
            self._feeder.close()
        if self._ring is not None:
            self.device.bounce([])
            self.device.unpin(self._ring.buffer)
        self._ring = self._feeder = None

    def call(self, inputs: Sequence[Any]) -> list[Any]:
        """Runs the loaded program on flat input leaves, measured by the device; gives flat output leaves."""
        tensors = [leaf for leaf in inputs if isinstance(leaf, torch.Tensor)]
        with self.device.call(tensors, [*self.arenas, *self._state.values()]):
            return self.run(inputs)

    @property
    def arenas(self) -> list[torch.Tensor]:
        """Device memory that the loaded program holds between calls, state aside."""
        between = [self._buffers[index] for index in self._buffers if self._is_loose(index)]
        resident = self._resident.buffers if self._resident is not None else ()
        return [*resident, *([self._staging] if self._staging is not None else []), *between]

    def _is_loose(self, index: int) -> bool:
        """Whether a bundle has memory of its own, outside of the staging arena."""
        assert self._program is not None
        return self._program.layout.bundles[index].offset is None

    def run(self, inputs: Sequence[Any], *, last: bool = False, beside: Arriving | None = None) -> list[Any]:
        """As `call`, within a call that is measured already.

        In the `last` call nothing is fetched for the next one. What comes `beside` it is issued where it says.
        """
        assert self._program is not None
        self._last, self._beside, self._prefetched = last, beside, 0
        try:
            self._use_ring()
            self._copy_carried()
            if self._feeder is not None:
                self._feeder.begin()
            with self._turn():
                return self._run(self, self._w, self.device.torch_device, *inputs)
        except BaseException:
            self._bands.drain()
            self._drop_carried()
            raise

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The program runs: for the device, where it is one of several, and for what comes beside it."""
        if not self._alone:
            self.device.turn(self._program)
        try:
            if self._beside is not None:
                self._beside.reach(0)
            yield
        finally:
            self._last, self._beside = False, None
            if not self._alone:
                self.device.turn(None)

    # What emitted programs call.

    def prefetch(self, index: int) -> None:
        assert self._program is not None
        bundle = self._program.layout.bundles[index]
        if self._last and bundle.carried:
            self.device.skip(index)
        else:
            if bundle.offset is None:
                self._place(bundle, self.device.allocate(bundle.nbytes))
            # Behind everything issued so far: the readers of what it refills, and the last owner of an allocator's block (I4).
            self._arrived[index] = self.device.copy(self._copies[index], [self.device.mark()], index)
        self._prefetched += 1
        if self._beside is not None:
            self._beside.reach(self._prefetched)

    def onload(self, index: int) -> tuple[torch.Tensor, ...]:
        self.device.wait(self._arrived.pop(index), index)
        return self._views[index]

    def lookup(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Rows of a table on the host, as a new tensor on the device.

        Raises:
            RowError: an index is outside of the table.
            StoreError: the table's file cannot be read.
        """
        table = self._tables[name]
        result = torch.empty((*indices.shape, *table.view.shape[1:]), dtype=table.view.dtype, device=self.device.torch_device)
        self.device.look_up(table, indices, result)
        return result

    def evict(self, index: int) -> None:
        self.device.evict(self._buffers[index], index)
        if self._is_loose(index):
            self._forget(index)

    def _place(self, bundle: Bundle, buffer: torch.Tensor) -> None:
        assert self._program is not None
        weights = self._program.weights
        self._buffers[bundle.index] = buffer
        self._views[bundle.index] = tuple(weights[s.weight].argument(buffer, s.offset) for s in bundle.slots)
        self._copies[bundle.index] = _onto(buffer, self._streams[bundle.index])

    def _forget(self, index: int) -> None:
        self._buffers.pop(index, None)
        self._views.pop(index, None)
        self._copies.pop(index, None)


def _residents(program: Executable) -> tuple[tuple[WeightView, int], ...]:
    """The weights that are resident, and where in the arena."""
    return tuple((program.weights[slot.weight], slot.offset) for slot in program.layout.resident)


def _onto(buffer: torch.Tensor, runs: Sequence[tuple[int, Copied]]) -> list[tuple[torch.Tensor, Copied]]:
    return [(buffer[offset : offset + source.numel()], source) for offset, source in runs]
