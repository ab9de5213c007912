"""Values that live in page-locked host memory while a call runs, read and written band by band.

A band comes and goes through a slot on the device. What was read is copied on from the slot before the next band is asked for,
and what is written leaves the slot while the next tile is computed: one slot gives the overlap of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from runtime import ops
from runtime.devices.base import Device
from runtime.layout import Layout


@dataclass(frozen=True, eq=False)
class HostValue:
    """A value on the host: its bytes, bands along `dim` one after the other."""

    bytes: torch.Tensor
    shape: torch.Size
    dim: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Of one element of `dim`."""
        return self.dtype.itemsize * prod(n for d, n in enumerate(self.shape) if d != self.dim)

    def band(self, start: int, stop: int) -> torch.Tensor:
        """Its bytes."""
        with _disable_current_modes():  # a view of host memory is no device memory to be counted
            return self.bytes[start * self.row_bytes : stop * self.row_bytes]


class Bands:
    """What emitted programs call for values on the host. `arena`: page-locked bytes for all of them."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._arena: torch.Tensor | None = None
        self._layout = Layout(1)
        # By slot: the band that is on its way to it with its event, and the event of what leaves it.
        self._coming: dict[int, tuple[int, int, Any]] = {}
        self._leaving: dict[int, Any] = {}

    def load(self, layout: Layout) -> None:
        """Makes the arena of a program; requires that none is loaded."""
        self._layout = layout
        if layout.host_bytes:
            with _disable_current_modes():  # within a larger call somebody counts the device's bytes
                self._arena = torch.empty(layout.host_bytes, dtype=torch.uint8)
            self._device.pin(self._arena)

    def unload(self) -> None:
        """Gives the arena back."""
        self.drain()
        if self._arena is not None:
            self._device.unpin(self._arena)
        self._arena, self._layout = None, Layout(1)

    def host(self, index: int, shape: Sequence[int], dim: int, dtype: torch.dtype) -> HostValue:
        """The value in a place of the layout; what it holds is what was saved there."""
        place = self._layout.hosted[index]
        assert self._arena is not None
        with _disable_current_modes():
            return HostValue(self._arena[place.offset : place.offset + place.nbytes], torch.Size(shape), dim, dtype)

    def begin(self) -> None:
        """A loop begins that has the link to itself."""
        self._device.bands(begin=True)

    def end(self) -> None:
        """It ends: compute goes on when its last band has left."""
        self.drain()
        self._device.bands(begin=False)

    def drain(self) -> None:
        """Waits for all bands on their way."""
        for event in self._leaving.values():
            self._device.wait(event)
        for _, _, event in self._coming.values():  # asked for and never read, where a call was broken off
            self._device.settle(event)
        self._leaving.clear()
        self._coming.clear()

    def fetch(self, value: HostValue, slot: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
        """The band in its slot, once it has arrived."""
        if slot.data_ptr() not in self._coming:
            self.ahead(value, slot, dim, start, stop)
        held = self._coming.pop(slot.data_ptr())
        assert held[:2] == (start, stop), f"the band {held[:2]} is on its way, not {(start, stop)}"
        self._device.wait(held[2])
        return ops.band_of(slot, value, dim, start, stop)

    def ahead(self, value: HostValue, slot: torch.Tensor, dim: int, start: int, stop: int) -> None:
        """Starts copying a band, behind everything issued so far: the readers of what it refills (I4)."""
        if start == stop:
            return
        source = value.band(start, stop)
        target = slot.view(torch.uint8)[: source.numel()]
        event = self._device.copy([(target, source)], [self._device.mark()])
        self._coming[slot.data_ptr()] = start, stop, event

    def room(self, value: HostValue, slot: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
        """The slot, as the band that is written next; what it held has left it (I4)."""
        if slot.data_ptr() in self._leaving:
            self._device.wait(self._leaving.pop(slot.data_ptr()))
        return ops.band_of(slot, value, dim, start, stop)

    def save(self, value: HostValue, slot: torch.Tensor, dim: int, start: int, stop: int) -> None:
        """Starts copying the slot to the host."""
        target = value.band(start, stop)
        source = slot.view(torch.uint8)[: target.numel()]
        self._leaving[slot.data_ptr()] = self._device.save(target, source, self._device.mark())
