"""The laws of the solver on small real models: more budget is never slower, the minimum is a minimum."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from passes.cuda_replay import Trace
from planner.bounds import physical_bound
from planner.budget import Budget
from planner.machine import Machine
from planner.memory import MemoryModel, Reserved
from planner.options import Options
from planner.pipeline import emit_program
from planner.prepare import prepare
from planner.solve import relax
from planner.solve.bundles import BundleSpan, make_bundles, spread_evenly, spread_fractions
from planner.solve.decide import Solver
from planner.solve.homes import HostMemory
from planner.solve.problem import Problem
from planner.solve.simulate import EngineProgram, step_time
from planner.solve.tilings import Tilings
from tests.zoo import ZOO

# A link so slow against compute that small models stream like large ones.
MACHINE = replace(
    Machine.preset("rtx-4090"), name="slow link", link_latency_seconds=1e-7, launch_seconds=1e-7, link_bandwidth=5e9
)


@cache
def tilings(name: str, device: str = "accounting", repeats: int = 1) -> Tilings:
    module, args, kwargs = ZOO[name]()
    return prepare(module, Options(Budget.parse("1GB"), MACHINE, device, args=args, kwargs=kwargs, repeats=repeats))


def solver(name: str, device: str = "accounting", repeats: int = 1) -> Solver:
    return tilings(name, device, repeats).base


@pytest.mark.parametrize("name", ["bert", "t5_encoder", "vae_decoder", "lstm", "llama", "vit"])
@pytest.mark.parametrize("repeats", [1, 4])
def test_a_larger_budget_is_never_slower(name: str, repeats: int) -> None:
    solved = solver(name, repeats=repeats)
    low, high = solved.minimum.peak_bytes, int(solved.resident.peak_bytes * 1.05)
    budgets = np.linspace(low, high, 9).astype(int).tolist()
    schedules = [solved.solve(b) for b in budgets]
    seconds = [s.time.step_seconds for s in schedules]
    assert seconds == sorted(seconds, reverse=True)
    for budget, schedule in zip(budgets, schedules, strict=True):
        assert schedule.peak_bytes <= budget
        bound = physical_bound(solved.problem, budget)
        assert schedule.time.step_seconds >= bound.seconds * (1 - 1e-9)
    assert seconds[-1] == pytest.approx(solved.problem.compute_seconds)
    assert not schedules[-1].placements


@pytest.mark.parametrize("name", ["bert", "vae_decoder"])
def test_a_larger_budget_is_never_slower_on_cuda(name: str) -> None:
    solved = solver(name, "cuda")
    low, high = solved.minimum.peak_bytes, int(solved.resident.peak_bytes * 1.05)
    seconds = [solved.solve(b).time.step_seconds for b in np.linspace(low, high, 5).astype(int).tolist()]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("name", ["bert", "flux", "vae_decoder"])
def test_what_is_predicted_is_what_is_proved(name: str) -> None:
    solved = solver(name)
    for share in (0.0, 0.4, 1.0):
        budget = int(solved.minimum.peak_bytes + share * (solved.resident.peak_bytes - solved.minimum.peak_bytes))
        schedule = solved.solve(budget)
        _, proof = emit_program(solved.problem, schedule.decisions(solved.problem), budget)
        assert proof.peak_bytes == schedule.peak_bytes


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_minimum(name: str) -> None:
    solved = solver(name)
    problem = solved.problem
    schedule = solved.solve(solved.minimum.peak_bytes)
    assert schedule.peak_bytes == solved.minimum.peak_bytes <= solved.resident.peak_bytes
    # At every operator: what it holds of weights besides its activations.
    least = 0
    for i, activations in enumerate(problem.activation_bytes.tolist()):
        held = sum(
            problem.weight_bytes[w] for w in {v.weight for v in problem.visits if v.first <= i <= v.last} | problem.pinned
        )
        least = max(least, activations + held)
    assert solved.minimum.peak_bytes == least


@pytest.mark.parametrize("name", ["bert", "lstm", "llama"])
@pytest.mark.parametrize(("target", "tiny"), [(0, 0), (0, 1000), (50_000, 1000), (10**9, 0)])
def test_bundles_cover_every_visit_once(name: str, target: int, tiny: int) -> None:
    problem = solver(name).problem
    spans = make_bundles(problem, target, tiny)
    wanted = {
        (v.weight, v.first, v.last)
        for v in problem.visits
        if v.weight not in problem.pinned and problem.weight_bytes[v.weight] > tiny
    }
    covered = [
        (v.weight, v.first, v.last) for v in problem.visits for s in spans
        if v.weight in s.weights and s.first <= v.first and v.last <= s.last
    ]  # fmt: skip
    assert sorted(covered) == sorted(wanted)
    assert [s.first for s in spans] == sorted(s.first for s in spans)
    for span in spans:
        assert span.nbytes == sum(problem.weight_bytes[w] for w in span.weights)
        assert span.nbytes <= target or len({(v.first, v.last) for v in problem.visits if v.weight in span.weights}) >= 1


@pytest.mark.parametrize("name", ["bert", "t5_encoder", "flux"])
def test_a_streamed_weight_is_streamed_in_all_its_visits(name: str) -> None:
    problem = solver(name).problem
    spans = make_bundles(problem, 0, 0)
    total = sum(span.nbytes for span in spans)
    for share in (0.1, 0.3, 0.9, 3.0):
        for phase in (0.5, 0.95):
            whole_weights(spread_evenly(problem, spans, share * total, phase=phase), problem)
        whole_weights(spread_fractions(problem, spans, dict.fromkeys(problem.weight_bytes, min(share, 1.0)), 0), problem)
    assert spread_evenly(problem, spans, 1e30) == spans
    assert spread_evenly(problem, spans, 0.0, phase=0.1) == ()
    assert spread_fractions(problem, spans, {}, total) == spans


class Again(nn.Module):
    """One layer three times over, and behind it a weight that is read once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(torch.relu(self.layer(x))))) * self.scale


