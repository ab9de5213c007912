"""Homes: where the host keeps weights, if its memory has a budget. What does not fit is read from disk ahead of use.

Memory takes first what is streamed, for that is read in every call, then tables whose rows are looked up, then the rest. Of
what is streamed and does not fit, the weights that go to disk are chosen evenly by compute time: the disk, as the link, then
always has something to do. They come through a ring of equal slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from passes.program import Weight
from planner.solve.decisions import Homes
from runtime.layout import HostLayout, Read, align

if TYPE_CHECKING:
    from planner.schedule import Placement
    from planner.solve.bundles import BundleSpan
    from planner.solve.problem import Problem

PAGE_BYTES = 4096
# Slots for what is loaded before a call and for looked-up rows: one is filled while the other is on its way.
BOUNCE = 2
# Slots for reads, in the order in which they are tried; the first is what candidates are compared with.
RING_SLOTS = (4, 2, 8, 16, 32)
_LEAST_SLOTS = min(RING_SLOTS)
_USUAL_SLOTS = RING_SLOTS[0] + BOUNCE
# A slot takes this share of the host's memory, and of the weights: what is read ahead is not kept.
_SHARE = 1 / 64
_MOST_SLOT = 16 * 1024 * 1024
# A call is not cut into more reads than about this.
_MOST_READS = 4096


@dataclass(frozen=True)
class ModuleTensor:
    """A parameter or buffer of the module by all its names; `in_file`: a checkpoint's file has it as the module does."""

    names: frozenset[str]
    nbytes: int
    in_file: bool = False


@dataclass(frozen=True, eq=False)
class HostMemory:
    """What was declared of the host. `disk_bytes`: what weights may take on disk besides files that have them already.

    `held`: names and bytes of the weights that are in memory already, of a module that is built; None where that is to be
    chosen.
    """

    budget_bytes: int
    disk_bytes: int | None = None
    tensors: tuple[ModuleTensor, ...] = ()
    held: Mapping[str, int] | None = None

    def of(self, problem: Problem) -> HostProblem:
        """The homes of one problem."""
        if problem not in self._known:
            self._known[problem] = HostProblem(self, problem)
        return self._known[problem]

    @cached_property
    def _known(self) -> dict[Problem, HostProblem]:
        return {}


