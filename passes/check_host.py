"""The checker of the host's memory: proves I1, I3 and I4 there, from an emitted program's graph and layout alone.

It shares no code with what chose the homes and placed the reads. What is in memory is added up here again, and reads are
replayed in the order of the program's own prefetches, call after call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from passes.program import Program, Weight
from runtime import ops
from runtime.errors import CheckError
from runtime.layout import HostLayout, Layout, Read

_PAGE = 4096
# Calls that are replayed: the second finds the ring as the first leaves it, the third as every later one does.
_CALLS = 3


def check_host(program: Program) -> int:
    """Proves an emitted program against the budget of the host's memory; gives the bytes that it takes there, whole pages.

    Raises:
        CheckError: cites the invariant, and the bundle or weight.
    """
    layout = program.layout
    if layout is None or layout.host is None:
        return 0
    host = layout.host
    _check_names(program, host)
    _check_ring(host)
    nbytes = _locked_bytes(program, layout, host)
    if nbytes > host.budget_bytes:
        raise CheckError(
            f"I1: the host's memory takes {nbytes} B of {host.budget_bytes} B: weights {_held_bytes(program, layout, host)} B, "
            f"values {layout.host_bytes} B, the ring {host.slots * host.slot_bytes} B"
        )
    _check_reads(program, layout, host)
    _check_order(program, host)
    _check_refills(host)
    return nbytes


def check_hosts(programs: Mapping[str, Program], budget_bytes: int, *, in_turn: bool = False) -> int:
    """Proves programs that share one budget of the host's memory; gives the bytes that they take there at most, whole pages.

    Weights are there once; the ring and the values of each are there beside those of all others, or `in_turn`, where one
    program is loaded at a time.

    Raises:
        CheckError: as `check_host`; or cites the program.
    """
    homes: dict[str, tuple[str, bool]] = {}
    held: dict[str, int] = {}
    weights = beside = 0
    for key, program in programs.items():
        nbytes, layout = check_host(program), program.layout
        if layout is None or layout.host is None:
            raise CheckError(f"I1: the host's memory has a budget, and the program {key} says nothing of what it takes there")
        own = _held(program, layout, layout.host)
        for name in {_store_name(w) for w in (*program.weights.values(), *program.tables.values())}:
            other, there = homes.setdefault(name, (key, name in own))
            if there != (name in own):
                raise CheckError(f"I3: {name} has one home for {other}, and another for {key}")
        held |= own
        pages = _pages(sum(own.values()) + layout.host.other_bytes)
        rest = nbytes - pages
        weights, beside = max(weights, pages), max(beside, rest) if in_turn else beside + rest
    if sum(held.values()) > weights:
        raise CheckError(
            f"I1: all programs hold weights of {sum(held.values())} B together, and each counts {weights} B at most"
        )
    if weights + beside > budget_bytes:
        raise CheckError(
            f"I1: the host's memory takes {weights + beside} B of {budget_bytes} B: weights {weights} B, "
            f"values and rings of {len(programs)} programs {'in turn ' if in_turn else ''}{beside} B"
        )
    return weights + beside


def _check_names(program: Program, host: HostLayout) -> None:
    for name in host.held:
        if name not in program.weights:
            raise CheckError(f"I3: {name} has its home in memory, and the program has no such weight")
        if program.weights[name].made:
            raise CheckError(f"I3: {name} is the program's own, and cannot have a home in memory")
    for name in host.tables:
        if name not in program.tables:
            raise CheckError(f"I3: the table {name} has its home in memory, and the program looks up no such table")
    held = {_store_name(program.weights[name]) for name in host.held}
    for name, weight in program.weights.items():
        if name not in host.held and _store_name(weight) in held:
            raise CheckError(f"I3: {name} and another part of {_store_name(weight)} have different homes")


def _check_ring(host: HostLayout) -> None:
    if not 0 <= host.bounce <= host.slots or host.slot_bytes < 0:
        raise CheckError(f"I1: a ring of {host.slots} slots cannot have {host.bounce} for what is not read ahead")


def _locked_bytes(program: Program, layout: Layout, host: HostLayout) -> int:
    parts = (_held_bytes(program, layout, host) + host.other_bytes, layout.host_bytes, host.slots * host.slot_bytes)
    return sum(map(_pages, parts))


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _held_bytes(program: Program, layout: Layout, host: HostLayout) -> int:
    return sum(_held(program, layout, host).values())


def _held(program: Program, layout: Layout, host: HostLayout) -> dict[str, int]:
    """Every weight in memory once and whole, whatever parts of it the program reads, in bytes as it is aligned."""
    homes: dict[str, int] = {}
    weights = [program.weights[name] for name in host.held] + [program.tables[name] for name in host.tables]
    for weight in weights:
        whole = weight.nbytes
        if weight.rows is not None:
            whole = weight.rows.of * weight.spec.stride[0] * weight.spec.dtype.itemsize
        homes[_store_name(weight)] = -(-whole // layout.alignment) * layout.alignment
    return homes


def _store_name(weight: Weight) -> str:
    return weight.name if weight.stored is None else weight.stored.key


def _check_reads(program: Program, layout: Layout, host: HostLayout) -> None:
    """Of every bundle those weights are read, and those bytes, that are not in memory: each once."""
    usable = host.slots - host.bounce
    by_bundle: dict[int, list[Read]] = {}
    for number, read in enumerate(host.reads):
        if not 0 <= read.bundle < len(layout.bundles):
            raise CheckError(f"I3: read {number} is of bundle {read.bundle}, and the layout has no such bundle")
        if not 0 <= read.slot < usable:
            raise CheckError(f"I4: read {number} goes to slot {read.slot} of {usable}")
        if not 0 < read.nbytes <= host.slot_bytes:
            raise CheckError(f"I4: read {number} has {read.nbytes} B, and a slot {host.slot_bytes} B")
        by_bundle.setdefault(read.bundle, []).append(read)
    for bundle in layout.bundles:
        cursor = 0
        covered: list[tuple[int, int]] = []
        for read in by_bundle.get(bundle.index, []):
            if read.start < cursor:
                raise CheckError(f"I3: bundle {bundle.index} is read twice at byte {read.start}, or out of order")
            cursor = read.start + read.nbytes
            covered.append((read.start, cursor))
        if cursor > bundle.nbytes:
            raise CheckError(f"I2: reads of bundle {bundle.index} end {cursor - bundle.nbytes} B behind it")
        for slot in bundle.slots:
            nbytes = program.weights[slot.weight].nbytes
            inside = _overlap(covered, slot.offset, slot.offset + nbytes)
            if slot.weight in host.held and inside:
                raise CheckError(f"I3: {slot.weight} is in memory, and {inside} B of bundle {bundle.index} are read over it")
            if slot.weight not in host.held and inside != nbytes:
                raise CheckError(
                    f"I3: {slot.weight} is on disk, and {inside} B of its {nbytes} B are read for bundle {bundle.index}"
                )


def _overlap(ranges: Iterable[tuple[int, int]], start: int, stop: int) -> int:
    return sum(max(0, min(stop, b) - max(start, a)) for a, b in ranges)


def _check_order(program: Program, host: HostLayout) -> None:
    """Reads are asked for as bundles are: the ring is emptied in the order in which it is filled."""
    prefetched = [int(n.args[0]) for n in program.graph.nodes if n.target is ops.prefetch]
    read = {r.bundle for r in host.reads}
    wanted = [bundle for bundle in prefetched if bundle in read]
    found = [r.bundle for i, r in enumerate(host.reads) if i == 0 or host.reads[i - 1].bundle != r.bundle]
    if wanted != found:
        raise CheckError(f"I4: bundles are prefetched in the order {wanted} and read in the order {found}: the ring would jam")


def _check_refills(host: HostLayout) -> None:
    """Replays some calls: a slot is filled when a copy is over behind which the copy out of it lies."""
    count = len(host.reads)
    last: dict[int, int] = {}  # by slot the read that filled it, counted over all calls
    for index in range(_CALLS * count):
        number = index % count
        read = host.reads[number]
        follows = index - number + read.after
        if read.after >= number or read.after < -count:
            raise CheckError(f"I4: read {number} waits for the copy of read {read.after}, which comes behind it")
        if read.slot in last and last[read.slot] > follows:
            raise CheckError(
                f"I4: read {number} refills slot {read.slot} after copy {follows % count}, and the copy of read "
                f"{last[read.slot] % count} out of it comes later"
            )
        last[read.slot] = index
