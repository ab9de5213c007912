"""The laws of tiled plans, over random nets: the same function, in the bytes and seconds that were said, at any budget."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from planner import InfeasibleBudget, Plan, plan
from planner.budget import Budget
from planner.prepare import tilings_of
from runtime.devices.cpu import CpuDevice
from tests.passes.tiled import block, captured
from tests.strategies.nets import Case, nets

TOLERANCE = 1e-12
ROUNDING = 1e-9
SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
COUNTS = st.integers(2, 5)
DIMS = st.sampled_from([None, None, 0, 1, 2, -1])


def share_of(examples: int) -> settings:
    """So many of 60 examples of a profile: planning a net takes a second."""
    return settings(max_examples=max(3, settings().max_examples * examples // 60))


def planned(case: Case, module: nn.Module, device: str = "accounting", **options: Any) -> Plan:
    """Everything resident, nothing tiled."""
    return plan(module, "1GB", inputs=(case.input(),), device=device, **options)


def again(p: Plan, budget_bytes: int | None = None, **changes: Any) -> Plan:
    """The same captured call, planned with other options."""
    budget = Budget.parse(budget_bytes or p.budget_bytes, p.device)
    options = replace(p._options, budget=budget, **changes)
    return Plan(p.target, options, tilings_of(p.program, options))


def forced(p: Plan, count: int, dim: int | None, **changes: Any) -> Plan:
    rule = {"count": count} if dim is None else {"count": count, "dim": dim}
    return again(p, keep={"*": {"tile": rule}}, **changes)


def budget_at(p: Plan, share: float) -> int:
    return p.minimum_bytes + int(share * (p.unplanned_bytes - p.minimum_bytes))


def assert_alike(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """To 1e-12 of the largest value, in the same layout."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert float((one - other).abs().max()) <= TOLERANCE * max(1.0, float(other.abs().max()))


def assert_runs_as_predicted(p: Plan, case: Case, wanted: tuple[Tensor, ...]) -> None:
    """Twice: results, bytes, seconds."""
    m = p.build()
    for _ in range(2):
        with torch.no_grad():
            assert_alike(m(case.input()), wanted)
        assert m.report().peak_bytes == p.peak_bytes <= p.budget_bytes
        assert m.report().step_seconds == pytest.approx(p.step_seconds, rel=ROUNDING)
    p.restore()


def assert_loads_equal(p: Plan, case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.plan.json")
        p.save(path)
        loaded = Plan.load(path, case.module())
    assert loaded == p
    assert loaded.decisions == p.decisions


def wanted_of(case: Case) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return case.module()(case.input())


def note(p: Plan) -> None:
    event("tiled" if p.decisions.tiling.tiles else "whole")
    event("hosted" if p.layout.host_bytes else "on the device")


@share_of(10)
@given(nets(), COUNTS, DIMS)
def test_forced_tiles(case: Case, count: int, dim: int | None) -> None:
    p = forced(planned(case, case.module()), count, dim)
    note(p)
    assert_runs_as_predicted(p, case, wanted_of(case))
    assert_loads_equal(p, case)


@share_of(8)
@given(nets(8), SHARES, SHARES)
def test_budgets_below_the_untiled_minimum(case: Case, share: float, other: float) -> None:
    """What fits runs as said and loads equal, more memory is never slower, and less than the minimum is refused."""
    p = planned(case, case.module())
    assert p.minimum_bytes <= again(p, tile=False).minimum_bytes
    tight, loose = (p.replan(budget_at(p, each)) for each in sorted((share, other)))
    note(tight)
    assert loose.step_seconds <= tight.step_seconds * (1 + ROUNDING)
    assert_runs_as_predicted(tight, case, wanted_of(case))
    assert_loads_equal(tight, case)
    with pytest.raises(InfeasibleBudget) as caught:
        p.replan(p.minimum_bytes - 1)
    assert caught.value.minimum_bytes == p.minimum_bytes


@share_of(5)
@given(nets(6), SHARES, COUNTS, st.booleans())
def test_on_cpu(case: Case, share: float, count: int, force: bool) -> None:
    """The budget is RAM: nothing lives on the host, and the allocator takes no more than was said."""
    p = planned(case, case.module(), "cpu")
    p = forced(p, count, None) if force else p.replan(budget_at(p, share))
    note(p)
    assert not p.layout.host_bytes
    m, wanted = p.build(), wanted_of(case)
    device = m._runner.device
    assert isinstance(device, CpuDevice)
    device.measure_every_call = True
    for _ in range(2):
        with torch.no_grad():
            assert_alike(m(case.input()), wanted)
        assert m.report().peak_bytes <= p.peak_bytes <= p.budget_bytes
    p.restore()


@share_of(6)
@given(nets(8), SHARES, COUNTS, st.booleans())
def test_for_a_gpu_that_is_elsewhere(case: Case, share: float, count: int, force: bool) -> None:
    """Planned from shapes alone, and proved."""
    x = torch.empty(case.shape, dtype=torch.float64, device="meta")
    p = plan(case.module().to("meta"), "1GB", inputs=(x,), device="cuda", machine="rtx-3060")
    p = forced(p, count, None) if force else p.replan(budget_at(p, share))
    note(p)
    assert p.peak_bytes <= p.reserved_bytes <= p.budget_bytes
    assert p.proof.peak_bytes == p.peak_bytes


def test_little_memory_makes_values_live_on_the_host() -> None:
    p = captured()
    module, x = block()
    with torch.no_grad():
        wanted = module(x)
    seen = []
    for share in (1.0, 0.6, 0.3, 0.0):
        q = p.replan(budget_at(p, share))
        m = q.build()
        with torch.no_grad():
            assert_alike((m(x),), (wanted,))
        assert m.report().peak_bytes == q.peak_bytes <= q.budget_bytes
        assert m.report().step_seconds == pytest.approx(q.step_seconds, rel=ROUNDING)
        seen.append((bool(q.decisions.tiling.tiles), bool(q.layout.host_bytes)))
        q.restore()
    assert seen[0] == (False, False)
    assert seen[-1] == (True, True)
