"""The checker on casts: programs with them pass, in slices too, and every way to join the wrong things is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn

from passes.cast_weights import Cast
from passes.check_plan import check_plan
from passes.program import Program
from passes.slice_weights import WeightSlices
from planner import Plan, plan
from planner.solve.decisions import Decisions, Tiling
from runtime import ops
from runtime.errors import CheckError
from tests.passes.mutations import Edit
from tests.passes.tiled import AMPLE

UPCAST = torch.ops.vramplan.upcast.default
CASTS = (Cast("w__1_weight", "int8", 0), Cast("w__2_weight", "int8", 0))
TILINGS = {
    "whole": Tiling(casts=CASTS),
    "in slices": Tiling(casts=CASTS, slices=(WeightSlices("w__1_weight", 3),)),
    "one scale": Tiling(casts=tuple(replace(cast, dim=None) for cast in CASTS)),
}


@cache
def base() -> tuple[Plan, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 4)).double().eval()
    x = torch.randn(5, 8, dtype=torch.float64)
    return plan(module, "1MB", inputs=(x,), device="accounting"), module, x


@cache
def made(name: str) -> Plan:
    p, _, _ = base()
    return Plan(p.target, p.options, p._tilings, Decisions(tiling=TILINGS[name]))


@pytest.mark.parametrize("name", TILINGS)
def test_programs_with_casts_pass_and_run(name: str) -> None:
    _, module, x = base()
    p = made(name)
    check_plan(p.emitted, p.peak_bytes)
    expected = module(x).detach()
    found = p.build()(x)
    p.restore()
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.02


def test_slices_compute_what_the_whole_does() -> None:
    _, _, x = base()
    results = []
    for name in ("whole", "in slices"):
        results.append(made(name).build()(x))
        made(name).restore()
    assert float((results[0] - results[1]).abs().max()) < 1e-12


Broken = tuple[Program, str]


def join_the_scales_of_another(program: Program) -> Iterator[Callable[[], Broken]]:
    nodes = [node for node in program.ops() if node.target is UPCAST]
    for one, other in pairwise(nodes):
        edit = Edit(program)
        edit[one].args = (one.args[0] and edit[one.args[0]], edit[other.args[1]], one.args[2])  # type: ignore[index]
        yield lambda edit=edit: (edit.program, "not values and scales of one weight|does not take its arguments")


def join_them_the_other_way_round(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in (node for node in program.ops() if node.target is UPCAST):
        edit = Edit(program)
        values, scales, dtype = edit[node].args
        edit[node].args = (scales, values, dtype)
        yield lambda edit=edit: (edit.program, "not values and scales of one weight|does not take its arguments")


def read_the_stored_values(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in (node for node in program.ops() if node.target is UPCAST):
        edit = Edit(program)
        peek = edit.insert_before(node, torch.ops.aten.neg.default, edit[node].args[0])
        peek.append(edit.graph.call_function(ops.free, (peek,)))
        yield lambda edit=edit: (edit.program, "which is stored in another type")


def scale_by_another_dimension(program: Program) -> Iterator[Callable[[], Broken]]:
    for key, weight in program.weights.items():
        if weight.stored is not None and weight.stored.part == "scales" and weight.stored.dim == 0:
            stored = replace(weight.stored, dim=1)
            weights = {**program.weights, key: replace(weight, stored=stored)}
            yield lambda weights=weights: (replace(program, weights=weights), "not values and scales of one weight")


def take_the_rows_of_another_part(program: Program) -> Iterator[Callable[[], Broken]]:
    parts = [(key, w) for key, w in program.weights.items() if w.stored is not None and w.rows and w.stored.part == "scales"]
    for (key, one), (_, other) in pairwise(parts):
        weights = {**program.weights, key: replace(one, rows=other.rows)}
        yield lambda weights=weights: (replace(program, weights=weights), "I3")


@pytest.mark.parametrize(
    "mutation",
    [
        join_the_scales_of_another,
        join_them_the_other_way_round,
        read_the_stored_values,
        scale_by_another_dimension,
        take_the_rows_of_another_part,
    ],
)
def test_a_broken_program_is_refused(mutation: Callable[[Program], Iterator[Callable[[], Broken]]]) -> None:
    places = [make for name in TILINGS for make in mutation(made(name).emitted)]
    assert places
    for make in places:
        broken, words = make()
        with pytest.raises(CheckError, match=words):
            check_plan(broken, AMPLE)
