"""The laws of plans in parts, over random modules whose own Python must run: it counts its calls in an attribute."""

import copy
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import InfeasibleBudget, Plan, plan
from planner.parted import PartedPlan
from tests.properties.test_plans import SHARES, budget_at, same
from tests.strategies.modules import Case, GeneratedModule, cases

# Each example captures every layer apart.
FEWER = settings(max_examples=max(10, settings.default.max_examples // 4))  # type: ignore[union-attr]


class Counting(GeneratedModule):
    """The same lines between two more, which no program would repeat."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().forward(*args, **kwargs)


def counting(case: Case) -> GeneratedModule:
    module = case.fresh()
    module.__class__ = Counting
    return module


def parted(case: Case, module: GeneratedModule, device: str = "accounting") -> PartedPlan:
    made = plan(module, "1GB", inputs=case.args, kwargs=case.kwargs, device=device)
    assert isinstance(made, PartedPlan)
    return made


@FEWER
@given(cases(), SHARES, st.sampled_from(["accounting", "cpu"]))
def test_runs_as_eager_within_the_budget(case: Case, share: float, device: str) -> None:
    eager, module = counting(case), counting(case)
    p = parted(case, module, device)
    p = p.replan(budget_at(p, share))
    m = p.build()
    for call in (1, 2, 3):
        (args, kwargs), (own_args, own_kwargs) = (copy.deepcopy((case.args, case.kwargs)) for _ in range(2))
        with torch.no_grad():
            expected = eager(*args, **kwargs)
        assert same(m(*own_args, **own_kwargs), expected)
        assert module.calls == call
        assert m.report().peak_bytes <= p.peak_bytes <= p.budget_bytes
    assert same(dict(m.named_buffers()), dict(eager.named_buffers()))
    assert p.restore() is module
    assert same(dict(module.state_dict()), dict(eager.state_dict()))


@FEWER
@given(cases())
def test_the_minimum_is_feasible_and_one_byte_less_is_not(case: Case) -> None:
    p = parted(case, counting(case))
    assert p.replan(p.minimum_bytes).peak_bytes <= p.minimum_bytes
    with pytest.raises(InfeasibleBudget):
        p.replan(p.minimum_bytes - 1)


@FEWER
@given(cases(), st.lists(st.floats(0, 1.2), min_size=2, max_size=5))
def test_a_larger_budget_is_never_slower(case: Case, shares: list[float]) -> None:
    p = parted(case, counting(case))
    seconds = [p.replan(budget_at(p, share)).step_seconds for share in sorted(shares)]
    assert all(a >= b for a, b in pairwise(seconds))


@FEWER
@given(cases(), SHARES)
def test_a_saved_plan_loads_equal(case: Case, share: float) -> None:
    module = counting(case)
    p = parted(case, module)
    p = p.replan(budget_at(p, share))
    with tempfile.TemporaryDirectory() as folder:
        p.save(Path(folder) / "p.json")
        assert Plan.load(Path(folder) / "p.json", module, inputs=case.args, kwargs=case.kwargs) == p
