"""`Plan`: its numbers agree with each other, and it prints the same every time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from planner import BudgetError, InfeasibleBudget, Plan, plan
from tests.planner.toys import Counter, Mlp, planned, x
from tests.zoo import ZOO


def tiny(device: str = "accounting") -> Plan:
    return plan(Mlp(hidden=1024).eval(), "1GB", inputs=(x(),), device=device, machine="rtx-4090")


@pytest.mark.parametrize(
    ("name", "device"), [*((name, "accounting") for name in sorted(ZOO)), ("vae_decoder", "cuda"), ("bert", "cuda")]
)
def test_numbers(name: str, device: str) -> None:
    module, args, kwargs = ZOO[name]()
    made = plan(module, "1GB", inputs=args, kwargs=kwargs, device=device, machine="rtx-4090")
    middle = made.replan((made.minimum_bytes + made.unplanned_bytes) // 2)
    least = made.replan(made.minimum_bytes)
    for p in (made, middle, least):
        assert p.minimum_bytes <= p.reserved_bytes <= p.budget_bytes
        assert p.peak_bytes <= p.reserved_bytes
        assert sum(p.peak_parts.values()) == p.peak_bytes
        assert all(n >= 0 for n in p.peak_parts.values())
        assert 0 < p.bound_seconds <= p.step_seconds * (1 + 1e-9)
        assert (p.minimum_bytes, p.unplanned_bytes) == (made.minimum_bytes, made.unplanned_bytes)
        assert max(map(len, str(p).splitlines())) <= 100
        compile(p.code, "<plan>", "exec")
    assert made.step_seconds <= middle.step_seconds <= least.step_seconds
    assert least.reserved_bytes == made.minimum_bytes
    assert made.reserved_bytes == made.unplanned_bytes


def test_replan_is_plan() -> None:
    module = Mlp(hidden=64).eval()
    made = planned(module, x())
    for budget in (made.minimum_bytes, made.minimum_bytes + 500, "10KB"):
        assert made.replan(budget) == planned(module, x(), budget=budget)
    with pytest.raises(InfeasibleBudget):
        made.replan(made.minimum_bytes - 1)
    with pytest.raises(BudgetError):
        made.replan("6 gigs")


def test_equality() -> None:
    one, two = tiny(), tiny()
    assert one == two
    assert one.code == two.code
    assert str(one) == str(two)
    assert one != one.replan(one.minimum_bytes)
    assert one != tiny("cuda")
    assert one != 3
    with pytest.raises(TypeError):
        hash(one)


def test_keep_and_allow() -> None:
    module = Mlp(hidden=64).eval()
    free = planned(module, x())
    kept = planned(module, x(), keep={"up.*": {"resident": True}})
    pinned = planned(module, x(), allow=())
    assert free.minimum_bytes < kept.minimum_bytes < pinned.minimum_bytes == pinned.unplanned_bytes
    streamed = {s.weight for b in kept.replan(kept.minimum_bytes).layout.bundles for s in b.slots}
    assert streamed
    assert not any("up" in name for name in streamed)
    assert planned(module, x(), keep={"up.*": {"resident": False}}) == free


def test_state_is_always_resident() -> None:
    made = planned(Counter(), x(), least=True)
    assert [s.weight for s in made.layout.state] == ["w_count"]
    assert "w_count" not in {s.weight for b in made.layout.bundles for s in b.slots}


def test_repr() -> None:
    assert repr(tiny()) == "<Plan of Mlp.forward: 82.3 KB of 1.00 GB>"


@pytest.mark.parametrize("what", ["resident", "least"])
@pytest.mark.parametrize("device", ["accounting", "cuda"])
def test_goldens(golden: Callable[[str, str], None], what: str, device: str) -> None:
    made = tiny(device)
    if what == "least":
        made = made.replan(made.minimum_bytes)
    text = str(made)
    assert max(map(len, text.splitlines())) <= 100
    golden(f"plan_{device}_{what}", text)
    golden(f"code_{device}_{what}", made.code)


def test_code_is_what_runs() -> None:
    made = tiny()
    made = made.replan(made.minimum_bytes)
    built = made.build()
    assert built._runner.executor.program is made.executable
    assert made.executable.source == made.code
    assert torch.equal(built(x()), made.restore()(x()))
    assert "rt.prefetch(0)" in made.code
    assert "del " in made.code


@pytest.mark.parametrize("device", ["cpu", "accounting"])
def test_building_where_ram_is_the_budget_lets_go_of_what_was_looked_at(device: str) -> None:
    """What was tried and not chosen is memory that the budget does not know; decisions and facts are as before."""
    module, args, kwargs = ZOO["bert"]()
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, device=device)
    p = p.replan((p.minimum_bytes + p.unplanned_bytes) // 2)
    facts, decided = str(p), p.decisions
    kept = p.solver, p.tilings.base, p.tilings.minimum
    looked_at = [weakref.ref(solver.problem) for solver in p.tilings._solvers.values() if solver not in kept]
    assert looked_at
    p.build()
    gc.collect()
    assert all((problem() is None) == (device == "cpu") for problem in looked_at)
    p.restore()
    assert (str(p), p.decisions) == (facts, decided)
    again = p.replan(p.budget_bytes)
    assert (again.decisions, again.minimum_bytes) == (decided, p.minimum_bytes)
