"""Plans of programs whose large weights come in parts or stay on the host: hand-written decisions, the planner's machinery."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from passes.base import Pass, run_passes
from passes.big_weights import host_lookups, sliceable
from passes.host_lookup import HostLookup
from passes.program import Program
from passes.slice_weights import SliceWeights, WeightSlices
from planner.budget import Budget
from planner.machine import Machine
from planner.options import Options
from planner.plan import Plan
from planner.prepare import tilings_of
from tests.passes.programs import canonical


def cut_all(program: Program, count: int, *, above: int = 0) -> Program:
    """All tables of more than `above` bytes looked up, everything else of that size in `count` parts, fewer for few rows."""
    tables = tuple(key for key in host_lookups(program) if program.weights[key].nbytes > above)
    program = run_passes(program, (HostLookup(tables),))
    rows = {key: n for key, n in sliceable(program).items() if program.weights[key].nbytes > above}
    return run_passes(program, (SliceWeights(tuple(WeightSlices(key, min(count, n)) for key, n in rows.items())),))


def plan_of(
    program: Program,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: str = "accounting",
    **allowed: bool,
) -> Plan:
    """The roomy plan of a program that was made from the module's call."""
    options = Options(Budget.parse("1GB", device), Machine.preset("cpu").on(device), device, "forward", args, kwargs, **allowed)
    return Plan(module, options, tilings_of(program, options))


def plan_with(passes: tuple[Pass, ...], module: nn.Module, *args: Any, device: str = "accounting", **kwargs: Any) -> Plan:
    """The roomy plan of a module's call after these passes."""
    return plan_of(run_passes(canonical(module, *args, **kwargs), passes), module, args, kwargs, device)


def plan_cut(module: nn.Module, *args: Any, count: int = 3, above: int = 0, device: str = "accounting", **kwargs: Any) -> Plan:
    """The roomy plan of a module's call with `cut_all`."""
    return plan_of(cut_all(canonical(module, *args, **kwargs), count, above=above), module, args, kwargs, device)


def check_runs(p: Plan, expected: Any, *args: Any, close: float | None = None, **kwargs: Any) -> None:
    """At its least memory and with all there is: the outputs (`close`: within that share of the largest), and the peak."""
    for budget in (p.minimum_bytes, p.unplanned_bytes):
        p = p.replan(budget)
        m = p.build()
        for _ in range(2):
            assert_same(m(*args, **kwargs), expected, close)
            assert m.report().peak_bytes == p.peak_bytes <= budget
        p.restore()


def assert_same(given: Any, expected: Any, close: float | None = None) -> None:
    """Equal leaves, of equal types; `close` is a share of the largest element."""
    left, right = tree_leaves(given), tree_leaves(expected)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if not isinstance(b, torch.Tensor):
            assert a == b
            continue
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        if close is None or not (b.dtype.is_floating_point or b.dtype.is_complex):
            assert torch.equal(a, b)
        else:
            largest = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=close * max(largest, 1.0), equal_nan=True)
