"""Event for event: copies, waits and evictions happen as simulated; also over the seam of calls, and after what went wrong."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.stream_weights import Stream
from planner import Plan, plan
from planner.solve.bundles import make_bundles
from planner.solve.decide import Solver
from planner.solve.decisions import Decisions, StagingMode
from planner.solve.simulate import Kind, simulate
from planner.solve.tilings import Tilings
from runtime.devices import readers
from runtime.errors import PlannerError
from runtime.timeline import Timeline
from tests.planner.problems import placed
from tests.planner.test_decide import MACHINE
from tests.properties.test_plans import SHARES, budget_at, same
from tests.runtime.test_executor import with_decisions
from tests.strategies.modules import Case, cases
from tests.zoo import ZOO

DEVICES = ["accounting", "cpu"]
REPEATS = [1, 3]
# What rounding may do to a time, as a share of the step.
ROUNDING = 1e-9


def following(p: Plan, repeats: int) -> Plan:
    """The same captured call, planned for that many calls that follow each other."""
    return Plan(p.target, replace(p._options, repeats=repeats), Tilings(Solver(p.problem, repeats))) if repeats > 1 else p


def captured(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> Plan | None:
    """With everything resident and a link so slow that small models wait for it; None for what computes nothing."""
    try:
        return plan(module, "1GB", inputs=args, kwargs=kwargs, device=device, machine=MACHINE, allow=("offload",))
    except PlannerError as error:
        if "computes nothing" not in str(error):
            raise
        return None


@cache
def of_zoo(name: str, device: str) -> tuple[Plan, tuple[Any, ...], dict[str, Any], Any]:
    """Captured once for all budgets; with its call and what eager gives."""
    module, args, kwargs = ZOO[name]()
    with torch.no_grad():
        expected = module(*args, **kwargs)
    p = captured(module, args, kwargs, device)
    assert p is not None
    return p, args, kwargs, expected


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(tmp_path))


def assert_same_events(got: Timeline | None, said: Timeline) -> None:
    """Both to rounding; what happens at one time may come in any order."""
    assert got is not None
    near = ROUNDING * max(said.step_seconds, 1e-12)
    assert got.step_seconds == pytest.approx(said.step_seconds, rel=ROUNDING)
    assert [(c.bundle, c.nbytes) for c in got.copies] == [(c.bundle, c.nbytes) for c in said.copies]
    assert_near([t for c in got.copies for t in (c.issued, c.start, c.stop)],
                [t for c in said.copies for t in (c.issued, c.start, c.stop)], near)  # fmt: skip
    assert [e.bundle for e in got.evictions] == [e.bundle for e in said.evictions]
    assert_near([e.at for e in got.evictions], [e.at for e in said.evictions], near)
    waited, wanted = ([s for s in t.stalls if s.stop - s.start > near] for t in (got, said))
    assert [(s.bundle, s.cause) for s in waited] == [(s.bundle, s.cause) for s in wanted]
    assert_near([t for s in waited for t in (s.start, s.stop)], [t for s in wanted for t in (s.start, s.stop)], near)
    at = {("copy", c.bundle): c.start for c in said.copies} | {("arrival", c.bundle): c.stop for c in said.copies}
    at |= {("evict", e.bundle): e.at for e in said.evictions}
    assert sorted(got.order()) == sorted(said.order())
    assert all(at[one] <= at[other] + near for one, other in pairwise(got.order()))


def assert_near(got: list[float], said: list[float], near: float) -> None:
    assert len(got) == len(said)
    assert all(abs(a - b) <= near for a, b in zip(got, said, strict=True))


def by_program(p: Plan) -> list[tuple[str, int]]:
    """Prefetches and evictions of every call, in the order in which the simulated program comes to them."""
    return [(step.kind.name, step.bundle) for step in p.engines.steps if step.kind is not Kind.ONLOAD]


def as_issued(got: Timeline) -> list[tuple[str, int]]:
    """The same as the caller's thread came to them: its clock never stands still between two."""
    moments = [(c.issued, Kind.PREFETCH.name, c.bundle) for c in got.copies]
    moments += [(e.at, Kind.EVICT.name, e.bundle) for e in got.evictions]
    return [(kind, bundle) for _, kind, bundle in sorted(moments)]


def assert_program_order(p: Plan, got: Timeline | None) -> None:
    """On a real clock: the order of the program, and copies that began first in, first out."""
    assert got is not None
    assert as_issued(got) == by_program(p)
    # What is for the next call may not have begun when this one was over.
    begun = [copy.start for copy in got.copies if copy.start < got.step_seconds]
    assert begun == sorted(begun)
    assert all(copy.issued <= copy.start <= copy.stop for copy in got.copies)


