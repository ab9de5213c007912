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
class Read:
    """Bytes [start, start + nbytes) of a bundle, which come from disk through one slot of the ring.

    It may be filled once the copy out of it of read number `after` is over: of this call, or where that is negative of the call
    before, whose last read is -1.
    """

    bundle: int
    start: int
    nbytes: int
    slot: int
    after: int


@dataclass(frozen=True)
class HostLayout:
    """The host's memory of a program, where that has a budget: `budget_bytes`, of whole pages.

    In it are the homes of the weights `held` (placeholders) and of `tables` (by the module's names), `other_bytes` of weights
    that the program does not read (which are on disk where that is 0), and a ring of `slots` of `slot_bytes`, of which the last
    `bounce` serve what is loaded before a call and rows that are looked up. All other weights have their home on disk, where
    they may take `disk_bytes` besides what files have already. The `reads`, in the order of the prefetches, are what comes from
    there in every call. `ahead`: those of the next call begin in this one.
    """

    budget_bytes: int
    disk_bytes: int | None = None
    held: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    other_bytes: int = 0
    slot_bytes: int = 0
    slots: int = 0
    bounce: int = 0
    reads: tuple[Read, ...] = ()
    ahead: bool = False

    @property
    def ring_bytes(self) -> int:
        """Of all slots."""
        return self.slot_bytes * self.slots

    @property
    def read_bytes(self) -> int:
        """Read from disk in every call."""
        return sum(read.nbytes for read in self.reads)


@dataclass(frozen=True)
class Layout:
    """Static memory of one emitted program, in bytes. Every offset is a multiple of `alignment`.

    `state` are the weights that the program writes (I6): resident too, but each in an allocation of its own that programs share
    and the module sees, so their offsets are all 0. `pools` are segments that the device's allocator is given beforehand
    for activations and bundles without an offset, which would else get segments of their own. `hosted` are the places of
    values that live on the host, in an arena of `host_bytes`. `host` is the host's own memory, where that has a budget.
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
    host: HostLayout | None = None

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
