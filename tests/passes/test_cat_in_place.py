"""`CatInPlace`: parts of a joined value are copied as they come; the same bits, and no peak is higher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.cat_in_place import CatInPlace, Join, joins_in_place
from passes.liveness import analyse_liveness
from passes.probe import Prober
from passes.program import Program
from passes.write_in_place import WriteInPlace, writable_in_place
from planner import plan
from planner.capture import capture
from planner.solve.decisions import UNTILED
from runtime.errors import PlanFileError
from tests.passes.programs import canonical, nodes_calling, text
from tests.passes.test_functionalise import interpret, same, sharing
from tests.properties.test_plans import planned
from tests.properties.test_plans import same as all_same
from tests.strategies.modules import INSTRUCTIONS, Case, cases

aten = torch.ops.aten
PROBER = Prober("accounting")


def cats(program: Program) -> list[str]:
    return [node.name for node in nodes_calling(program.graph, aten.cat.default)]


def most(program: Program) -> int:
    return max(analyse_liveness(program, PROBER).bytes_at)


def check(program: Program, joins: tuple[Join, ...], module: nn.Module, args: Any, kwargs: Any) -> Program:
    """The joins rewritten: the same outputs, aliasing of outputs and state, bit for bit, with meta as recorded."""
    changed = run_passes(program, (CatInPlace(joins),))
    outputs, state = interpret(program, module, args, kwargs)
    found, left = interpret(changed, module, args, kwargs)
    assert all(map(same, outputs, found))
    assert all(map(same, state, left))
    assert sharing(outputs) == sharing(found)
    return changed


@given(cases(), st.lists(st.booleans(), min_size=8, max_size=8))
def test_any_join_that_can_be_rewritten_gives_the_same_bits(case: Case, late: list[bool]) -> None:
    """Also where it is not worth it."""
    module = case.fresh()
    program = run_passes(capture(module, case.args, case.kwargs), CANONICALISE)
    if late[0]:
        program = run_passes(program, (WriteInPlace(writable_in_place(program)),))
    joins = []
    for name, flag in zip(cats(program), late[1:], strict=False):
        try:
            CatInPlace((Join(name, flag),)).apply(program)
        except PlanFileError:
            continue
        joins.append(Join(name, flag))
    check(program, tuple(joins), case.fresh(), case.args, case.kwargs)


_KINDS = {"activation", "linear", "add", "mul", "cat", "split", "cut", "transpose", "conv", "reshape", "contiguous", "write"}
joining = cases(min_instructions=6, exclude=frozenset(i.name for i in INSTRUCTIONS) - _KINDS)


@given(joining)
def test_what_is_found_lowers_a_peak_and_raises_none(case: Case) -> None:
    eager, module = case.fresh(), case.fresh()
    given_ = copy.deepcopy((case.args, case.kwargs))
    p = planned(case, module)
    if p is None:
        return
    base, final = p._tilings.base, p._tilings.of(UNTILED)
    assert final.resident.peak_bytes <= base.resident.peak_bytes
    assert final.minimum.peak_bytes <= base.minimum.peak_bytes
    program = p.program
    joins = joins_in_place(program, PROBER)
    assert most(run_passes(program, (CatInPlace(joins),))) <= most(program)
    with torch.no_grad():
        expected = eager(*copy.deepcopy(case.args), **copy.deepcopy(case.kwargs))
    for q in (p, p.replan(p.minimum_bytes)):
        m = q.build()
        assert all_same(m(*case.args, **case.kwargs), expected)
        assert m.report().peak_bytes == q.peak_bytes
        q.restore()
        if dict(eager.named_buffers()):
            break  # a second call starts from another state
    assert all_same((case.args, case.kwargs), given_)


class Branches(nn.Module):
    """Branches of one input, of so many channels each, joined; `early` is an operator on each."""

    def __init__(self, *channels: int, function: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(2, n, 3, padding=1) for n in channels)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.function(branch(x)) for branch in self.branches], 1)


X = torch.randn(1, 2, 8, 8)


def found(module: nn.Module, *args: Tensor) -> tuple[Program, tuple[Join, ...]]:
    program = canonical(module, *args)
    joins = joins_in_place(program, PROBER)
    return check(program, joins, module, args, {}), joins


def test_before_and_after() -> None:
    program, joins = found(Branches(4, 4, 4, function=lambda t: t), X)
    assert joins == (Join("cat"),)
    lines = text(program).splitlines()
    first = lines.index("cat_buffer = empty_strided([1, 12, 8, 8], [768, 64, 8, 1], dtype=torch.float32, device=cpu)")
    assert lines[first - 1].startswith("conv2d = ")
    assert lines[first + 1 : first + 4] == [
        "cat = alias(cat_buffer)",
        "cat_part_0 = slice.Tensor(cat, 1, 0, 4)",
        "cat_write_0 = copy_(cat_part_0, conv2d)",
    ]
    assert lines[-1] == "return cat"


def test_the_peak_is_the_joined_value_and_one_part() -> None:
    program = canonical(Branches(4, 4, 4, 4, function=lambda t: t), X)
    part, x = 4 * 64 * 4, 2 * 64 * 4
    assert most(program) == x + 8 * part
    assert most(run_passes(program, (CatInPlace(joins_in_place(program, PROBER)),))) == x + 5 * part


def test_late_where_much_happens_between_the_parts() -> None:
    class Skip(nn.Module):
        """A small part that is made first, large values that come and go, and the rest of the joined value."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.wide = nn.Conv2d(2, 32, 3, padding=1), nn.Conv2d(32, 40, 1)
            self.narrow, self.last = nn.Conv2d(40, 2, 1), nn.Conv2d(2, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            return torch.cat([first, self.last(self.narrow(self.wide(first)))], 1)

    program, joins = found(Skip().eval(), X)
    assert joins == (Join("cat", late=True),)
    lines = [line.split(" = ")[0] for line in text(program).splitlines()]
    assert lines.index("conv2d_2") < lines.index("cat_buffer") < lines.index("cat_write_0")
    assert lines.index("cat_write_0") < lines.index("conv2d_3") < lines.index("cat_write_1")


def test_what_ends_later_or_is_an_input_is_copied_in_the_place_of_the_join() -> None:
    class Some(Branches):
        def forward(self, x: Tensor) -> Any:
            a, b, c = (branch(x) for branch in self.branches)
            return torch.cat([a, x, b, c], 1).sum() + a.sum()

    module = Some(8, 8, 8).eval()
    program, joins = found(module, X)
    assert joins
    names = [node.name for node in program.ops()]
    assert names.index("cat_write_2") < names.index("conv2d_2") < names.index("cat_write_0") < names.index("cat_write_1")


def test_a_part_that_is_written_again_is_copied_behind_that() -> None:
    class Again(Branches):
        def forward(self, x: Tensor) -> Tensor:
            a, b, c = (branch(x) for branch in self.branches)
            a.mul_(2.0)
            return torch.cat([a, b, c], 1)

    program, joins = found(Again(8, 8, 8).eval(), X)
    assert joins
    names = [node.name for node in program.ops()]
    assert names.index("mul_") < names.index("cat_write_0")


def test_a_join_of_joins() -> None:
    class Nested(Branches):
        def forward(self, x: Tensor) -> Tensor:
            a, b, c, d = (branch(x) for branch in self.branches)
            return torch.cat([torch.cat([a, b], 1), c, d], 1)

    module = Nested(2, 2, 8, 8).eval()
    program, joins = found(module, X)
    assert joins
    assert most(program) < most(canonical(module, X))
    check(canonical(module, X), (Join("cat"), Join("cat_1")), module, (X,), {})
    check(canonical(module, X), (Join("cat_1", late=True), Join("cat")), module, (X,), {})


def test_none_where_no_peak_is_lower() -> None:
    class Wide(Branches):
        """The join is not where most is live."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([branch(x).sum(1, keepdim=True) for branch in self.branches], 1)

    assert found(Wide(32, 32), X)[1] == ()


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: torch.cat([a, b.double()], 1),
        lambda a, b: torch.cat([a], 1) + b,
        lambda a, b: torch.cat([torch.empty(0), a + 1, b], 1),
        lambda a, b: torch.stack([a, b]),
    ],
    ids=["another dtype", "one part", "a part of no elements", "a stack"],
)
def test_what_cannot_be_joined_part_by_part(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return function(torch.relu(a), torch.tanh(b))

    program = canonical(Two(), X, X)
    assert joins_in_place(program, PROBER) == ()
    for name in [*cats(program), "nowhere"]:
        with pytest.raises(PlanFileError, match=f"'{name}' joins nothing part by part; plan the model again"):
            CatInPlace((Join(name),)).apply(program)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_plans_give_the_same_bits(dim: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    class Along(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.function(branch(x)) for branch in self.branches], dim).exp()

    module = Along(4, 4, 4).eval().to(dtype).to(memory_format=layout)
    x = torch.randn(2, 2, 8, 8).to(dtype).to(memory_format=layout)
    with torch.no_grad():
        expected = module(x)
    p = plan(module, "1GB", inputs=(x,), device="accounting", allow=("offload",))
    assert "cat_buffer" in p.code
    assert p.peak_bytes < p._tilings.base.resident.peak_bytes
    for q in (p, p.replan(p.minimum_bytes)):
        m = q.build()
        result = m(x)
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()
        assert m.report().peak_bytes == q.peak_bytes
        q.restore()