def carried_bytes(p: Plan) -> int:
    return sum(slot.nbytes for bundle in p.layout.bundles if bundle.carried for slot in bundle.slots)


def assert_copied(p: Plan, call: int, copied_bytes: int) -> None:
    """What comes over the seam is copied once; only the first call has to fetch it itself.

    Neighbours come in one copy with the padding between them where they lie alike at home.
    """
    padding = sum(bundle.nbytes - sum(slot.nbytes for slot in bundle.slots) for bundle in p.layout.bundles)
    least = p.layout.streamed_bytes + (carried_bytes(p) if call == 0 else 0)
    assert least <= copied_bytes <= least + (2 if call == 0 else 1) * padding


def assert_runs_as_simulated(p: Plan, run: Callable[[nn.Module], Any], eager: Callable[[], Any]) -> None:
    """On `accounting`: call by call until the state that is predicted, then event for event."""
    m = p.build()
    for call in range(p.repeats):
        assert same(run(m), eager())
        assert_copied(p, call, m.report().copied_bytes)
        assert m.report().peak_bytes == p.peak_bytes <= p.budget_bytes
    assert_same_events(m.report().timeline, p.timeline)
    assert m.report().step_seconds == pytest.approx(p.step_seconds, rel=ROUNDING)
    p.restore()


def assert_runs_in_order(p: Plan, run: Callable[[nn.Module], Any], eager: Callable[[], Any]) -> None:
    """On `cpu`: copies and evictions in the order of the program, whatever the threads do."""
    m = p.build()
    for call in range(3):
        assert same(run(m), eager())
        assert_copied(p, call, m.report().copied_bytes)
        assert m.report().peak_bytes <= p.peak_bytes <= p.budget_bytes
        assert_program_order(p, m.report().timeline)
    p.restore()


CHECKS = {"accounting": assert_runs_as_simulated, "cpu": assert_runs_in_order}


def check_case(case: Case, share: float, repeats: int, device: str) -> None:
    eager, module = case.fresh(), case.fresh()
    p = captured(module, case.args, case.kwargs, device)
    if p is None:
        return
    p = following(p, repeats)
    p = p.replan(budget_at(p, share))

    def expected() -> Any:
        with torch.no_grad():
            return eager(*copy.deepcopy(case.args), **copy.deepcopy(case.kwargs))

    CHECKS[device](p, lambda m: m(*case.args, **case.kwargs), expected)


@given(cases(), SHARES, st.sampled_from(REPEATS))
def test_random_modules(case: Case, share: float, repeats: int) -> None:
    check_case(case, share, repeats, "accounting")


