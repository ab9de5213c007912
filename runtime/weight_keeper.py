"""`WeightKeeper`: the weights of a module while it is planned: in one host arena, state on the device, and back at the end."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import nn

from runtime.devices.base import Device
from runtime.errors import PlannerError
from runtime.executable import Executable
from runtime.homes import MemoryHome
from runtime.origins import (
    Lookup,
    Owners,
    equal_values,
    has_no_bytes,
    in_files,
    named_tensors,
    original_of,
    owners_of,
    source_of,
    stored_sources,
    version_of,
    view_of,
)
from runtime.split_home import spills, split_home
from runtime.store import HostStore
from runtime.weight_file import FileTensor, Value

ALIGNMENT = 512  # of weights, where no program says another


class WeightKeeper:
    """Moves the weights of a module into a host arena, adds what later programs read besides, and points all of them back.

    Attributes:
        store: what the host has of weights; None before they are moved. state: by name what programs write, on the device.
        pinned: whether the host has page-locked them.
        moved: told how many bytes of the weights are in the arena, and of how many, while they are read and moved.
    """

    def __init__(self, module: nn.Module, device: Device, budget_bytes: int) -> None:
        self.module, self.device, self.budget_bytes = module, device, budget_bytes
        self.store: HostStore | None = None
        self.state: dict[str, torch.Tensor] = {}
        self.pinned = False
        self.moved: Callable[[int, int], None] = lambda done, total: None
        self._constants: dict[str, torch.Tensor] = {}  # in the store: tensors that are no parameter and no buffer
        self._watched: dict[str, torch.Tensor] = {}
        self._undo: list[Callable[[], None]] = []

    def _move_weights(
        self, programs: Sequence[Executable], lookup: Lookup | None, *, together: bool = False, wanted: Set[str] = frozenset()
    ) -> None:
        """Moves all weights of the module into the host arena, those of programs first and in the order of their use.

        `together`: the programs share the host's memory, if that has a budget, and what none of them reads is on disk, but
        for what is `wanted` in memory.
        """
        tensors = named_tensors(self.module)
        order = list(dict.fromkeys(name for program in programs for name in first_use(program)))
        read = [view for program in programs for view in (*program.weights.values(), *program.tables.values())]
        views = {view.name: view.whole for view in read}
        seen: set[int] = set()
        owned = {alias for view in views.values() for alias in view.aliases} | set(views)
        # What is stored otherwise stays where it is: it is read for that, and not moved.
        only = {view.stored.weight for view in views.values() if view.stored is not None} - owned
        seen |= {id(tensors[name]) for name in only if has_no_bytes(tensors[name]) or not spills(programs, together)}
        for name, tensor in tensors.items():  # what the program never reads moves too: the host holds all weights once
            if name not in owned and id(tensor) not in seen:
                views[name] = view_of(name, tensor, tuple(n for n, t in tensors.items() if t is tensor and n != name))
                order.append(name)
            seen.add(id(tensor))
        sources = {name: source_of(name, views[name], tensors, lookup) for name in order if name in tensors}
        sources |= stored_sources([views[name] for name in order if name not in sources], tensors, lookup)
        constants = {v.name: p.constants[node] for p in programs for node, v in p.weights.items() if node in p.constants}
        sources |= {name: source_of(name, views[name], constants, lookup) for name in order if name not in sources}
        split = split_home(programs, order, together, wanted)
        home, held = split if split is not None else (self.device.home(), set[str]())
        given = {} if isinstance(home, MemoryHome) else in_files([n for n in order if n not in held], views, tensors, lookup)
        alignment = programs[0].layout.alignment if programs else ALIGNMENT
        self.store = HostStore({name: views[name] for name in order}, alignment, home, given)
        owners, done, total = owners_of(self.module), 0, sum(views[name].nbytes for name in order)
        for name in order:
            value = sources.pop(name)()
            if name in tensors:
                self._adopt(tensors[name], value, name, owners)
            else:
                filled = self.store.fill(name, value)
                if views[name].stored is None:
                    constant = filled if isinstance(value, FileTensor) else value
                    self._constants[name] = original_of(self.module, name, constant)
            done += views[name].nbytes
            self.moved(done, total)
        refused = [buffer for buffer in self.store.buffers if not self.device.pin(buffer)]
        self.pinned = not refused
        if not self.pinned:
            warnings.warn(
                "the host refused to page-lock the weights; copies go through a small page-locked ring and are slower "
                "(in containers, raise the memlock limit)",
                stacklevel=3,
            )
        self.device.enforce(self.budget_bytes)

    def _adopt(self, tensor: torch.Tensor, value: Value, name: str, owners: Owners) -> None:
        """Points a parameter or buffer at the host arena; one on the meta device is replaced, for that cannot be pointed."""
        assert self.store is not None
        if has_no_bytes(tensor):
            host = self.store.fill(name, value)
            real = nn.Parameter(host, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else host
            for slots, key in owners[id(tensor)]:
                slots[key] = real
                self._undo.append(functools.partial(slots.__setitem__, key, tensor))
            return
        origin, store = tensor.device, self.store

        def undo() -> None:
            tensor.data = store.leave(tensor.data).to(origin)

        with torch.no_grad():
            tensor.data = self.store.fill(name, value)
        self._undo.append(undo)

    def _take(self, program: Executable) -> Executable:
        """Gives a program's constants and state their memory; the program then reads them by name."""
        tensors = named_tensors(self.module)
        program = self._with_constants(program)
        self._take_missing(program, tensors)
        for slot in program.layout.state:
            view = program.weights[slot.weight]
            if view.name in self.state:
                continue
            assert self.store is not None
            nbytes = -(-view.nbytes // program.layout.alignment) * program.layout.alignment
            own = view.on(self.device.allocate(nbytes), 0)
            own.copy_(self.store.tensor(view.name))
            self.state[view.name] = own
            if view.name in tensors:
                tensors[view.name].data = own
        # Collected once: walking the module's tree in every call is slow, and the fingerprint sees a replaced tensor.
        self._watched = {**named_tensors(self.module), **self._constants}
        return program

    def _with_constants(self, program: Executable) -> Executable:
        """Puts constants that the store lacks into it; one of the same name and another value gets another name."""
        assert self.store is not None
        weights, fresh = dict(program.weights), {}
        for node, value in program.constants.items():
            view = weights.get(node)
            if view is None:
                continue
            known = self._constants.get(view.name)
            if known is not None and (value.is_meta or equal_values(known, value)):
                continue
            if value.is_meta:
                raise PlannerError(
                    f"the constant {view.name!r} is on the meta device: plan the module that was given as weights"
                )
            if view.name in self._constants:
                view = dataclasses.replace(view, name=f"{view.name}@{len(self._constants)}")
            weights[node], fresh[view.name] = view, value
        if not fresh:
            return program
        for buffer in self.store.extend({view.name: view for view in weights.values() if view.name in fresh}):
            self.device.pin(buffer)
        for name, value in fresh.items():
            self.store.fill(name, value)
        self._constants |= {name: original_of(self.module, name, value) for name, value in fresh.items()}
        return dataclasses.replace(program, weights=weights)

    def _take_missing(self, program: Executable, tensors: Mapping[str, torch.Tensor]) -> None:
        """Moves what a later program reads, and earlier ones did not, into the store.

        Raises:
            PlannerError: it is on the meta device.
        """
        assert self.store is not None
        read = {view.name: view.whole for view in (*program.weights.values(), *program.tables.values())}
        fresh = {name: view for name, view in read.items() if not self.store.has(name)}
        if not fresh:
            return
        sources = stored_sources(list(fresh.values()), tensors, None)
        sources |= {name: source_of(name, view, tensors, None) for name, view in fresh.items() if name not in sources}
        for buffer in self.store.extend(fresh):
            self.device.pin(buffer)
        owners = owners_of(self.module)
        for name, source in sources.items():
            if name in tensors:
                self._adopt(tensors[name], source(), name, owners)
            else:
                self.store.fill(name, source())

    def _registered(self, name: str) -> torch.Tensor:
        """The module's own tensor of that name; a state constant has none and gets a stand-in."""
        return named_tensors(self.module).get(name, torch.empty(0))

    def _versions(self) -> dict[str, tuple[int, int]]:
        """Of every weight how often it was written (what the program itself writes aside), and where its bytes are."""
        return {n: (0 if n in self.state else version_of(t), t.data_ptr()) for n, t in self._watched.items()}

    def _give_back(self) -> None:
        """Un-pins the host, brings state home and points the weights back to where they were."""
        with torch.no_grad():
            if self.store is not None:
                for buffer in self.store.buffers:
                    self.device.unpin(buffer)
                for name, own in self.state.items():
                    self._registered(name).data = self.store.tensor(name).copy_(own)
            for step in reversed(self._undo):
                step()
        if self.store is not None:
            self.store.close()
        self.state.clear()


def first_use(program: Executable) -> list[str]:
    """Weights in the order in which bundles travel, then the residents: neighbours in a bundle are neighbours on the host.

    Last come tables, of which only rows are read.
    """
    slots = [s for b in program.layout.bundles for s in b.slots]
    slots += [*program.layout.resident, *program.layout.state]
    return list(dict.fromkeys((*(program.weights[s.weight].name for s in slots), *program.tables)))
