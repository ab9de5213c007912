"""`Loop` and `Run`: what is told of them."""

from __future__ import annotations

from passes.insert_frees import InsertFrees, is_write
from passes.loop import loop_of
from passes.program import copy_graph
from runtime import ops
from tests.passes.tiled import ON_DEVICE, ON_HOST, bodies, captured, columns, emitted, loops


def test_what_a_loop_says_of_itself() -> None:
    ((_, on_device), _), ((_, on_host), _) = (loops(emitted(tiling).program) for tiling in (ON_DEVICE, ON_HOST))
    assert (on_device.count, bodies(on_device), on_device.banded, on_host.banded) == (4, 3, False, True)
    assert columns(on_device.runs[0]) == ["lo", "hi", "lo_1", "hi_1", "tile"]
    assert [node.name for node in on_device.runs[0].placeholders[:2]] == ["arg_0", "w_a_weight"]


def test_only_loops_have_one() -> None:
    program = emitted(ON_DEVICE).program
    assert [node.name for node in program.ops() if loop_of(node) is not None] == ["group_norm_statistics_tiles", "add_tiles"]


def test_changed_bodies_leave_the_loop_as_it_was() -> None:
    (_, loop), *_ = loops(emitted(ON_DEVICE).program)
    before = [run.body for run in loop.runs]
    other = loop.map_bodies(copy_graph)
    assert [run.body for run in loop.runs] == before
    assert not {id(run.body) for run in other.runs} & {id(body) for body in before}
    assert [run.table for run in other.runs] == [run.table for run in loop.runs]


def test_frees_in_bodies() -> None:
    """Values of a tile end in it, operands do not, and what only writes or starts a copy gives no value."""
    program = captured()._tilings.of(ON_HOST).problem.program
    freed = InsertFrees().apply(program)
    assert all(node.target is not ops.free for _, loop in loops(program) for run in loop.runs for node in run.operators)
    for _, loop in loops(freed):
        for run in loop.runs:
            ended = [value for node in run.operators if node.target is ops.free for value in node.args]
            mine = [n for n in run.operators if n.target not in (ops.free, ops.ahead, ops.save) and not is_write(n)]
            assert sorted(map(str, ended)) == sorted(map(str, mine))
            assert all(value.op == "call_function" for value in ended)  # type: ignore[union-attr]


def test_a_value_of_a_tile_ends_behind_its_last_reader() -> None:
    (_, loop), *_ = loops(emitted(ON_DEVICE).program)
    for run in loop.runs:
        order = list(run.operators)
        for node in order:
            if node.target is ops.free:
                readers = [user for value in node.all_input_nodes for user in value.users if user is not node]
                assert max(map(order.index, readers)) == order.index(node) - 1
