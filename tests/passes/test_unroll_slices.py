"""`UnrollSlices`: what runs once for every slice, that it gives the whole, what is refused, and that a missing part is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from passes.check_plan import check_plan
from passes.functionalise import Functionalise
from passes.gather_writes import GatherWrites
from passes.program import Program
from passes.regions import Tile
from passes.tile_rules import Untileable
from passes.unroll_slices import UnrollSlices
from planner import Plan, plan
from planner.solve.decisions import Decisions, Tiling
from runtime.errors import CheckError, PlanFileError
from tests.passes.mutations import Edit
from tests.passes.programs import Function, canonical, nodes_calling, text
from tests.passes.tiled import assert_alike, block, interpreted, loops
from tests.properties.test_tiling import assert_loads_equal, assert_runs_as_predicted, planned, share_of, wanted_of
from tests.strategies.nets import Case, nets

aten = torch.ops.aten


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def whole(program: Program, count: int) -> Tile:
    """All operators, along the first dimension of the first input."""
    ops = list(program.ops())
    return Tile(ops[0].name, ops[-1].name, program.inputs[0], 0, count)


def unrolled(module: nn.Module, count: int, *inputs: Tensor) -> Program:
    program = Functionalise().apply(GatherWrites().apply(canonical(module, *inputs)))
    return UnrollSlices((whole(program, count),)).apply(program)


def assert_same(module: nn.Module, count: int, *inputs: Tensor) -> Program:
    """What the program gives operator by operator is what the module gives."""
    program = unrolled(module, count, *inputs)
    with torch.no_grad():
        given = module(*inputs)
        assert_alike(interpreted(program, module, *inputs), given if isinstance(given, tuple) else [given])
    return program


def test_in_text() -> None:
    module, _ = block()
    found = text(unrolled(module, 2, normal(2, 2, 6, 4))).splitlines()
    assert found[5:] == [
        "weight w_b_bias: f64[2]",
        "input arg_0: f64[2, 2, 6, 4]",
        "add_slices = empty_strided([2, 2, 6, 4], [48, 24, 4, 1], dtype=torch.float64, device=cpu)",
        "add = alias(add_slices)",
        *(
            line
            for k in (0, 1)
            for line in (
                f"arg_0_of_{k} = slice.Tensor(arg_0, 0, {k}, {k + 1})",
                f"conv2d_of_{k} = conv2d(arg_0_of_{k}, w_a_weight, w_a_bias, [1, 1], [1, 1])",
                f"group_norm_of_{k} = group_norm(conv2d_of_{k}, 2, w_norm_weight, w_norm_bias, 1e-05, False)",
                f"silu_of_{k} = silu(group_norm_of_{k})",
                f"conv2d_1_of_{k} = conv2d(silu_of_{k}, w_b_weight, w_b_bias, [1, 1], [1, 1])",
                f"add_of_{k} = add.Tensor(arg_0_of_{k}, conv2d_1_of_{k})",
                f"add_place_of_{k} = slice.Tensor(add, 0, {k}, {k + 1})",
                f"add_write_of_{k} = copy_(add_place_of_{k}, add_of_{k})",
            )
        ),
        "return add",
    ]


@pytest.mark.parametrize(("samples", "count", "sizes"), [(4, 4, [1] * 4), (4, 3, [2, 2]), (5, 2, [3, 2]), (3, 9, [1] * 3)])
def test_slices_of_about_one_size(samples: int, count: int, sizes: list[int]) -> None:
    module, _ = block()
    program = assert_same(module, count, normal(samples, 2, 6, 4))
    found = [node for node in program.ops() if node.name.startswith("conv2d_1_of_")]
    assert [node.meta["val"].shape[0] for node in found] == sizes


@pytest.mark.parametrize(("samples", "count"), [(1, 2), (4, 1)])
def test_one_slice_is_the_program_as_it_was(samples: int, count: int) -> None:
    module, _ = block()
    program = Functionalise().apply(canonical(module, normal(samples, 2, 6, 4)))
    if samples == 1:
        with pytest.raises(Untileable, match="nothing can be cut"):
            UnrollSlices((whole(program, count),)).apply(program)
        return
    assert text(UnrollSlices((whole(program, count),)).apply(program)) == text(program)


def test_a_sum_over_all_samples_is_before_all_slices_of_what_reads_it() -> None:
    program = assert_same(Function(lambda x: x * 2 + x.sin().sum(0)), 2, normal(4, 3))
    names = [node.name for node in program.ops()]
    assert names.index("sum_1") < names.index("add_of_0") < names.index("add_of_1")


class Scaled(nn.Module):
    """Reads a view of a weight, and what is computed from another input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(4, 6))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.matmul(x, self.weight.t()) * t.sin()
        first, second = y.chunk(2, -1)
        return first + second, y


def test_what_reads_weights_alone_is_for_each_slice_and_what_reads_no_sample_is_before_all() -> None:
    program = assert_same(Scaled().eval(), 3, normal(3, 5, 6), normal(4))
    names = [node.name for node in program.ops()]
    assert names.count("sin") == 1
    assert names.index("sin") < names.index("matmul_of_0")
    assert [name for name in names if "t_of" in name or name in ("t", "transpose")] == ["t_of_0", "t_of_1", "t_of_2"]
    assert [name for name in names if name.startswith("add_of")] == ["add_of_0", "add_of_1", "add_of_2"]


def test_where_a_slice_came_from_is_known() -> None:
    module, _ = block()
    program = unrolled(module, 2, normal(2, 2, 6, 4))
    before = {node.name: node for node in canonical(module, normal(2, 2, 6, 4)).ops()}
    for name in ("conv2d", "group_norm", "silu", "conv2d_1", "add"):
        for k in (0, 1):
            assert program.node(f"{name}_of_{k}").meta["nn_module_stack"] == before[name].meta["nn_module_stack"]


