"""The memory of a program's resident weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.layout import Slot


class Arena:
    """One buffer, or two: the first weights may have come before their program, into memory of their own."""

    def __init__(self, *buffers: torch.Tensor) -> None:
        self.buffers = buffers

    def at(self, offset: int) -> tuple[int, int]:
        """The number of the buffer that has the byte at `offset`, and where in it."""
        number = 0
        while number < len(self.buffers) - 1 and offset >= self.buffers[number].numel():
            offset -= self.buffers[number].numel()
            number += 1
        return number, offset

    def inside(self, number: int, slots: Sequence[Slot]) -> list[tuple[Slot, int]]:
        """Those weights that lie in one of the buffers, and where."""
        places = [(slot, self.at(slot.offset)) for slot in slots]
        return [(slot, offset) for slot, (buffer, offset) in places if buffer == number]
