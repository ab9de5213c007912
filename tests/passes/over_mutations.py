"""Ways to break a loop that writes over what its tiles read through windows: rows that are kept, orders, places."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from passes.loop import Run
from passes.program import Program
from runtime import ops
from tests.passes.loop_mutations import LoopMutation, Make, calls, runs_of, with_body, with_run
from tests.passes.mutations import Broken, Edit, without_frees
from tests.passes.tiled import columns, loops

aten = torch.ops.aten

OVER_MUTATIONS: list[LoopMutation] = []
FOLLOWS = "and not what follows it there"
UNWRITTEN = "which nothing has written"
LATE = ("reads what the same tile has written over", "reads what another tile has written over")


def mutation(make: Make) -> Make:
    """Registers a generator of functions that each make one broken program; all break I5."""
    OVER_MUTATIONS.append(LoopMutation(make.__name__, ("I5",), make))
    return make


def keeps(run: Run) -> list[fx.Node]:
    """The copies that keep rows for the next tile."""
    return [n for n in calls(run, aten.copy_.default) if n.args[0].name.endswith("_kept")]  # type: ignore[union-attr]


@mutation
def keep_other_rows(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for copy in keeps(run):
            bounds = [columns(run).index(bound.name) for bound in copy.args[1].args[2:4]]  # type: ignore[union-attr]
            for i, row in enumerate(run.table):
                for by in (-1, 1):
                    other = tuple(n + by if column in bounds else n for column, n in enumerate(row))
                    changed = with_run(program, node, index, table=(*run.table[:i], other, *run.table[i + 1 :]))
                    words = (FOLLOWS, *LATE, "takes ")  # the row before it may be one that is written over
                    yield lambda changed=changed, words=words: (changed, words)


@mutation
def keep_after_the_write(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for copy in keeps(run):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = copy.name) -> None:
                end = body.output_node()
                rows = nodes[name].args[1]
                for moved in (rows, nodes[name], *(u for u in rows.users if u.target is ops.free)):  # type: ignore[union-attr]
                    end.prepend(moved)

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, LATE)


@mutation
def keep_nothing(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for copy in keeps(run):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = copy.name) -> None:
                body.erase_node(nodes[name])

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, (FOLLOWS, UNWRITTEN))


@mutation
def run_tiles_in_another_order(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        if any(keeps(other) for other in node.meta["loop"].runs) and len(run.table) > 1:
            changed = with_run(program, node, index, table=run.table[::-1])
            yield lambda changed=changed: (changed, (FOLLOWS, *LATE))


@mutation
def run_bodies_in_another_order(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, loop in loops(program):
        if any(keeps(run) for run in loop.runs):
            edit = Edit(program)
            edit[node].meta["loop"] = type(loop)(loop.runs[::-1], loop.label)
            yield lambda edit=edit: (edit.program, (FOLLOWS, UNWRITTEN, *LATE))


@mutation
def join_in_another_order(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for join in calls(run, aten.cat.default):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = join.name) -> None:
                parts, dim = nodes[name].args
                nodes[name].args = (list(reversed(parts)), dim)  # type: ignore[arg-type,call-overload]

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, (FOLLOWS,))


@mutation
def read_what_was_kept_alone(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for join in calls(run, aten.cat.default):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = join.name) -> None:
                with body.inserting_before(nodes[name]):
                    body.call_function(aten.neg.default, (nodes[name].all_input_nodes[0],)).name = "peek"

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, (FOLLOWS,))


@mutation
def read_what_was_kept_later(program: Program) -> Iterator[Callable[[], Broken]]:
    """After its loop nothing is in the buffer."""
    for node, _ in loops(program):
        for kept in (n for n in node.all_input_nodes if n.name.endswith("_kept")):
            edit = Edit(program)
            without_frees(edit, kept.name)
            edit.insert_after(edit[node], aten.neg.default, edit[kept])
            yield lambda edit=edit, kept=kept: (edit.program, (f"reads {kept.name}, which nothing has written",))


@mutation
def read_past_the_window(program: Program) -> Iterator[Callable[[], Broken]]:
    """What a tile reads of its own rows once it has written over them, and of those of the tile before at any time."""
    for node, index, run in runs_of(program):
        if not any(keeps(other) for other in node.meta["loop"].runs):
            continue
        value = next(n for n in run.operators if n.target is aten.slice.Tensor).args[0]
        for late in (False, True):
            if not index and not late:
                continue

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = str(value), late: bool = late) -> None:
                first = next(n for n in body.nodes if n.op == "call_function")
                with body.inserting_before(body.output_node() if late else first):
                    row = body.call_function(aten.slice.Tensor, (nodes[name], 2, 0, 1))
                    row.name = "row"
                    body.call_function(aten.neg.default, (row,)).name = "peek"
                    body.call_function(ops.free, (row,))

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, LATE)


@mutation
def overlap_two_results(program: Program) -> Iterator[Callable[[], Broken]]:
    """One channel, or all of them, of what is written over one value."""
    for node in program.ops():
        if node.target is not aten.slice.Tensor or not node.name.endswith("_over"):
            continue
        value, dim, start, stop = node.args
        others = [u for u in value.users if u is not node and u.target is aten.slice.Tensor]  # type: ignore[union-attr]
        for by in (-2, -1, 1, 2):
            if others and 0 <= start + by < stop + by <= value.meta["val"].shape[dim]:  # type: ignore[operator,union-attr,index]
                edit = Edit(program)
                edit[node].args = (edit[value], dim, start + by, stop + by)  # type: ignore[operator,index]
                words = ("writes what the same tile has written", "writes no interval of its operand")
                yield lambda edit=edit, words=words: (edit.program, words)


@mutation
def read_what_was_there_before(program: Program) -> Iterator[Callable[[], Broken]]:
    """Where a result is written over what nothing reads any more, that is not to be read as the result."""
    for node, index, run in runs_of(program):
        for copy in calls(run, aten.copy_.default):
            place = copy.args[0]
            outside = place.target is not aten.slice.Tensor or place.args[0] not in run.placeholders  # type: ignore[union-attr]
            alias = None if outside else program.node(place.args[0].name)  # type: ignore[union-attr]
            if alias is None or alias.target is not aten.alias.default or alias.all_input_nodes[0] in node.all_input_nodes:
                continue
            if alias.all_input_nodes[0].name.endswith("_over"):
                continue

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = copy.name) -> None:
                with body.inserting_before(nodes[name]):
                    body.call_function(aten.neg.default, (nodes[name].args[0],)).name = "peek"

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, (UNWRITTEN,))


@mutation
def write_without_an_announcement(program: Program) -> Iterator[Callable[[], Broken]]:
    """A loop that writes into a value that is there, whoever reads that."""
    for node in program.ops():
        if node.target is not aten.alias.default:
            continue
        edit = Edit(program)
        edit[node].target, edit[node].args = aten.slice.Tensor, (edit[node.all_input_nodes[0]], 0, 0, 1)
        yield lambda edit=edit: (edit.program, ("no result is to be written there", "writes no interval of its operand", *LATE))