@dataclass(frozen=True, eq=False)
class HostPlan:
    """The homes for one selection of bundles: of each the `pieces` that are read, (start, bytes), and the bytes of the rest.

    `scratch_bytes`: what is written to disk before the first call.
    """

    homes: Homes
    pieces: tuple[tuple[tuple[int, int], ...], ...]
    own_bytes: tuple[int, ...]
    scratch_bytes: int

    @property
    def read_bytes(self) -> int:
        """Read from disk in every call."""
        return sum(nbytes for each in self.pieces for _, nbytes in each)

    def reads(self, placements: Sequence[Placement]) -> tuple[Read, ...]:
        """In the order of the prefetches, through the slots in turn."""
        slots = self.homes.slots - self.homes.bounce
        order = sorted(range(len(placements)), key=lambda i: (placements[i].prefetch, placements[i].carried, i))
        pieces = [(i, start, nbytes) for i in order for start, nbytes in self.pieces[i]]
        count = len(pieces)
        found = []
        for number, (bundle, start, nbytes) in enumerate(pieces):
            slot = number % slots
            before = number - slots if number >= slots else slot + (count - 1 - slot) // slots * slots - count
            found.append(Read(bundle, start, nbytes, slot, before))
        return tuple(found)

    def layout(self, host: HostMemory, placements: Sequence[Placement], ahead: bool) -> HostLayout:
        """As an emitted program carries it; `ahead`: calls follow each other."""
        homes, reads = self.homes, self.reads(placements)
        return HostLayout(
            host.budget_bytes, host.disk_bytes, homes.held, homes.tables, homes.other_bytes, homes.slot_bytes, homes.slots,
            homes.bounce, reads, ahead and bool(reads),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class HostProblem:
    """The weights of one problem, and the host's memory."""

    host: HostMemory
    problem: Problem

    @cached_property
    def hosted_bytes(self) -> int:
        """Of values that live on the host."""
        return align(self.problem.hosted[1], PAGE_BYTES)

    @cached_property
    def least_bytes(self) -> int:
        """The least budget of the host."""
        if self.host.held is not None:
            return self.hosted_bytes + self._held_bytes + self.least_ring_bytes
        return self.hosted_bytes + min(self._all_bytes, self.least_ring_bytes)

    @property
    def fits(self) -> bool:
        return self.host.budget_bytes >= self.least_bytes

    @cached_property
    def holds_all(self) -> bool:
        """Whether everything is in memory: what the program reads, and what else the module has."""
        return self.host.held is None and self.hosted_bytes + self._all_bytes <= self.host.budget_bytes

    def least_read_bytes(self, spans: Sequence[BundleSpan]) -> int:
        """What is read in every call at least, if these bundles are streamed."""
        if self.holds_all:
            return 0
        homes = {self._home[w] for span in spans for w in span.weights}
        if self.host.held is not None:
            return sum(self._bytes[home] for home in homes if home not in self.host.held)
        return max(0, sum(self._bytes[home] for home in homes) - self._room(0))

    def least_read_of(self, streamed_bytes: int) -> int:
        """What is read in every call at least, if so many bytes are streamed, whichever they are."""
        if self.holds_all:
            return 0
        return max(0, streamed_bytes - (self._held_bytes if self.host.held is not None else self._room(0)))

    def plan(self, spans: Sequence[BundleSpan], slots: int = RING_SLOTS[0]) -> HostPlan:
        """The homes, if these bundles are streamed and reads have so many slots, or as many as there is room for."""
        if self.holds_all:
            return self._planned(spans, set(self._bytes), BOUNCE if self._tables else 0)
        streamed = dict.fromkeys(self._home[w] for span in spans for w in span.weights)
        if self.host.held is not None:
            held = set(self.host.held) & self._bytes.keys()
            bounce = BOUNCE if self._tables or self._bytes.keys() - held else 0
            return self._planned(spans, held, bounce + (self._fitting(slots) if streamed.keys() - held else 0))
        if sum(self._bytes[home] for home in streamed) <= self._room(0):
            slots, spilled = 0, set[str]()
        else:
            slots = self._fitting(slots)
            spilled = self._spilled(spans, self._room(slots))
        left = self._room(slots)
        held = set()
        for home in (*streamed, *self._tables, *self._rest):
            if home not in spilled and home not in held and self._bytes[home] <= left:
                held.add(home)
                left -= self._bytes[home]
        return self._planned(spans, held, slots + BOUNCE)

    def given(self, spans: Sequence[BundleSpan], homes: Homes) -> HostPlan:
        """The plan that was decided.

        Raises:
            KeyError: it names a weight that the program does not have.
        """
        held = {*(self._home[key] for key in homes.held), *homes.tables}
        pieces, own = zip(*(self._pieces(span, held, homes.slot_bytes) for span in spans), strict=True) if spans else ((), ())
        return HostPlan(homes, pieces, own, self._scratch_bytes(held))

    def _planned(self, spans: Sequence[BundleSpan], held: set[str], slots: int) -> HostPlan:
        other = self._other_bytes if self.holds_all else 0
        if self.host.held is not None:
            other = self._held_bytes - sum(self._bytes[home] for home in held)
        homes = Homes(
            tuple(key for key, home in self._home.items() if home in held),
            tuple(name for name in self._tables if name in held),
            other,
            self._slot_bytes if slots else 0,
            slots,
            BOUNCE if slots else 0,
        )
        return self.given(spans, homes)

    def _room(self, slots: int) -> int:
        """For weights, beside so many slots for reads."""
        taken = self.hosted_bytes + (slots + BOUNCE) * self._slot_bytes
        return (self.host.budget_bytes - taken) // PAGE_BYTES * PAGE_BYTES

    def _fitting(self, slots: int) -> int:
        """As many slots, or as many as leave room."""
        taken = self.hosted_bytes + (self._held_bytes if self.host.held is not None else 0)
        return max(_LEAST_SLOTS, min(slots, (self.host.budget_bytes - taken) // self._slot_bytes - BOUNCE))

    @cached_property
    def _least_slot(self) -> int:
        return _least_slot(self.problem.total_weight_bytes)

    @cached_property
    def _slot_bytes(self) -> int:
        free = self.host.budget_bytes - self.hosted_bytes
        wanted = int(min(free, sum(self._bytes.values())) * _SHARE)
        if self.host.held is not None:  # what is free beside that is the ring's
            wanted = min(wanted, (free - self._held_bytes) // _USUAL_SLOTS)
        return max(self._least_slot, min(1 << (max(wanted, 1).bit_length() - 1), _MOST_SLOT))

    @property
    def least_ring_bytes(self) -> int:
        """Of the smallest ring that works."""
        return least_ring_bytes(self.problem.total_weight_bytes)

    @property
    def usual_ring_bytes(self) -> int:
        """Of a ring with as many slots as are tried first."""
        return _USUAL_SLOTS * self._slot_bytes

    def _spilled(self, spans: Sequence[BundleSpan], room: int) -> set[str]:
        """The streamed weights that go to disk so that the others fit `room`, evenly by compute time (error diffusion)."""
        elapsed = self.problem.elapsed
        at: dict[str, float] = {}
        for span in spans:
            for weight in span.weights:
                at.setdefault(self._home[weight], float(elapsed[span.last + 1]))
        return spread(at, self._bytes, sum(self._bytes[home] for home in at) - room, float(elapsed[-1]))

    def _pieces(self, span: BundleSpan, held: set[str], slot_bytes: int) -> tuple[tuple[tuple[int, int], ...], int]:
        """What of a bundle is read, in pieces of at most a slot, and the bytes of the rest."""
        runs: list[list[int]] = []
        offset = own = 0
        after = False
        for weight in span.weights:
            taken, nbytes = self.problem.weight_bytes[weight], self.problem.program.weights[weight].nbytes
            if self._home[weight] in held:
                own, after = own + taken, False
            else:
                if not after:
                    runs.append([offset, offset])
                runs[-1][1], after = offset + nbytes, True
            offset += taken
        cut = [(at, min(slot_bytes, stop - at)) for start, stop in runs for at in range(start, stop, slot_bytes)]
        return tuple(cut), own

    def _scratch_bytes(self, held: set[str]) -> int:
        """Of what is not in memory and in no file either."""
        if self.holds_all:
            return 0
        in_file = {name for tensor in self.host.tensors if tensor.in_file for name in tensor.names}
        others = [t for t in self._unread if not t.in_file and not t.names & (self.host.held or {}).keys()]
        other = sum(self._aligned(tensor.nbytes) for tensor in others)
        return other + sum(n for home, n in self._bytes.items() if home not in held and home not in in_file)

    @cached_property
    def _home(self) -> dict[str, str]:
        """The name under which the host has each weight, by placeholder."""
        return {key: home_of(weight) for key, weight in self.problem.program.weights.items() if not weight.made}

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """Of every home of what the program reads, as they are aligned."""
        return homes_of(self.problem)

    @cached_property
    def _tables(self) -> tuple[str, ...]:
        return tuple(self.problem.program.tables)

    @cached_property
    def _rest(self) -> tuple[str, ...]:
        """What is read once, before the first call: better in memory only where it would have to be written to disk else."""
        in_file = {name for tensor in self.host.tensors if tensor.in_file for name in tensor.names}
        return tuple(home for home in self._bytes if home not in in_file)

    @cached_property
    def _unread(self) -> tuple[ModuleTensor, ...]:
        weights, tables = self.problem.program.weights.values(), self.problem.program.tables.values()
        read = {name for w in (*weights, *tables) if w.stored is None for name in (w.name, *w.aliases)}
        return tuple(tensor for tensor in self.host.tensors if not tensor.names & read)

    @cached_property
    def _other_bytes(self) -> int:
        return sum(self._aligned(tensor.nbytes) for tensor in self._unread)

    @cached_property
    def _held_bytes(self) -> int:
        return align(sum((self.host.held or {}).values()), PAGE_BYTES)

    @cached_property
    def _all_bytes(self) -> int:
        """What holding everything takes."""
        bounce = BOUNCE * self._slot_bytes if self._tables else 0
        return align(sum(self._bytes.values()) + self._other_bytes, PAGE_BYTES) + bounce

    def _aligned(self, nbytes: int) -> int:
        return align(nbytes, self.problem.memory.weight_alignment)


def least_ring_bytes(weight_bytes: int) -> int:
    """Of the smallest ring that works for a program with so many bytes of weights."""
    return (_LEAST_SLOTS + BOUNCE) * _least_slot(weight_bytes)


def _least_slot(weight_bytes: int) -> int:
    wanted = max(PAGE_BYTES, weight_bytes // _MOST_READS)
    return min(1 << (wanted - 1).bit_length(), _MOST_SLOT)


def spread(at: dict[str, float], nbytes: Mapping[str, int], excess: int, until: float) -> set[str]:
    """Homes that have at least `excess` bytes together, evenly by the time `at` which each is read, of all `until` then."""
    spilled: set[str] = set()
    sent = 0
    for home, time in at.items():
        if excess * time / max(until, 1e-30) - sent >= nbytes[home] / 2:
            spilled.add(home)
            sent += nbytes[home]
    for home in [home for home in reversed(at) if home not in spilled]:
        if sent >= excess:
            break
        spilled.add(home)
        sent += nbytes[home]
    for home in sorted((home for home in at if home in spilled), key=lambda home: nbytes[home]):
        if sent - nbytes[home] >= excess:
            spilled.discard(home)
            sent -= nbytes[home]
    return spilled


def homes_of(problem: Problem) -> dict[str, int]:
    """What the program reads, by the host's names: whole weights, in bytes as they are aligned."""
    weights = (*problem.program.weights.values(), *problem.program.tables.values())
    return {home_of(w): align(_whole_bytes(w), problem.memory.weight_alignment) for w in weights if not w.made}


def rings(host: HostProblem, spans: Sequence[BundleSpan]) -> Iterator[HostPlan]:
    """The homes of a selection with rings of several sizes; what the ring takes, fewer weights have."""
    first = host.plan(spans)
    yield first
    if first.read_bytes:
        seen = {first.homes}
        for slots in RING_SLOTS[1:]:
            found = host.plan(spans, slots)
            if found.homes not in seen:
                seen.add(found.homes)
                yield found


def home_of(weight: Weight) -> str:
    """The name under which the host has it."""
    return weight.name if weight.stored is None else weight.stored.key


def _whole_bytes(weight: Weight) -> int:
    """Of the weight that it is a part of."""
    if weight.rows is None:
        return weight.nbytes
    return weight.rows.of * weight.spec.stride[0] * weight.spec.dtype.itemsize
