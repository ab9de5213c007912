"""The executor: holds the arenas of one target and runs its programs, one loaded at a time, in the same memory.

Inside an emitted program it is `rt`: `prefetch`, `onload` and `evict` are called in program order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from runtime.devices.base import Device
from runtime.emit import attribute_names, compile_source
from runtime.executable import Executable
from runtime.layout import Bundle
from runtime.store import HostStore


class Executor:
    """Runs executables on a device. `state` maps module names to the device tensors that programs write (I6)."""

    def __init__(self, device: Device, store: HostStore, state: Mapping[str, torch.Tensor]) -> None:
        self.device, self.store = device, store
        self._state = state
        self._program: Executable | None = None
        self._run: Any = None
        self._resident: torch.Tensor | None = None
        self._staging: torch.Tensor | None = None
        self._w = SimpleNamespace()
        # Per bundle: where its bytes are on the host, its memory, its typed weights, the copies, the events.
        self._sources: dict[int, list[tuple[int, torch.Tensor]]] = {}
        self._buffers: dict[int, torch.Tensor] = {}
        self._views: dict[int, tuple[torch.Tensor, ...]] = {}
        self._copies: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._arrived: dict[int, Any] = {}
        self._evicted: dict[int, Any] = {}

    @property
    def program(self) -> Executable | None:
        return self._program

    def load(self, program: Executable) -> None:
        """Makes `program` the one that runs: lays the arenas anew and copies its resident weights in."""
        if program is self._program:
            return
        self.unload()
        layout = program.layout
        self._run = compile_source(program.source, program.name)
        self._resident = self.device.allocate(layout.resident_bytes) if layout.resident_bytes else None
        self._staging = self.device.allocate(layout.staging_bytes) if layout.staging_bytes else None
        attributes = attribute_names([s.weight for s in (*layout.resident, *layout.state)])
        for slot in layout.resident:
            view = program.weights[slot.weight]
            home = (
                self._resident
                if self._resident is not None
                else torch.empty(0, dtype=torch.uint8, device=self.device.torch_device)
            )
            setattr(self._w, attributes[slot.weight], view.operand(home, slot.offset))
        for slot in layout.state:
            setattr(self._w, attributes[slot.weight], self._state[program.weights[slot.weight].name])
        self._program = program
        for bundle in layout.bundles:
            self._sources[bundle.index] = self.store.runs([(program.weights[s.weight].name, s.offset) for s in bundle.slots])
            if bundle.offset is not None:
                assert self._staging is not None
                self._place(bundle, self._staging[bundle.offset : bundle.offset + bundle.nbytes])
        self.refresh()

    def refresh(self) -> None:
        """Copies the resident weights from the host: at load, and when the module's weights were written since."""
        assert self._program is not None
        if self._resident is not None:
            names = self._program.weights
            runs = self.store.runs([(names[s.weight].name, s.offset) for s in self._program.layout.resident])
            # Behind whatever still reads this memory: its last owner, or the call before.
            self.device.wait(self.device.copy(_onto(self._resident, runs), [self.device.allocated()]))

    def unload(self) -> None:
        """Gives up the loaded program and all arena memory; state stays."""
        self._program = self._run = self._resident = self._staging = None
        self._w = SimpleNamespace()
        for table in (self._sources, self._buffers, self._views, self._copies, self._arrived, self._evicted):
            table.clear()

    def call(self, inputs: Sequence[Any]) -> list[Any]:
        """Runs the loaded program on flat input leaves; gives flat output leaves."""
        assert self._program is not None
        tensors = [leaf for leaf in inputs if isinstance(leaf, torch.Tensor)]
        arenas = [a for a in (self._resident, self._staging, *self._state.values()) if a is not None]
        try:
            with self.device.call(tensors, arenas):
                return self._run(self, self._w, self.device.torch_device, *inputs)
        finally:
            self._arrived.clear()
            self._evicted.clear()
            for bundle in self._program.layout.bundles:
                if bundle.offset is None:
                    self._forget(bundle.index)

    # What emitted programs call.

    def prefetch(self, index: int, after: tuple[int, ...] = ()) -> None:
        assert self._program is not None
        bundle = self._program.layout.bundles[index]
        events = [self._evicted[other] for other in after]
        if bundle.offset is None:
            self._place(bundle, self.device.allocate(bundle.nbytes))
            events.append(self.device.allocated())
        self._arrived[index] = self.device.copy(self._copies[index], events)

    def onload(self, index: int) -> tuple[torch.Tensor, ...]:
        self.device.wait(self._arrived[index])
        return self._views[index]

    def evict(self, index: int) -> None:
        assert self._program is not None
        self._evicted[index] = self.device.evict(self._buffers[index])
        if self._program.layout.bundles[index].offset is None:
            self._forget(index)

    def _place(self, bundle: Bundle, buffer: torch.Tensor) -> None:
        assert self._program is not None
        weights = self._program.weights
        self._buffers[bundle.index] = buffer
        self._views[bundle.index] = tuple(weights[s.weight].operand(buffer, s.offset) for s in bundle.slots)
        self._copies[bundle.index] = _onto(buffer, self._sources[bundle.index])

    def _forget(self, index: int) -> None:
        self._buffers.pop(index, None)
        self._views.pop(index, None)
        self._copies.pop(index, None)


def _onto(buffer: torch.Tensor, runs: list[tuple[int, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(buffer[offset : offset + source.numel()], source) for offset, source in runs]
