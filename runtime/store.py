"""The host's copy of the weights: one exactly sized arena, each tensor a storage of its own over it.

`pin_memory()` rounds up to powers of two and `torch.save` of one view saves the whole arena; both are why this is a memory map
that tensors are laid over one by one.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import torch
from torch.utils._python_dispatch import _disable_current_modes

from runtime.executable import WeightView


class HostStore:
    """Weights by their module name, in the order given, at multiples of `alignment` bytes.

    The arena is filled one weight at a time, and its caller may free each original before the next is copied, so that the host
    never holds the model twice.
    """

    def __init__(self, views: Mapping[str, WeightView], alignment: int) -> None:
        self.views: dict[str, WeightView] = {}
        self.nbytes, self._alignment = 0, alignment
        self._places: dict[str, tuple[int, int]] = {}  # segment and offset
        self._maps: list[mmap.mmap] = []
        self.buffers: list[torch.Tensor] = []
        self.extend(views)

    @property
    def buffer(self) -> torch.Tensor:
        """The first segment, which holds the module's weights."""
        return self.buffers[0]

    def extend(self, views: Mapping[str, WeightView]) -> torch.Tensor:
        """Adds a segment (the constants that a later program brings) and gives its bytes."""
        cursor = 0
        for name, view in views.items():
            self._places[name] = len(self._maps), cursor
            cursor += -(-view.nbytes // self._alignment) * self._alignment
        self.views.update(views)
        self.nbytes += cursor
        self._maps.append(mmap.mmap(-1, max(cursor, 1)))
        self.buffers.append(torch.frombuffer(self._maps[-1], dtype=torch.uint8, count=max(cursor, 1)))
        return self.buffers[-1]

    def fill(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Copies one weight in; gives the tensor that now holds it."""
        return self.tensor(name).copy_(value)

    def tensor(self, name: str) -> torch.Tensor:
        """The weight as a tensor with a storage of its own over the arena."""
        view = self.views[name]
        if view.nbytes == 0:
            return torch.empty_strided(view.shape, view.stride, dtype=view.dtype)
        segment, offset = self._places[name]
        with _disable_current_modes():  # bytes of the host are none of the device's, whoever counts those
            own = torch.frombuffer(self._maps[segment], dtype=torch.uint8, count=view.nbytes, offset=offset)
            return view.on(own, 0)

    def runs(self, places: list[tuple[str, int]]) -> list[tuple[int, torch.Tensor]]:
        """(offset, source bytes) that put the named weights at the given offsets; neighbours on both sides are one copy."""
        joined: list[list[int]] = []  # segment, start, offset, bytes
        for name, offset in places:
            (segment, start), nbytes = self._places[name], self.views[name].nbytes
            if nbytes == 0:
                continue
            last = joined[-1] if joined and joined[-1][0] == segment else None
            if last is not None and start - last[1] == offset - last[2] and last[1] < start:
                last[3] = start - last[1] + nbytes
            else:
                joined.append([segment, start, offset, nbytes])
        with _disable_current_modes():
            return [(offset, self.buffers[segment][start : start + nbytes]) for segment, start, offset, nbytes in joined]