@pytest.mark.parametrize("name", ["again", "bert", "t5_encoder"])
@pytest.mark.parametrize("repeats", [1, 4])
def test_every_selection_has_whole_weights(name: str, repeats: int) -> None:
    if name == "again":
        options = Options(Budget.parse("1GB"), MACHINE, "accounting", args=(torch.rand(2, 8),), repeats=repeats)
        solved = prepare(Again().eval(), options).base
    else:
        solved = solver(name, repeats=repeats)
    problem, found = solved.problem, 0
    for family in (solved.selections.relaxed, solved.selections.even):
        for selection in family(solved.minimum.peak_bytes, lambda: math.inf):
            whole_weights(selection, problem)
            found += 1
    for selection, _ in solved.selections.uniform:
        whole_weights(selection, problem)
    assert found


def whole_weights(chosen: tuple[BundleSpan, ...], problem: Problem) -> None:
    """A weight that is streamed at all is there in each of its visits, once."""
    streamed = {weight for span in chosen for weight in span.weights}
    for visit in problem.visits:
        over = [s for s in chosen if visit.weight in s.weights and s.first <= visit.first and visit.last <= s.last]
        assert len(over) == (visit.weight in streamed)


@pytest.mark.parametrize("name", ["bert", "t5_encoder", "flux", "vae_decoder", "lstm", "vit"])
@pytest.mark.parametrize("repeats", [1, 4])
def test_the_linear_program_is_a_bound(name: str, repeats: int) -> None:
    """physical <= linear program <= simulated <= the linear program and every weight copied once, one after the other."""
    solved = solver(name, repeats=repeats)
    problem, machine = solved.problem, solved.problem.machine
    everything = sum(machine.copy_seconds(span.nbytes) for span in make_bundles(problem, 0, 0))
    for share in (0.0, 0.2, 0.5, 0.8):
        budget = int(solved.minimum.peak_bytes + share * (solved.resident.peak_bytes - solved.minimum.peak_bytes))
        relaxation = solved.relaxed(budget)
        assert relaxation is not None
        step = solved.solve(budget).time.step_seconds
        assert physical_bound(problem, budget).seconds <= relaxation.seconds * (1 + 1e-5)
        assert relaxation.seconds <= step * (1 + 1e-9)
        assert step <= relaxation.seconds + everything


