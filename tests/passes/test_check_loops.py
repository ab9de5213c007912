"""The checker on loops: good programs pass, and every way to break one is refused by invariant and node."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passes.check_plan import check_plan
from passes.regions import Tile
from planner import Plan, plan
from planner.solve.decisions import Decisions, Tiling
from runtime import ops
from runtime.errors import CheckError
from runtime.layout import HostPlace
from tests.passes.loop_mutations import LOOP_MUTATIONS, LoopMutation
from tests.passes.mutations import Edit, layout_of, with_layout
from tests.passes.over_mutations import OVER_MUTATIONS
from tests.passes.programs import Function, run
from tests.passes.test_check_plan import shared_kernels  # noqa: F401  # one cache of operators
from tests.passes.tiled import AMPLE, ON_DEVICE, ON_HOST, OVER, OVER_LARGER, WINDOWED, assert_alike, emitted, loops

TILINGS = {"device": ON_DEVICE, "host": ON_HOST}
ALL = {**TILINGS, "over": OVER, "over larger": OVER_LARGER, "windowed": WINDOWED}
good = pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS.keys())


@pytest.mark.parametrize("tiling", ALL.values(), ids=ALL.keys())
def test_a_good_program_passes_and_takes_what_was_proved(tiling: Tiling) -> None:
    case = emitted(tiling)
    assert check_plan(case.program, case.proof.peak_bytes) == case.proof
    module, args, _ = case.example
    with torch.no_grad():
        wanted = [module(*args)]
    for outputs, measured in run(case.program, case.proof, case.example, calls=2):
        assert_alike(outputs, wanted)
        assert measured == case.proof.peak_bytes


@good
def test_one_byte_less_is_refused_at_its_loop(tiling: Tiling) -> None:
    case = emitted(tiling)
    peak = case.proof.peak_bytes
    assert case.proof.peak_node == "add_tiles"
    with pytest.raises(CheckError, match=rf"^I1: {peak} B are live at \w+, 1 B over the budget\n") as caught:
        check_plan(case.program, peak - 1)
    assert "  > %add_tiles" in str(caught.value)


@good
def test_workspace_in_a_body_counts_in_every_tile(tiling: Tiling) -> None:
    case = emitted(tiling)
    edit = Edit(case.program)
    body = edit[loops(case.program)[-1][0]].meta["loop"].runs[0].body
    (convolution,) = [node for node in body.nodes if "conv2d.default" in str(node.target)]
    before = convolution.meta.get("workspace_bytes", 0)
    try:
        convolution.meta["workspace_bytes"] = before + 10**6
        assert check_plan(edit.program, AMPLE).peak_bytes > 10**6
    finally:
        convolution.meta["workspace_bytes"] = before


@pytest.mark.parametrize("mutation", LOOP_MUTATIONS + OVER_MUTATIONS, ids=lambda m: m.name)
def test_a_broken_program_is_refused(mutation: LoopMutation) -> None:
    places = list(itertools.chain.from_iterable(mutation.make(emitted(tiling).program) for tiling in ALL.values()))
    assert places
    for make in places:
        broken, words = make()
        with pytest.raises(CheckError) as caught:
            check_plan(broken, AMPLE)
        first, *around = str(caught.value).splitlines()
        assert first[:2] in mutation.invariants, first
        assert any(word in first for word in words), f"{first!r} has none of {words}"
        assert sum(line.startswith("  > ") for line in around) == 1


def test_a_result_is_written_over_what_is_read() -> None:
    assert emitted(OVER).program.node("silu").target is torch.ops.aten.alias.default


def test_a_narrower_result_is_written_over_the_beginning() -> None:
    program = emitted(OVER_LARGER).program
    assert program.node("add").all_input_nodes == [program.node("add_over")]
    assert program.node("add_over").args == (program.node("conv2d"), 1, 0, 2)


@pytest.mark.parametrize(("function", "what"), [
    (lambda a, b: (b.sin() + a[:, :2] * 2.0), "what the program gives"),
    (lambda a, b: (b.sin() + a[:, :2] * 2.0).exp() + a.mean(), "what something else reads later"),
    (lambda a, b: (b.sin() + a[:, 2:] * 2.0).exp(), "what is read of another part"),
])  # fmt: skip
def test_what_is_not_written_over(function: Callable[[Tensor, Tensor], Tensor], what: str) -> None:
    module = Function(lambda x: function(x.cos(), x[:, :2])).eval()
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    p = plan(module, "1GB", inputs=(x,), device="accounting")
    tiling = Tiling(tiles=(Tile("sin", "add", "cos", 2, 3),), over=("add",))
    p = Plan(p.target, p._options, p._tilings, Decisions(tiling=tiling))
    assert p._tilings.of(tiling).problem.program.node("add").target is torch.ops.aten.empty_strided.default, what
    m, expected = p.build(), module(x)
    assert torch.equal(m(x), expected)
    p.restore()


def test_values_on_the_host_at_other_times_may_share_their_place() -> None:
    program = emitted(ON_HOST).program
    edit = Edit(program)
    host = next(node for node in edit.graph.nodes if node.name == "conv2d")
    other = edit.insert_before(program.output, host.target, 1, *host.args[1:])
    edit.graph.output_node().prepend(edit.graph.call_function(ops.free, (other,)))
    (place,) = layout_of(program).hosted
    check_plan(with_layout(edit.program, hosted=(place, HostPlace(place.offset, place.nbytes))), AMPLE)


@pytest.mark.parametrize(
    "piece",
    [
        lambda x: x[:, 3:],
        lambda x: x[:, -2:],
        lambda x: x[:, :-2],
        lambda x: x[:, 5:99],
        lambda x: x[:, 4:2],
        lambda x: torch.ops.aten.slice(x, -1),
        lambda x: torch.ops.aten.slice(x, dim=1, end=4, step=3),
        lambda x: x[:, -1],
        lambda x: torch.ops.aten.select(x, dim=1, index=-3),
    ],
)
def test_pieces_may_be_taken_with_open_ends_and_from_behind(piece: Callable[[Tensor], Tensor]) -> None:
    """As models do along dimensions that are not cut: in tiles they are spelled out, as all that is taken there has to be."""
    module, x = Function(lambda x: piece(x.sin()) * 2.0).eval(), torch.randn(6, 8)
    p = plan(module, "1GB", inputs=(x,), device="accounting", keep={"*": {"tile": {"dim": 0, "count": 3}}})
    assert p.decisions.tiling
    assert torch.equal(p.build()(x), module(x))
    p.restore()
