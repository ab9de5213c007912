"""A dynamic plan of a random module, at every size of one axis: as eager, as predicted, with one program."""

import copy
from typing import Any

import torch
from hypothesis import given, settings
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from planner import Plan, PlannerError, plan
from tests.properties.test_plans import same
from tests.strategies.modules import Case, cases


def planned(case: Case, module: nn.Module) -> Plan | None:
    """A plan with the first axis of the first input dynamic; None where that is refused, as it is where a module fixes it."""
    x = case.args[0]
    if not isinstance(x, torch.Tensor) or x.ndim == 0 or len(x) < 2:
        return None
    try:
        p = plan(module, "1GB", inputs=case.args, kwargs=case.kwargs, dynamic={0: {0: "n"}}, device="accounting")
    except PlannerError as error:
        known = ("a constant", "memory of their own", "computes nothing", "depends on data", "dense inputs")
        if not any(text in str(error) for text in known):
            raise
        return None
    return p.replan((p.minimum_bytes + p.unplanned_bytes) // 2)


def shortened(p: Plan, case: Case, n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dynamic = p._options.dynamic
    assert dynamic is not None
    flat, spec = tree_flatten(dynamic.bound(p._target, "forward", case.args, case.kwargs))
    leaves = [leaf[:n].clone() if axes else leaf for leaf, axes in zip(flat, dynamic.leaves, strict=True)]
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs


@settings(max_examples=40)
@given(cases())
def test_every_size_as_eager_and_as_predicted(case: Case) -> None:
    eager, module = case.fresh(), case.fresh()
    p = planned(case, module)
    if p is None:
        return
    assert p.problem.in_symbols is not None
    dims = p.problem.in_symbols.dims
    m = p.build()
    for n in (n for n in range(dims.largest["n"], 1, -1) if dims.holds({"n": n})):
        args, kwargs = shortened(p, case, n)
        with torch.no_grad():
            expected = eager(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        assert same(m(*args, **kwargs), expected)
        assert m.report().peak_bytes == p.peak_bytes_at(n=n) == p.peak_bytes_expr.subs(p.symbols["n"], n) <= p.budget_bytes
    assert len(m._runner.programs) == 1
    p.restore()