@pytest.mark.parametrize("name", ["t5_encoder", "flux", "vit"])
@pytest.mark.parametrize("repeats", [1, 4])
def test_the_linear_program_of_a_long_program_is_a_bound(name: str, repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With segments joined it is a bound of the exact one."""
    solved = solver(name, repeats=repeats)
    coarse = solved.segments.joined(len(solved.segments) // 5)
    assert len(coarse) <= len(solved.segments) // 4
    assert coarse.starts[-2:].tolist() == solved.segments.starts[-2:].tolist()
    assert coarse.seconds.sum() == pytest.approx(solved.problem.compute_seconds)
    assert (solved.segments.activation_bytes[solved.segments.index(coarse.peaks)] == coarse.activation_bytes).all()
    for share in (0.0, 0.3, 0.7):
        budget = int(solved.minimum.peak_bytes + share * (solved.resident.peak_bytes - solved.minimum.peak_bytes))
        exact = solved.relaxed(budget)
        monkeypatch.setattr(relax, "_MOST_SEGMENTS", len(solved.segments) // 5)
        joined = relax.relax(solved.problem, solved.segments, budget, seam=repeats > 1)
        monkeypatch.undo()
        assert exact is not None
        assert joined is not None
        assert solved.problem.compute_seconds <= joined.seconds <= exact.seconds * (1 + 1e-6)


@pytest.mark.parametrize("name", ["bert", "flux"])
def test_a_faster_link_is_never_slower(name: str) -> None:
    """One schedule, whatever the link."""
    solved = solver(name)
    schedule = solved.solve((solved.minimum.peak_bytes + solved.resident.peak_bytes) // 2)
    program = EngineProgram.placed(solved.problem.seconds, schedule.placements)
    links = [replace(MACHINE, link_bandwidth=MACHINE.link_bandwidth * 1.5**i) for i in range(6)]
    seconds = [step_time(program, machine).step_seconds for machine in links]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("name", ["bert", "llama", "vae_decoder"])
def test_going_over_the_seam_is_never_slower(name: str) -> None:
    alone, cyclic = solver(name), solver(name, repeats=4)
    for share in (0.0, 0.3, 0.6):
        budget = int(alone.minimum.peak_bytes + share * (alone.resident.peak_bytes - alone.minimum.peak_bytes))
        assert cyclic.solve(budget).time.step_seconds <= alone.solve(budget).time.step_seconds * (1 + 1e-9)


def test_what_does_not_fit_the_hosts_memory_is_read_and_takes_longer() -> None:
    solved = solver("bert")
    budget = (solved.minimum.peak_bytes + solved.resident.peak_bytes) // 2
    free = solved.solve(budget)
    assert free.host is None
    streamed = solved.problem.arena_bytes({w for placed in free.placements for w in placed.span.weights})
    seconds = []
    for nbytes in (100_000, streamed // 2, 10**9):
        found = solved.solve(budget, HostMemory(nbytes))
        assert found.host is not None
        held = solved.problem.arena_bytes(set(found.host.homes.held))
        assert held + found.host.homes.slot_bytes * found.host.homes.slots <= nbytes
        seconds.append(found.time.step_seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == free.time.step_seconds < seconds[0]


def test_memory_models_round_as_they_say() -> None:
    assert MemoryModel.of("accounting").round_activation(513) == 513
    assert MemoryModel.of("cuda", (8, 9)).round_activation(513) == 1024
    assert MemoryModel.of("cuda", (8, 9)).reserved_alone(1) == 2 * 1024 * 1024
    assert MemoryModel.of("accounting").reserved_bytes([(1, 10), (2, 5), (-1, 0), (3, 7)]) == 15


def test_memory_models_reserve_a_pool_where_there_is_an_allocator_to_give_it_to() -> None:
    mib = 1024 * 1024
    events = [(1, 12 * mib), (2, 12 * mib), (-1, 0), (-2, 0), (3, 24 * mib)]
    cuda, accounting = MemoryModel.of("cuda"), MemoryModel.of("accounting")
    assert cuda.reserved_bytes(events) == 48 * mib
    assert cuda.reserve(events) == cuda.reserve(Trace.of([events])) == Reserved(24 * mib, (24 * mib,))
    assert cuda.reserve(events, 24 * mib - 1) is None
    assert accounting.reserve(events) == accounting.reserve(events, 24 * mib) == Reserved(24 * mib)
    assert accounting.reserve(events, 24 * mib - 1) is None
    with pytest.raises(TypeError, match=r"give reserve\(\) of 'accounting' the events"):
        accounting.reserve(Trace.of([events]))
