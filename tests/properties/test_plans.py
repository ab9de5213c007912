"""The laws that every plan obeys, over random modules and random budgets."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

from planner import InfeasibleBudget, Plan, PlannerError, plan
from tests.properties.oracle import least_bytes
from tests.strategies.modules import Case, cases

SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])


def planned(case: Case, module: nn.Module, device: str = "accounting") -> Plan | None:
    """A plan with all memory there is; None for a program that computes nothing, which is refused."""
    try:
        return plan(module, "1GB", inputs=case.args, kwargs=case.kwargs, device=device, allow=("offload",))
    except PlannerError as error:
        if "computes nothing" not in str(error):
            raise
        return None


def budget_at(p: Plan, share: float) -> int:
    return p.minimum_bytes + int(share * (p.unplanned_bytes - p.minimum_bytes))


def same(a: Any, b: Any) -> bool:
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )


@given(cases(), SHARES)
def test_runs_as_eager_within_the_budget_and_as_predicted(case: Case, share: float) -> None:
    eager, module = case.fresh(), case.fresh()
    p = planned(case, module)
    if p is None:
        return
    p = p.replan(budget_at(p, share))
    m = p.build()
    for _ in range(3):
        with torch.no_grad():
            expected = eager(*copy.deepcopy(case.args), **copy.deepcopy(case.kwargs))
        assert same(m(*case.args, **case.kwargs), expected)
        assert m.report().peak_bytes == p.peak_bytes <= p.budget_bytes
    assert same(dict(m.named_buffers()), dict(eager.named_buffers()))
    assert p.restore() is module
    assert same(dict(module.state_dict()), dict(eager.state_dict()))


@given(cases())
def test_the_minimum_is_feasible_one_byte_less_is_not_and_it_is_least(case: Case) -> None:
    module = case.fresh()
    p = planned(case, module)
    if p is None:
        return
    assert p.replan(p.minimum_bytes).peak_bytes <= p.minimum_bytes
    with pytest.raises(InfeasibleBudget) as caught:
        p.replan(p.minimum_bytes - 1)
    assert caught.value.minimum_bytes == p.minimum_bytes
    assert p.minimum_bytes <= 1.02 * least_bytes(case.fresh(), p.program, case.args, case.kwargs)


@given(cases(), st.lists(SHARES, min_size=2, max_size=4))
def test_a_larger_budget_is_never_slower(case: Case, shares: list[float]) -> None:
    p = planned(case, case.fresh())
    if p is None:
        return
    seconds = [p.replan(budget_at(p, share)).step_seconds for share in sorted(shares)]
    assert seconds == sorted(seconds, reverse=True)


@given(cases(), SHARES)
def test_a_saved_plan_loads_equal(case: Case, share: float) -> None:
    module = case.fresh()
    p = planned(case, module)
    if p is None:
        return
    p = p.replan(budget_at(p, share))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.plan.json")
        p.save(path)
        loaded = Plan.load(path, case.fresh())
    assert loaded == p
    assert loaded.code == p.code
    assert str(loaded) == str(p)