def test_names_that_are_taken() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.silu_of_0 = nn.Parameter(normal(3))

        def forward(self, x: Tensor) -> Tensor:
            return functional.silu(x) + self.silu_of_0

    program = canonical(Odd().eval(), normal(2, 3))
    graph = program.copy_graph()
    next(node for node in graph.nodes if node.op == "placeholder" and node.name.startswith("w_")).name = "silu_of_0"
    (weight,) = program.weights.values()
    program = program.with_graph(graph, weights={"silu_of_0": replace(weight, node="silu_of_0")})
    names = [node.name for node in UnrollSlices((whole(program, 2),)).apply(program).graph.nodes]
    assert len(set(names)) == len(names)
    assert "silu_of_0_1" in names


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a sum over the samples": (lambda x: x.sin().sum(0), "sum_1 needs all slices"),
    "a write in place": (lambda x: x.sin().add_(1), "writes to its argument"),
    "nothing that can be cut": (lambda x: x.cumsum(0), "nothing can be cut"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    function, said = REFUSED[what]
    program = canonical(Function(function), normal(4, 3))
    with pytest.raises(Untileable, match=said):
        UnrollSlices((whole(program, 2),)).apply(program)


def test_names_that_are_not_there() -> None:
    program = canonical(Function(torch.sin), normal(4, 3))
    with pytest.raises(PlanFileError, match="which this program does not have; plan the model again"):
        UnrollSlices((Tile("sin", "cos", "arg_0", 0, 2),)).apply(program)


@cache
def in_slices() -> Plan:
    """The block for three samples, in two slices, each of them in loops of rows."""
    module, _ = block()
    p = plan(module, "1MB", inputs=(normal(3, 2, 16, 8),), device="accounting")
    norms = "group_norm_of_0", "group_norm_of_1"
    tiles = tuple(
        tile
        for k in (0, 1)
        for tile in (
            Tile(f"conv2d_of_{k}", f"group_norm_of_{k}_statistics", f"arg_0_of_{k}", 2, 4),
            Tile(f"group_norm_of_{k}", f"add_of_{k}", f"conv2d_of_{k}", 2, 4),
        )
    )
    tiling = Tiling(norms, tiles, unrolled=(whole(p.program, 2),))
    return Plan(p.target, p._options, p._tilings, Decisions(tiling=tiling))


def test_loops_in_slices_run_as_predicted() -> None:
    p = in_slices()
    assert [loop.count for _, loop in loops(p.emitted)] == [4] * 4
    x = normal(3, 2, 16, 8)
    m = p.build()
    with torch.no_grad():
        for _ in range(2):
            assert_alike([m(x)], [block()[0](x)])
            assert m.report().peak_bytes == p.peak_bytes
            assert m.report().step_seconds == pytest.approx(p.step_seconds)
    p.restore()


def writes(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """The places of slices in the result, with what writes them."""
    return [(node.args[0], node) for node in nodes_calling(program.graph, aten.copy_.default)]  # type: ignore[misc]


def leave_one_out(edit: Edit, at: int) -> None:
    edit.graph.erase_node(edit[writes(edit.original)[at][1]])


def write_one_twice(edit: Edit, at: int) -> None:
    place, write = writes(edit.original)[at]
    edit.insert_after(write, aten.copy_.default, edit[place], edit[write.args[1]])  # type: ignore[index]


def write_one_over_another(edit: Edit, at: int) -> None:
    place, _ = writes(edit.original)[at]
    other = writes(edit.original)[1 - at][0]
    edit[place].args = (edit[place].args[0], *other.args[1:])


def read_before_all_is_written(edit: Edit, at: int) -> None:
    place, write = writes(edit.original)[at]
    if at == 1:
        edit[write].prepend(edit.graph.call_function(aten.sum.default, (edit[place].args[0],)))
    else:
        edit.insert_after(write, aten.sum.default, edit[place].args[0])


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("change", [leave_one_out, write_one_twice, write_one_over_another, read_before_all_is_written])
def test_the_checker_sees_that_slices_are_not_all_of_the_result(change: Callable[[Edit, int], None], at: int) -> None:
    module, _ = block()
    p = plan(module, "1MB", inputs=(normal(2, 2, 6, 4),), device="accounting")
    p = Plan(p.target, p._options, p._tilings, Decisions(tiling=Tiling(unrolled=(whole(p.program, 2),))))
    check_plan(p.emitted, p.budget_bytes)
    edit = Edit(p.emitted)
    change(edit, at)
    with pytest.raises(CheckError, match=r"I5|I3|I4"):
        check_plan(edit.program, p.budget_bytes)


@share_of(20)
@given(nets(8), st.integers(2, 5), st.integers(2, 6))
def test_random_nets_in_slices(case: Case, samples: int, count: int) -> None:
    """Slices of any number of samples give what the whole gives, in the bytes that were said, and load equal."""
    case = replace(case, shape=(samples, *case.shape[1:]))
    p = planned(case, case.module())
    p = Plan(p.target, p._options, p._tilings, Decisions(tiling=Tiling(unrolled=(_functional(p, count),))))
    assert any(node.name.endswith("_of_1") for node in p.problem.program.ops())
    assert_runs_as_predicted(p, case, wanted_of(case))
    assert_loads_equal(p, case)


def _functional(p: Plan, count: int) -> Tile:
    return whole(Functionalise().apply(GatherWrites().apply(p.program)), count)
