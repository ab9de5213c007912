"""Where every byte of an emitted program's weights lives: plain data that planner, checker and runtime all read."""

from __future__ import annotations

from dataclasses import dataclass


def align(nbytes: int, alignment: int) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


@dataclass(frozen=True)
class Slot:
    """One weight at a byte offset: within the resident arena, or within its bundle."""

    weight: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Bundle:
    """Weights that travel together. `offset` is its place in the staging arena, None when the allocator gives it one.

    A `carried` bundle comes over the seam between two calls: the call before prefetches it.
    """

    index: int
    slots: tuple[Slot, ...]
    nbytes: int
    offset: int | None
    carried: bool = False


@dataclass(frozen=True)
class HostPlace:
    """Where a value lies in page-locked host memory: bytes from `offset` on, shared with values that live at other times."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Static memory of one emitted program, in bytes. Every offset is a multiple of `alignment`.

    `state` are the weights that the program writes (I6): resident too, but each in an allocation of its own that programs share
    and the module sees, so their offsets are all 0. `pools` are segments that the device's allocator is given beforehand
    for activations and bundles without an offset, which would else get segments of their own. `hosted` are the places of
    values that live on the host, in an arena of `host_bytes`.
    """

    alignment: int
    resident: tuple[Slot, ...] = ()
    resident_bytes: int = 0
    state: tuple[Slot, ...] = ()
    staging_bytes: int = 0
    pools: tuple[int, ...] = ()
    bundles: tuple[Bundle, ...] = ()
    hosted: tuple[HostPlace, ...] = ()
    host_bytes: int = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of the state, each rounded up to the alignment."""
        return sum(align(slot.nbytes, self.alignment) for slot in self.state)

    @property
    def streamed_bytes(self) -> int:
        """Bytes copied from the host per call."""
        return sum(slot.nbytes for bundle in self.bundles for slot in bundle.slots)


def pack(weights: list[tuple[str, int]], alignment: int) -> tuple[tuple[Slot, ...], int]:
    """Places (name, nbytes) one after the other; returns the slots and the aligned total."""
    slots, cursor = [], 0
    for name, nbytes in weights:
        slots.append(Slot(name, cursor, nbytes))
        cursor += align(nbytes, alignment)
    return tuple(slots), cursor
