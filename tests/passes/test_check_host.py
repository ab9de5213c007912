"""The checker of the host's memory: good plans pass, and every way to break one is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from passes.check_host import check_host
from passes.program import Program
from planner import Plan, plan
from runtime import ops
from runtime.errors import CheckError
from runtime.layout import HostLayout, Read


class Looked(nn.Module):
    """A table of which rows are looked up, then weights that are streamed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4000, 64)
        self.layers = nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.table(x))  # type: ignore[no-any-return]


@cache
def spilled(repeats: int = 1) -> Plan:
    torch.manual_seed(0)
    module = Looked().eval()
    return plan(module, {"accounting": "90KB", "cpu": "120KB"}, inputs=(torch.arange(8),), repeats=repeats)


def host_of(program: Program) -> HostLayout:
    assert program.layout is not None
    assert program.layout.host is not None
    return program.layout.host


def changed(program: Program, **changes: object) -> Program:
    assert program.layout is not None
    return replace(program, layout=replace(program.layout, host=replace(host_of(program), **changes)))  # type: ignore[arg-type]


def with_read(program: Program, number: int, **changes: int) -> Program:
    reads = list(host_of(program).reads)
    reads[number] = replace(reads[number], **changes)
    return changed(program, reads=tuple(reads))


@pytest.mark.parametrize("repeats", [1, 3])
def test_good_plans_pass_and_their_bytes_are_counted(repeats: int) -> None:
    p = spilled(repeats)
    host = host_of(p.emitted)
    assert len(host.reads) > 2 * (host.slots - host.bounce)
    assert host.held
    assert host.slots * host.slot_bytes < check_host(p.emitted) <= (p.budget.host_bytes or 0)
    assert host.ahead == (repeats > 1)


def test_no_budget_nothing_to_prove() -> None:
    assert check_host(spilled().replan("90KB").emitted) == 0


def _swapped(program: Program) -> Program:
    """The reads of two bundles in the other order."""
    reads = list(host_of(program).reads)
    at = next(i for i in range(1, len(reads)) if reads[i].bundle != reads[i - 1].bundle)
    reads[at - 1], reads[at] = replace(reads[at], slot=reads[at - 1].slot), replace(reads[at - 1], slot=reads[at].slot)
    return changed(program, reads=tuple(reads))


def _without(program: Program, number: int) -> Program:
    reads = host_of(program).reads
    return changed(program, reads=reads[:number] + reads[number + 1 :])


def _prefetched_elsewhere(program: Program) -> Program:
    """The program prefetches its bundles in another order than they are read."""
    graph = program.copy_graph()
    read = {r.bundle for r in host_of(program).reads}
    first, second = [n for n in graph.nodes if n.target is ops.prefetch and n.args[0] in read][:2]
    first.args, second.args = second.args, first.args
    return replace(program, graph=graph)


def _held_too(program: Program) -> Program:
    """A weight that is read is said to be in memory."""
    assert program.layout is not None
    bundle = program.layout.bundles[host_of(program).reads[0].bundle]
    name = next(slot.weight for slot in bundle.slots if slot.weight not in host_of(program).held)
    return changed(program, held=(*host_of(program).held, name), budget_bytes=10**9)


def _not_held(program: Program) -> Program:
    """A streamed weight that is not read is said to be on disk."""
    assert program.layout is not None
    streamed = {slot.weight for bundle in program.layout.bundles for slot in bundle.slots}
    name = next(name for name in host_of(program).held if name in streamed)
    return changed(program, held=tuple(other for other in host_of(program).held if other != name))


MUTATIONS: dict[str, tuple[str, Callable[[Program], Program]]] = {
    "a smaller budget": ("I1: the host's memory takes", lambda p: changed(p, budget_bytes=check_host(p) - 1)),
    "more slots": ("I1: the host's memory takes", lambda p: changed(p, slots=host_of(p).slots + 30)),
    "more of other weights": ("I1: the host's memory takes", lambda p: changed(p, other_bytes=120_000)),
    "more for what is not read ahead": ("I1: a ring of", lambda p: changed(p, bounce=host_of(p).slots + 1)),
    "an unknown weight": ("I3: nobody has its home", lambda p: changed(p, held=("nobody",))),
    "an unknown table": ("I3: the table nobody", lambda p: changed(p, tables=("nobody",))),
    "an unknown bundle": ("I3: read 0 is of bundle 99", lambda p: with_read(p, 0, bundle=99)),
    "a slot of what is not read ahead": ("I4: read 1 goes to slot", lambda p: with_read(p, 1, slot=host_of(p).slots - 1)),
    "a read larger than its slot": ("I4: read 0 has", lambda p: with_read(p, 0, nbytes=host_of(p).slot_bytes + 1)),
    "an empty read": ("I4: read 0 has 0 B", lambda p: with_read(p, 0, nbytes=0)),
    "smaller slots": ("I4: read 0 has", lambda p: changed(p, slot_bytes=host_of(p).slot_bytes // 2)),
    "a read cut short": ("I3: .* is on disk, and", lambda p: with_read(p, 0, nbytes=host_of(p).reads[0].nbytes - 1)),
    "a read from elsewhere": ("I[23]: ", lambda p: with_read(p, 0, start=host_of(p).reads[0].start + 4)),
    "a read left out": ("I[34]: ", lambda p: _without(p, 0)),
    "reads in another order": ("I4: bundles are prefetched in the order", _swapped),
    "prefetches in another order": ("I4: bundles are prefetched in the order", _prefetched_elsewhere),
    "read although in memory": ("I3: .* is in memory, and", _held_too),
    "on disk and not read": ("I3: .* is on disk, and 0 B", _not_held),
    "a slot refilled early": ("I4: read 4 refills slot", lambda p: with_read(p, 4, after=host_of(p).reads[4].after - 1)),
    "another slot": ("I4: read . refills slot", lambda p: with_read(p, 5, slot=1 - host_of(p).reads[5].slot)),
    "a slot refilled early over the seam": ("I4: read 0 refills slot", lambda p: with_read(p, 0, after=-len(host_of(p).reads))),
    "a read that waits for itself": ("I4: read 3 waits for the copy of read 3", lambda p: with_read(p, 3, after=3)),
    "a read that waits for a later one": ("I4: read 3 waits for the copy of read 5", lambda p: with_read(p, 3, after=5)),
    "a read that waits for the call before the last": ("I4: read 0 waits", lambda p: with_read(p, 0, after=-1000)),
}


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_broken_is_named(name: str, repeats: int) -> None:
    said, mutate = MUTATIONS[name]
    broken = mutate(spilled(repeats).emitted)
    with pytest.raises(CheckError, match=said):
        check_host(broken)


def test_every_refill_is_proved() -> None:
    """Wherever a read is let go one copy sooner, or its slot exchanged, the checker objects."""
    program = spilled().emitted
    for number, read in enumerate(host_of(program).reads):
        assert isinstance(read, Read)
        with pytest.raises(CheckError, match="I4"):
            check_host(with_read(program, number, after=read.after - 1))
