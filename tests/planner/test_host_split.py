"""One budget of the host's memory for several programs: what is decided fits it, agrees, and has what has to be there."""

from __future__ import annotations

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.machine import Machine
from planner.solve.decide import Solver
from planner.solve.homes import PAGE_BYTES, HostMemory, ModuleTensor, homes_of
from planner.solve.host_split import HostSplit, spare_bytes
from planner.solve.phases import Member, MemberShare
from planner.solve.tilings import Tilings
from runtime.layout import align
from tests.planner.toys import Mlp, planned, x

CPU = Machine.preset("cpu")


@cache
def solver(hidden: int, repeats: int) -> Solver:
    return Solver(planned(Mlp(hidden), x())._solver.problem, repeats, pool=False)


@st.composite
def splits(draw: st.DrawFn) -> HostSplit:
    """Programs of the same weights, which stay or come for each call, beside tensors that no program reads."""
    hidden, in_turn = draw(st.sampled_from([64, 400, 1500])), draw(st.booleans())
    tensors = [ModuleTensor(frozenset([n]), size) for n, size in homes_of(solver(hidden, 1).problem).items()]
    others = [ModuleTensor(frozenset([f"other{i}"]), draw(st.integers(1, 30_000))) for i in range(draw(st.integers(0, 2)))]
    tensors += others
    needed = frozenset(draw(st.sets(st.sampled_from(sorted(name for t in tensors for name in t.names)), max_size=3)))
    members, shares = {}, {}
    for number in range(draw(st.integers(1, 3))):
        own, calls = solver(hidden, draw(st.sampled_from([1, 4]))), draw(st.integers(1, 5))
        room = int(draw(st.floats(1.0, 1.5)) * own.minimum.peak_bytes)
        key, stay = f"m{number}", draw(st.sampled_from(["always", "phase", "call"]))
        schedule = own.pass_through(room) if stay == "call" else own.solve(room)
        members[key] = Member(key, Tilings(own), 0, calls, (number,))
        shares[key] = MemberShare(own, schedule, stay, room)  # type: ignore[arg-type]
    least = HostSplit(HostMemory(0, None, tuple(tensors)), CPU, members, shares, in_turn, needed).least_bytes
    more = draw(st.integers(0, sum(tensor.nbytes for tensor in tensors)))
    return HostSplit(HostMemory(least + more, None, tuple(tensors)), CPU, members, shares, in_turn, needed)


@settings(max_examples=60)
@given(splits(), st.booleans())
def test_what_is_decided_fits(split: HostSplit, search: bool) -> None:
    found = split.solve(search=search)
    held = found["m0"].host.held  # type: ignore[union-attr]
    assert held is not None
    assert held.keys() >= split.needed
    taken, own = align(sum(held.values()), PAGE_BYTES), []
    for share in found.values():
        assert share.host is not None
        assert share.host.held == held
        assert share.schedule.host is not None
        own.append(share.host.budget_bytes - taken)
        homes = share.schedule.host.homes
        assert align(homes.slots * homes.slot_bytes, PAGE_BYTES) <= own[-1]
        weights = share.solver.problem.program.weights
        assert {weights[key].name for key in homes.held} == held.keys() & {w.name for w in weights.values()}
    beside = max(own) if split.in_turn else sum(own)
    assert taken + beside <= split.host.budget_bytes
    assert taken + max(beside, spare_bytes(split.host)) <= split.host.budget_bytes


@settings(max_examples=30)
@given(splits())
def test_what_is_held_fits_programs_that_are_planned_later(split: HostSplit) -> None:
    """The same programs with what is in memory then as it is: a plan of another call finds room for its rings."""
    held = split.solve(search=False)["m0"].host.held  # type: ignore[union-attr]
    host = HostMemory(split.host.budget_bytes, None, split.host.tensors, held)
    later = HostSplit(host, CPU, split.members, split.shares, split.in_turn, split.needed)
    assert later.least_bytes <= split.host.budget_bytes
    assert later.solve(search=False)["m0"].host.held == held  # type: ignore[union-attr]
