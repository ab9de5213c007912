"""The host's copy of the weights: one exactly sized arena, each tensor a storage of its own over it.

`pin_memory()` rounds up to powers of two and `torch.save` of one view saves the whole arena; both are why this is a memory map
that tensors are laid over one by one.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping

import torch

from runtime.executable import WeightView


class HostStore:
    """Weights by their module name, in the order given, at multiples of `alignment` bytes.

    The arena is filled one weight at a time: `adopt` may free the original before the next is copied, so that the host never
    holds the model twice.
    """

    def __init__(self, views: Mapping[str, WeightView], alignment: int) -> None:
        self.views = dict(views)
        self._offsets: dict[str, int] = {}
        cursor = 0
        for name, view in self.views.items():
            self._offsets[name] = cursor
            cursor += -(-view.nbytes // alignment) * alignment
        self.nbytes = cursor
        self._map = mmap.mmap(-1, max(cursor, 1))
        self.buffer = torch.frombuffer(self._map, dtype=torch.uint8, count=max(cursor, 1))

    def fill(self, name: str, value: torch.Tensor, adopt: Callable[[torch.Tensor], None]) -> None:
        """Copies one weight in and hands the tensor that now holds it to `adopt`."""
        view = self.tensor(name)
        view.copy_(value)
        adopt(view)

    def tensor(self, name: str) -> torch.Tensor:
        """The weight as a tensor with a storage of its own over the arena."""
        view = self.views[name]
        if view.nbytes == 0:
            return torch.empty_strided(view.shape, view.stride, dtype=view.dtype)
        own = torch.frombuffer(self._map, dtype=torch.uint8, count=view.nbytes, offset=self._offsets[name])
        return view.on(own, 0)

    def runs(self, places: list[tuple[str, int]]) -> list[tuple[int, torch.Tensor]]:
        """(offset, source bytes) that put the named weights at the given offsets; neighbours on both sides are one copy."""
        joined: list[list[int]] = []
        for name, offset in places:
            start, nbytes = self._offsets[name], self.views[name].nbytes
            if nbytes == 0:
                continue
            if joined and start - joined[-1][0] == offset - joined[-1][1] and joined[-1][0] < start:
                joined[-1][2] = start - joined[-1][0] + nbytes
            else:
                joined.append([start, offset, nbytes])
        return [(offset, self.buffer[start : start + nbytes]) for start, offset, nbytes in joined]