@settings(max_examples=max(1, settings().max_examples // 2))
@given(cases(), SHARES, st.sampled_from(REPEATS))
def test_random_modules_on_cpu(case: Case, share: float, repeats: int) -> None:
    check_case(case, share, repeats, "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("name", sorted(ZOO))
def test_models_of_the_zoo(name: str, repeats: int, device: str) -> None:
    first, args, kwargs, expected = of_zoo(name, device)
    p = following(first, repeats)
    for share in (1.0, 0.5, 0.0):
        CHECKS[device](p.replan(budget_at(p, share)), lambda m: m(*args, **kwargs), lambda: expected)


def test_the_zoo_waits_and_carries() -> None:
    """What the tests above rely on."""
    waits = carries = 0
    for name in sorted(ZOO):
        p = following(of_zoo(name, "accounting")[0], 3)
        half = p.replan(budget_at(p, 0.5))
        waits += bool(half.timeline.stalls)
        carries += carried_bytes(half) > 0
    assert min(waits, carries) >= 5


class Gathered(nn.Module):
    """Linear layers around a table: ids that it does not have raise in the middle of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4)))
        self.table = nn.Embedding(16, 48)
        self.after = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4)))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.after(torch.tanh(self.before(x)) + self.table(ids))


IDS, WRONG = torch.tensor([0, 15, 3]), torch.tensor([0, 99, 3])


STAGING: list[StagingMode] = ["allocator", "arena"]


@cache
def seam_plan(device: str, staging: StagingMode) -> Plan:
    """All is streamed, visit by visit, and what the first layers read is prefetched by the call before. Captured once."""
    p = captured(Gathered().eval(), (torch.randn(3, 48), IDS), {}, device)
    assert p is not None
    p = following(p, 3)
    p = p.replan(p.unplanned_bytes)
    spans = make_bundles(p.problem, 0, 0)
    room = np.full(len(p.problem.names), 3 * max(span.nbytes for span in spans), dtype=np.int64)
    placements = placed(spans, room, seam=True)
    assert placements is not None
    names = p.problem.names
    streams = (Stream(x.span.weights, names[x.prefetch], names[x.span.first], names[x.span.last]) for x in placements)
    p = with_decisions(p, Decisions(tuple(streams), staging))
    assert sum(bundle.carried for bundle in p.layout.bundles) >= 2
    return p


def wanted(p: Plan, *inputs: Any) -> Any:
    """What eager gives for the weights as they are."""
    with torch.no_grad():
        return p.target(*inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("staging", STAGING)
@pytest.mark.parametrize("calls", [0, 3])
class TestSeamAfter:
    """Outputs stay right, and nothing of the call before that is no longer true is used."""

    @pytest.fixture
    def x(self) -> Tensor:
        return torch.randn(3, 48)

    @pytest.fixture
    def p(self, device: str, staging: StagingMode) -> Iterator[Plan]:
        p = seam_plan(device, staging)
        yield p
        p.restore()

    @pytest.fixture
    def m(self, p: Plan, x: Tensor, calls: int) -> nn.Module:
        """Built, and called so often."""
        expected, m = wanted(p, x, IDS), p.build()
        for _ in range(calls):
            assert torch.equal(m(x, IDS), expected)
        return m

    def good(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        """Calls as if nothing had been; the first one copies all that it reads."""
        expected = wanted(p, x, IDS)
        for call in range(3):
            assert torch.equal(m(x, IDS), expected)
            assert_copied(p, call, m.report().copied_bytes)
            assert m.report().peak_bytes <= p.peak_bytes
        if p.device == "accounting":
            assert_same_events(m.report().timeline, p.timeline)

    def test_an_operator_that_raised(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        for _ in range(2):
            with pytest.raises(IndexError):
                m(x, WRONG)
        self.good(p, m, x)

    def test_the_call_that_follows_is_like_the_first(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        with pytest.raises(IndexError):
            m(x, WRONG)
        m(x, IDS)
        if p.device == "accounting":
            assert m.report().timeline == simulate(p.engines, p.machine, calls=1)

    @pytest.mark.parametrize("step", ["wait", "copy", "evict", "mark"])
    @pytest.mark.parametrize("after", [0, 2, 5])
    def test_a_device_that_raised(
        self, p: Plan, m: nn.Module, x: Tensor, step: str, after: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device = m._runner.device
        real, left = getattr(device, step), [after]

        def once(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise RuntimeError("the device raised")
            return real(*args, **kwargs)

        monkeypatch.setattr(device, step, once)
        with pytest.raises(RuntimeError, match="the device raised"):
            m(x, IDS)
        self.good(p, m, x)

    def test_weights_that_were_written(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        for layer in (0, 3):
            with torch.no_grad():
                for part in (p.target.before, p.target.after):
                    part[layer].weight.add_(0.5)
                    part[layer].bias.copy_(torch.randn(48))
            self.good(p, m, x)

    def test_weights_that_were_written_before_a_call_that_raised(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            p.target.before[0].weight.mul_(2)
        with pytest.raises(IndexError):
            m(x, WRONG)
        with torch.no_grad():
            p.target.before[0].weight.mul_(2)
        self.good(p, m, x)

    def test_another_signature(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        other, ids = torch.randn(7, 48), torch.arange(7)
        for rows, which in ((other, ids), (x, IDS), (other, ids), (x, IDS), (x, IDS), (other, ids)):
            assert torch.equal(m(rows, which), wanted(p, rows, which))
        self.good(p, m, x)

    def test_another_signature_and_weights_that_were_written(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        other, ids = torch.randn(7, 48), torch.arange(7)
        for _ in range(2):
            m(other, ids)
            with torch.no_grad():
                p.target.after[0].weight.add_(0.25)
            assert torch.equal(m(x, IDS), wanted(p, x, IDS))
            assert torch.equal(m(other, ids), wanted(p, other, ids))

    def test_closing(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        values = {name: value.clone() for name, value in p.target.state_dict().items()}
        m.close()
        assert all(torch.equal(value, values[name]) for name, value in p.target.state_dict().items())
        p.restore()
        self.good(p, p.build(), x)

    def test_other_weights(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        other = Gathered().eval()
        with torch.no_grad():
            expected = other(x, IDS)
        p.restore()
        built = p.build(weights=other.state_dict())
        for _ in range(3):
            assert torch.equal(built(x, IDS), expected)


def settle_all(executor: Any) -> None:
    """Until no reader thread has anything to do."""
    for arrival in executor.device._readers._arrivals:
        arrival.settle()


@pytest.mark.parametrize("staging", STAGING)
class TestReadsThatFail:
    """On `cpu`: a copy for the next call that could not be made."""

    @pytest.fixture
    def x(self) -> Tensor:
        return torch.randn(3, 48)

    @pytest.fixture
    def p(self, staging: StagingMode) -> Iterator[Plan]:
        p = seam_plan("cpu", staging)
        yield p
        p.restore()

    @pytest.fixture
    def m(self, p: Plan, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
        """Called; the copies for the next call fail."""
        m = p.build()
        m(x, IDS)
        executor, transfer = m._runner.executor, readers._transfer
        real, gone = executor.prefetch, threading.Event()

        def fail_for_the_next_call(target: Tensor, source: Any) -> None:
            if gone.is_set():
                raise PlannerError("the drive is gone")
            transfer(target, source)

        def prefetch(index: int) -> None:
            settle_all(executor)
            (gone.set if p.layout.bundles[index].carried else gone.clear)()
            real(index)

        with monkeypatch.context() as patched:
            patched.setattr(readers, "_transfer", fail_for_the_next_call)
            patched.setattr(executor, "prefetch", prefetch)
            m(x, IDS)
            settle_all(executor)
        return m

    def test_it_is_raised_where_it_is_waited_for(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        with pytest.raises(PlannerError, match="the drive is gone"):
            m(x, IDS)
        for _ in range(2):
            assert torch.equal(m(x, IDS), wanted(p, x, IDS))

    def test_closing(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        expected = wanted(p, x, IDS)
        m.close()  # nobody waits for it
        assert torch.equal(p.target(x, IDS), expected)
        assert not list(Path(os.environ["VRAMPLAN_SCRATCH"]).iterdir())

    def test_weights_that_were_written(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            for weight in p.target.parameters():
                weight.mul_(1.5)
        for _ in range(2):
            assert torch.equal(m(x, IDS), wanted(p, x, IDS))

    def test_another_signature(self, p: Plan, m: nn.Module, x: Tensor) -> None:
        other, ids = torch.randn(7, 48), torch.arange(7)
        assert torch.equal(m(other, ids), wanted(p, other, ids))
        assert torch.equal(m(x, IDS), wanted(p, x, IDS))

    def test_a_child_process_copies_itself(self, p: Plan, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        expected, m, go, transfer = wanted(p, x, IDS), p.build(), threading.Event(), readers._transfer
        assert torch.equal(m(x, IDS), expected)

        def held(target: Tensor, source: Any) -> None:
            go.wait(30)
            transfer(target, source)

        executor = m._runner.executor
        real = executor.prefetch

        def prefetch(index: int) -> None:
            if p.layout.bundles[index].carried and readers._transfer is transfer:  # from the first of them on
                settle_all(executor)
                monkeypatch.setattr(readers, "_transfer", held)
            real(index)

        monkeypatch.setattr(executor, "prefetch", prefetch)
        m(x, IDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads: that is the point
            child = os.fork()
        if child == 0:
            signal.alarm(20)  # it would hang for good
            go.set()
            os._exit(0 if all(torch.equal(m(x, IDS), expected) for _ in range(2)) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        go.set()
        assert torch.equal(m(x, IDS), expected)


@pytest.mark.parametrize("staging", STAGING)
def test_a_program_that_raised_leaves_no_copy_under_way(staging: StagingMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the call goes on: the Python of a module that runs in parts may catch what a part raises."""
    p, x = seam_plan("cpu", staging), torch.randn(3, 48)
    executor, transfer = p.build()._runner.executor, readers._transfer

    def slow(target: Tensor, source: Any) -> None:
        time.sleep(0.02)
        transfer(target, source)

    monkeypatch.setattr(readers, "_transfer", slow)
    with torch.no_grad(), executor.device.call([x], executor.arenas):
        with pytest.raises(IndexError):
            executor.run([x, WRONG])
        assert not any(arrival._waiting for arrival in executor.device._readers._arrivals)
        assert torch.equal(executor.run([x, IDS])[0], wanted(p, x, IDS))
    p.restore()
