"""Ways to break a loop of an emitted program: each says where it can be applied, and what the checker must then say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from passes.loop import Loop, Run
from passes.program import Program, copy_graph
from runtime import ops
from tests.passes.mutations import Broken, Edit, detach, layout_of, with_layout, without_frees
from tests.passes.programs import nodes_calling
from tests.passes.tiled import loops

aten = torch.ops.aten

Make = Callable[[Program], Iterator[Callable[[], Broken]]]


@dataclass(frozen=True)
class LoopMutation:
    """`make` yields one broken program per place; `invariants` are those of which the checker must cite one."""

    name: str
    invariants: tuple[str, ...]
    make: Make


LOOP_MUTATIONS: list[LoopMutation] = []


def mutation(*invariants: str) -> Callable[[Make], Make]:
    """Registers a generator of functions that each make one broken program."""

    def register(make: Make) -> Make:
        LOOP_MUTATIONS.append(LoopMutation(make.__name__, invariants, make))
        return make

    return register


def with_run(program: Program, loop: fx.Node, index: int, **changes: Any) -> Program:
    """The program with one run of a loop changed."""
    edit = Edit(program)
    had: Loop = loop.meta["loop"]
    runs = list(had.runs)
    runs[index] = replace(runs[index], **changes)
    edit[loop].meta["loop"] = replace(had, runs=tuple(runs))
    return edit.program


def runs_of(program: Program) -> Iterator[tuple[fx.Node, int, Run]]:
    """Every run of every loop."""
    for node, loop in loops(program):
        for index, run in enumerate(loop.runs):
            yield node, index, run


def with_body(program: Program, loop: fx.Node, index: int, change: Callable[[dict[str, fx.Node], fx.Graph], None]) -> Program:
    """The program with the body of one run changed in place."""
    body = copy_graph(loop.meta["loop"].runs[index].body)
    change({node.name: node for node in body.nodes}, body)
    return with_run(program, loop, index, body=body)


def calls(run: Run, *targets: Any) -> list[fx.Node]:
    return [node for node in run.operators if node.target in targets]


# Rows that two tiles write, or one reads after another has written them.
AGAIN = ("writes what another tile has written", "reads what another tile has written over")
# What a tile kept is not what the next one needs.
AGAIN += ("and not what follows it there", "_kept, which nothing has written")

# Tables --------------------------------------------------------------------------------------------------------------


@mutation("I5", "I3")
def drop_a_row(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for i in range(len(run.table)):
            changed = with_run(program, node, index, table=(*run.table[:i], *run.table[i + 1 :]))
            words = ("do not write every element", "reads another band than the one on its way", *AGAIN)
            yield lambda changed=changed, words=words: (changed, words)


@mutation("I5", "I3")
def repeat_a_row(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for i, row in enumerate(run.table):
            changed = with_run(program, node, index, table=(*run.table[:i], row, *run.table[i:]))
            words = ("do not write every element", "reads another band", "reads a band that nobody asked for", *AGAIN)
            yield lambda changed=changed, words=words: (changed, words)


def _writes(run: Run) -> list[int]:
    """The columns that bound what is written."""
    placed = [n.args[0] for n in calls(run, aten.copy_.default)] + calls(run, ops.save)  # type: ignore[list-item]
    names = {a.name for n in placed for a in n.args if isinstance(a, fx.Node) and a.op == "placeholder"}  # type: ignore[union-attr]
    placeholders = run.placeholders
    return [i for i, p in enumerate(placeholders[len(placeholders) - len(run.table[0]) :]) if p.name in names]


@mutation("I5", "I3")
def shift_an_interval_that_is_written(program: Program) -> Iterator[Callable[[], Broken]]:
    words = ("do not write every element", "takes ", "is no band of a value", "reads another band", *AGAIN)
    for node, index, run in runs_of(program):
        for i, row in enumerate(run.table):
            for by in (-1, 1):
                shifted = tuple(n + by if column in _writes(run) else n for column, n in enumerate(row))
                changed = with_run(program, node, index, table=(*run.table[:i], shifted, *run.table[i + 1 :]))
                yield lambda changed=changed: (changed, words)


@mutation("I5", "I3", "I4")
def lengthen_an_interval(program: Program) -> Iterator[Callable[[], Broken]]:
    """One end of it: the body is for another size."""
    words = ("has the shape", "takes ", "is no band of a value", "reads another band", "is not in its slot", "on its way")
    words += ("do not write every element", *AGAIN)
    for node, index, run in runs_of(program):
        for i, row in enumerate(run.table):
            for column in range(len(row)):
                for by in (-1, 1):
                    other = tuple(n + by if column == c else n for c, n in enumerate(row))
                    changed = with_run(program, node, index, table=(*run.table[:i], other, *run.table[i + 1 :]))
                    yield lambda changed=changed: (changed, words)


@mutation("I5", "I3")
def exchange_two_columns(program: Program) -> Iterator[Callable[[], Broken]]:
    words = ("has the shape", "takes ", "is no band of a value", "reads another band", "do not write every", "on its way")
    words += AGAIN
    for node, index, run in runs_of(program):
        for column in range(len(run.table[0]) - 1):
            table = tuple((*row[:column], row[column + 1], row[column], *row[column + 2 :]) for row in run.table)
            if table != run.table:
                changed = with_run(program, node, index, table=table)
                yield lambda changed=changed: (changed, words)


@mutation("I5")
def drop_a_column(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        changed = with_run(program, node, index, table=tuple(row[:-1] for row in run.table))
        yield lambda changed=changed: (changed, ("numbers for",))


@mutation("I5", "I3")
def drop_a_run(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, loop in loops(program):
        for index in range(len(loop.runs)):
            edit = Edit(program)
            edit[node].meta["loop"] = replace(loop, runs=(*loop.runs[:index], *loop.runs[index + 1 :]))
            words = ("do not write every element", "reads another band", "on its way", *AGAIN)
            yield lambda changed=edit.program, words=words: (changed, words)


# Bodies --------------------------------------------------------------------------------------------------------------


@mutation("I5", "I3")
def drop_a_write(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for copy in calls(run, aten.copy_.default):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = copy.name) -> None:
                body.erase_node(nodes[name])

            changed = with_body(program, node, index, change)
            words = ("do not write every element", "that is not in its slot", *AGAIN)
            yield lambda changed=changed, words=words: (changed, words)


@mutation("I5", "I4")
def write_twice(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for copy in calls(run, aten.copy_.default):
            if any(n.target is ops.room for n in copy.all_input_nodes):
                continue  # the slot, twice the same

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = copy.name) -> None:
                with body.inserting_after(nodes[name]):
                    body.call_function(aten.copy_.default, nodes[name].args).name = "again"

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, ("writes what the same tile has written",))


@mutation("I5")
def read_what_is_written(program: Program) -> Iterator[Callable[[], Broken]]:
    """A tile that reads a buffer finds in it what other tiles have not written yet."""
    for node, index, run in runs_of(program):
        for copy in calls(run, aten.copy_.default):
            place = copy.all_input_nodes[0]
            if place.target is not aten.slice.Tensor:
                continue

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = copy.name) -> None:
                place = nodes[name].all_input_nodes[0]
                with body.inserting_after(nodes[name]):
                    body.call_function(aten.neg.default, (place,)).name = "peek"

            changed = with_body(program, node, index, change)
            words = ("which nothing has written", "reads what the same tile has written over")
            yield lambda changed=changed, words=words: (changed, words)


@mutation("I5")
def read_rows_that_another_tile_writes_over(program: Program) -> Iterator[Callable[[], Broken]]:
    """A result may be written over what is read, row by row; rows of other tiles may have been written already."""
    for node, index, run in runs_of(program):
        for copy in calls(run, aten.copy_.default):
            place = copy.all_input_nodes[0]
            outside = place.target is not aten.slice.Tensor or place.args[0] not in run.placeholders
            name = "" if outside else place.args[0].name
            if not index or outside or program.node(name).target is not aten.alias.default:  # a result over what is read
                continue

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = place.name) -> None:
                written = nodes[name].all_input_nodes[0]
                with body.inserting_before(nodes[name]):
                    row = body.call_function(aten.slice.Tensor, (written, nodes[name].args[1], 0, 1))
                    row.name = "row"
                    body.call_function(aten.neg.default, (row,)).name = "peek"
                    body.call_function(ops.free, (row,))

            changed = with_body(program, node, index, change)
            words = ("reads what another tile has written over", "which nothing has written")
            yield lambda changed=changed, words=words: (changed, words)


@mutation("I5")
def read_what_was_written_over(program: Program) -> Iterator[Callable[[], Broken]]:
    """The name of a value that a result was written over is still there, until it is freed."""
    for node in program.ops():
        if node.target is not aten.alias.default:
            continue
        (over,) = node.all_input_nodes
        over = over.all_input_nodes[0] if over.name.endswith("_over") else over
        loop = next(user for user in node.users if "loop" in user.meta)
        edit = Edit(program)
        without_frees(edit, over.name)
        peek = edit.insert_before(edit[loop].next, aten.neg.default, edit[over])
        peek.append(edit.graph.call_function(ops.free, (peek,)))
        yield lambda edit=edit: (edit.program, ("is read after it was written over",))


@mutation("I4")
def read_after_the_free(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for free in calls(run, ops.free):
            if len(free.all_input_nodes) != 1:
                continue
            (value,) = free.all_input_nodes

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = free.name) -> None:
                nodes[name].prev.prepend(nodes[name])

            changed = with_body(program, node, index, change)
            words = (f"{value} is used after it was freed",)
            yield lambda changed=changed, words=words: (changed, words)


@mutation("I4")
def leak_a_value(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for free in calls(run, ops.free):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = free.name) -> None:
                body.erase_node(nodes[name])

            changed = with_body(program, node, index, change)
            words = ("leaves ", "refills a slot that")
            yield lambda changed=changed, words=words: (changed, words)


@mutation("I4")
def free_an_operand(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        operand = run.placeholders[0]

        def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = operand.name) -> None:
            body.output_node().prepend(body.call_function(ops.free, (nodes[name],)))

        changed = with_body(program, node, index, change)
        yield lambda changed=changed: (changed, ("cannot be freed",))


@mutation("I4")
def give_a_value_a_name_from_outside(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for value in (*calls(run, aten.conv2d.default), run.placeholders[-1]):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = value.name) -> None:
                nodes[name].name = "arg_0"

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, ("arg_0 has two meanings",))


@mutation("I4")
def give_two_values_one_name(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        first, *_, last = [n for n in run.operators if n.target not in (ops.free, *ops.BANDS)]

        def change(nodes: dict[str, fx.Node], body: fx.Graph, one: str = first.name, other: str = last.name) -> None:
            nodes[other].name = one

        changed = with_body(program, node, index, change)
        words = (f"{first.name} has two meanings",)
        yield lambda changed=changed, words=words: (changed, words)


# Bands ---------------------------------------------------------------------------------------------------------------


def _without(program: Program, target: Any, *words: str) -> Iterator[Callable[[], Broken]]:
    """Drops the calls of one kind, one by one."""
    for node, index, run in runs_of(program):
        for call in calls(run, target):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = call.name) -> None:
                body.erase_node(nodes[name])

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, words)


@mutation("I3")
def drop_an_ahead(program: Program) -> Iterator[Callable[[], Broken]]:
    yield from [*_without(program, ops.ahead, "that nobody asked for")][:-1]  # that of the last tile asks for nothing


@mutation("I5")
def drop_a_save(program: Program) -> Iterator[Callable[[], Broken]]:
    yield from _without(program, ops.save, "does not save it")


@mutation("I3", "I4")
def ask_for_another_band(program: Program) -> Iterator[Callable[[], Broken]]:
    words = ("reads another band than the one on its way", "is no band of a value", "on its way")
    for node, index, run in runs_of(program):
        columns = [p.name for p in run.placeholders[len(run.placeholders) - len(run.table[0]) :]]
        for i, row in enumerate(run.table):
            if "next_lo" in columns and row[columns.index("next_lo")] != row[columns.index("next_hi")]:
                other = tuple(n + (name in ("next_lo", "next_hi")) for name, n in zip(columns, row, strict=True))
                changed = with_run(program, node, index, table=(*run.table[:i], other, *run.table[i + 1 :]))
                yield lambda changed=changed: (changed, words)


@mutation("I4")
def ask_for_a_band_that_nobody_reads(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, loop in loops(program):
        run = loop.runs[-1]
        columns = [p.name for p in run.placeholders[len(run.placeholders) - len(run.table[0]) :]]
        if "next_lo" in columns:
            last = tuple(1 if name == "next_hi" else n for name, n in zip(columns, run.table[-1], strict=True))
            changed = with_run(program, node, len(loop.runs) - 1, table=(*run.table[:-1], last))
            yield lambda changed=changed: (changed, ("a band is on its way",))


@mutation("I4")
def ask_before_the_band_was_copied_on(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        if run.table[-1][2:4] == (0, 0):
            continue
        for ahead in calls(run, ops.ahead):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = ahead.name) -> None:
                clone = next(n for n in body.nodes if n.target is aten.clone.default)
                clone.prepend(nodes[name])

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, ("refills a slot that conv2d_band still reads",))


@mutation("I4")
def ask_twice(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        if run.table[-1][2:4] == (0, 0):
            continue
        for ahead in calls(run, ops.ahead):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = ahead.name) -> None:
                with body.inserting_after(nodes[name]):
                    body.call_function(ops.ahead, nodes[name].args).name = "again"

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, ("while another is on its way",))


@mutation("I4", "I3")
def write_to_the_slot_without_room(program: Program) -> Iterator[Callable[[], Broken]]:
    """The save of the tile before may not have left it."""
    for node, index, run in runs_of(program):
        for room in calls(run, ops.room):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = room.name) -> None:
                nodes[name].target = ops.fetch

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, ("before all of it was written",))


@mutation("I3")
def save_before_the_write(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for save in calls(run, ops.save):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = save.name) -> None:
                next(n for n in body.nodes if n.target is aten.copy_.default).prepend(nodes[name])

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, ("saves a band that is not in its slot",))


@mutation("I3")
def make_a_slot_smaller(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in program.ops():
        if node.target is aten.empty_strided.default and "slot" in node.name:
            edit = Edit(program)
            shape, stride = node.args
            edit[node].args = ([shape[0] - 1], stride)  # type: ignore[index,operator]
            yield lambda changed=edit.program: (changed, ("is no band of a value on the host that fits its slot",))


@mutation("I3")
def give_a_slot_another_dtype(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in program.ops():
        if node.target is aten.empty_strided.default and "slot" in node.name:
            edit = Edit(program)
            edit[node].kwargs = {**node.kwargs, "dtype": torch.int64}
            yield lambda changed=edit.program: (changed, ("is no band of a value on the host that fits its slot",))


@mutation("I3")
def read_along_another_dimension(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for band in calls(run, ops.fetch, ops.room):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = band.name) -> None:
                value, slot, _, *bounds = nodes[name].args
                nodes[name].args = (value, slot, 1, *bounds)

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, ("is no band of a value on the host that fits its slot",))


@mutation("I3")
def read_the_host_without_bands(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, index, run in runs_of(program):
        for band in calls(run, ops.fetch):

            def change(nodes: dict[str, fx.Node], body: fx.Graph, name: str = band.name) -> None:
                with body.inserting_after(nodes[name]):
                    body.call_function(aten.neg.default, (nodes[name].args[0],)).name = "peek"

            changed = with_body(program, node, index, change)
            yield lambda changed=changed: (changed, ("which lives on the host, as a whole",))


# The program around them ---------------------------------------------------------------------------------------------


@mutation("I5", "I3")
def drop_a_loop(program: Program) -> Iterator[Callable[[], Broken]]:
    for node, _ in loops(program):
        edit = Edit(program)
        detach(edit[node])
        words = ("which nothing has written", "before all of it was written", "do not write every element")
        yield lambda changed=edit.program, words=words: (changed, words)


@mutation("I3", "I4")
def run_a_loop_before_the_one_it_reads(program: Program) -> Iterator[Callable[[], Broken]]:
    if len(loops(program)) < 2:
        return
    (first, _), (second, _), *_ = loops(program)
    edit = Edit(program)
    edit[first].prepend(edit[second])
    yield lambda: (edit.program, ("is used before it exists",))


@mutation("I2")
def overlap_two_places_on_the_host(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.host):
        places = layout_of(program).hosted
        edit = Edit(program)
        other = edit.insert_after(node, ops.host, len(places), *node.args[1:])
        other.name = "other"
        edit.insert_before(program.output, ops.free, other)
        changed = with_layout(edit.program, hosted=(*places, places[node.args[0]]))  # type: ignore[index]
        yield lambda changed=changed: (changed, ("is on the host where conv2d still is",))


@mutation("I2")
def shrink_the_host_arena(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    if layout.hosted:
        for nbytes in (layout.host_bytes - 1, 0):
            changed = with_layout(program, host_bytes=nbytes)
            yield lambda changed=changed: (changed, ("does not fit its place on the host",))


@mutation("I2", "I3")
def shrink_a_place_on_the_host(program: Program) -> Iterator[Callable[[], Broken]]:
    hosted = layout_of(program).hosted
    for place in hosted:
        smaller = with_layout(program, hosted=(replace(place, nbytes=64),))
        yield lambda smaller=smaller: (smaller, ("does not fit its place on the host",))
    if hosted:
        yield lambda: (with_layout(program, hosted=()), ("the layout has no such place",))


@mutation("I4")
def use_a_band_outside_of_loops(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.host):
        edit = Edit(program)
        slot = next(n for n in edit.graph.nodes if n.name == "conv2d_slot")
        edit.insert_after(slot, ops.ahead, edit[node], slot, 2, 0, 1)
        yield lambda changed=edit.program: (changed, ("is outside of a loop",))
