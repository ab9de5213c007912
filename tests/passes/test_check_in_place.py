"""The checker on memory that is written over: good programs pass, and every way to break one is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

from passes.check_plan import check_plan
from passes.program import Program
from planner import Plan, plan
from runtime import ops
from runtime.errors import CheckError
from tests.passes.mutations import Broken, Edit, detach, without_frees
from tests.passes.programs import nodes_calling

aten = torch.ops.aten
AMPLE = 10**9
Make = Callable[[Program], Iterator[Callable[[], Broken]]]
MUTATIONS: list[Make] = []


class Joined(nn.Module):
    """Three branches, the first and last with an activation, joined and scaled; what follows writes over the joined value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(2, 8, 1), nn.Conv2d(2, 8, 1)
        self.out = nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x).relu(), self.b(x), torch.sigmoid(self.c(x))], 1)
        return self.out(torch.tanh(y))


@cache
def joined() -> Plan:
    return plan(Joined().eval(), "1GB", inputs=(torch.randn(1, 2, 8, 8),), device="accounting", allow=("offload",))


def mutation(make: Make) -> Make:
    MUTATIONS.append(make)
    return make


def aliases(program: Program) -> list[fx.Node]:
    return nodes_calling(program.graph, aten.alias.default)


def places(program: Program) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """What is written over, the name for it, and the operator that writes over it."""
    found = []
    for alias in aliases(program):
        (writer,) = [user for user in alias.users if user.target is not ops.free][:1] or [None]
        if writer is not None and writer.target is not aten.slice.Tensor:
            found.append((alias.all_input_nodes[0], alias, writer))
    return found


def copies(program: Program) -> list[fx.Node]:
    return nodes_calling(program.graph, aten.copy_.default)


@mutation
def read_what_was_written_over(program: Program) -> Iterator[Callable[[], Broken]]:
    for before, _, writer in places(program):

        def broken(before: fx.Node = before, writer: fx.Node = writer) -> Broken:
            edit = Edit(program)
            without_frees(edit, before.name)
            edit.insert_after(writer, aten.sum.default, edit[before])
            return edit.program, (f"{before.name} is read after it was written over",)

        yield broken


@mutation
def read_it_through_the_place(program: Program) -> Iterator[Callable[[], Broken]]:
    for _, place, writer in places(program):

        def broken(place: fx.Node = place, writer: fx.Node = writer) -> Broken:
            edit = Edit(program)
            edit.insert_after(writer, aten.sum.default, edit[place])
            return edit.program, (f"{place.name} is read after it was written over",)

        yield broken


@mutation
def write_over_it_twice(program: Program) -> Iterator[Callable[[], Broken]]:
    for _, place, writer in places(program):

        def broken(place: fx.Node = place, writer: fx.Node = writer) -> Broken:
            edit = Edit(program)
            edit.insert_after(writer, writer.target, edit[place])  # type: ignore[arg-type]
            return edit.program, (f"{place.name} is read after it was written over",)

        yield broken


@mutation
def read_the_place_before_it_is_written(program: Program) -> Iterator[Callable[[], Broken]]:
    for _, place, _ in places(program):

        def broken(place: fx.Node = place) -> Broken:
            edit = Edit(program)
            edit.insert_after(place, aten.sum.default, edit[place])
            return edit.program, (f"reads {place.name}, which nothing has written",)

        yield broken


@mutation
def read_what_is_to_be_written_over(program: Program) -> Iterator[Callable[[], Broken]]:
    for before, place, _ in places(program):

        def broken(before: fx.Node = before, place: fx.Node = place) -> Broken:
            edit = Edit(program)
            edit.insert_after(place, aten.sum.default, edit[before])
            return edit.program, (f"reads {before.name}, which nothing has written",)

        yield broken


@mutation
def write_through_the_old_name(program: Program) -> Iterator[Callable[[], Broken]]:
    for before, place, writer in places(program):

        def broken(before: fx.Node = before, place: fx.Node = place, writer: fx.Node = writer) -> Broken:
            edit = Edit(program)
            without_frees(edit, before.name)
            edit[writer].replace_input_with(edit[place], edit[before])
            return edit.program, (f"writes {before.name}, over which {place.name} is to be written",)

        yield broken


@mutation
def drop_the_alias(program: Program) -> Iterator[Callable[[], Broken]]:
    for alias in aliases(program):

        def broken(alias: fx.Node = alias) -> Broken:
            edit = Edit(program)
            detach(edit[alias])
            return edit.program, (f"{alias.name} is used before it exists",)

        yield broken


@mutation
def drop_the_write(program: Program) -> Iterator[Callable[[], Broken]]:
    for _, place, writer in places(program):

        def broken(place: fx.Node = place, writer: fx.Node = writer) -> Broken:
            edit = Edit(program)
            edit[writer].replace_all_uses_with(edit[place])
            edit.graph.erase_node(edit[writer])
            without_frees(edit, place.name)
            return edit.program, ("which nothing has written",)

        yield broken


@mutation
def exchange_alias_and_write(program: Program) -> Iterator[Callable[[], Broken]]:
    for _, place, writer in places(program):

        def broken(place: fx.Node = place, writer: fx.Node = writer) -> Broken:
            edit = Edit(program)
            edit[place].prepend(edit[writer])
            return edit.program, (f"{place.name} is used before it exists",)

        yield broken


@mutation
def read_the_rest_of_the_memory_as_well(program: Program) -> Iterator[Callable[[], Broken]]:
    for before, place, writer in places(program):

        def broken(before: fx.Node = before, place: fx.Node = place, writer: fx.Node = writer) -> Broken:
            edit = Edit(program)
            without_frees(edit, before.name)
            edit[writer].target, edit[writer].args = aten.add_.Tensor, (edit[place], edit[before])
            return edit.program, (f"{writer.name} reads of {place.name} what it may have written over",)

        yield broken


@mutation
def drop_a_copy(program: Program) -> Iterator[Callable[[], Broken]]:
    for copy in copies(program):

        def broken(copy: fx.Node = copy) -> Broken:
            edit = Edit(program)
            edit.graph.erase_node(edit[copy])
            return edit.program, ("which nothing has written",)

        yield broken


@mutation
def copy_twice(program: Program) -> Iterator[Callable[[], Broken]]:
    for copy in copies(program):

        def broken(copy: fx.Node = copy) -> Broken:
            edit = Edit(program)
            target, source = copy.args
            edit.insert_after(copy, aten.copy_.default, edit[target], edit[source])  # type: ignore[index]
            return edit.program, ("writes what is written of cat", f"{target} is read after it was written over")

        yield broken


@mutation
def copy_to_the_place_of_another_part(program: Program) -> Iterator[Callable[[], Broken]]:
    for copy in copies(program):
        for start in (0, 4, 8, 12, 16):

            def broken(copy: fx.Node = copy, start: int = start) -> Broken:
                edit = Edit(program)
                target = edit[copy.args[0]]  # type: ignore[index]
                target.args = (*target.args[:2], start, start + 8)
                return edit.program, ("writes what is written of cat", "which nothing has written")

            if copy.args[0].args[2] != start:  # type: ignore[union-attr]
                yield broken


@mutation
def copy_to_a_place_along_another_dimension(program: Program) -> Iterator[Callable[[], Broken]]:
    for copy in copies(program):

        def broken(copy: fx.Node = copy) -> Broken:
            edit = Edit(program)
            target = edit[copy.args[0]]  # type: ignore[index]
            target.args = (target.args[0], 2, 0, 1)
            source = edit.insert_before(copy, aten.slice.Tensor, edit[copy.args[1]], 2, 0, 1)  # type: ignore[index]
            edit[copy].args = (target, edit.insert_before(copy, aten.slice.Tensor, source, 1, 0, 1))
            return edit.program, ("writes what is written of cat", "which nothing has written")

        yield broken


@mutation
def copy_to_every_other_row(program: Program) -> Iterator[Callable[[], Broken]]:
    for copy in copies(program):

        def broken(copy: fx.Node = copy) -> Broken:
            edit = Edit(program)
            target = edit[copy.args[0]]  # type: ignore[index]
            target.args = (*target.args[:2], 0, 16, 2)
            return edit.program, ("writes no interval of cat",)

        yield broken


@mutation
def read_before_the_last_copy(program: Program) -> Iterator[Callable[[], Broken]]:
    for copy in copies(program):

        def broken(copy: fx.Node = copy) -> Broken:
            edit = Edit(program)
            whole = edit[copy.args[0].args[0]]  # type: ignore[union-attr,index,arg-type]
            edit.insert_before(copy, aten.sum.default, whole)
            return edit.program, (f"reads {whole.name}, which nothing has written",)

        yield broken


def test_a_good_program_passes_with_its_own_peak_as_the_budget() -> None:
    p = joined()
    assert check_plan(p.emitted, p.proof.peak_bytes) == p.proof
    assert len(places(p.emitted)) == 3
    assert len(copies(p.emitted)) == 3


@pytest.mark.parametrize("make", MUTATIONS, ids=lambda make: make.__name__)
def test_a_broken_program_is_refused(make: Make) -> None:
    made = list(make(joined().emitted))
    assert made
    for broken in made:
        program, words = broken()
        with pytest.raises(CheckError) as caught:
            check_plan(program, AMPLE)
        first = str(caught.value).splitlines()[0]
        assert first[:2] in ("I3", "I4", "I5")
        assert any(word in first for word in words), f"{first!r} has none of {words}"


def test_what_a_module_writes_in_place_itself_may_be_read_under_both_names() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            z = y.relu_()
            return torch.cat([y + 1, z * 2, y.view(-1)[:4].view(1, 4)])

    module, x = Own().eval(), torch.randn(3, 4)
    with torch.no_grad():
        expected = module(x)
    p = plan(module, "1GB", inputs=(x,), device="accounting")
    assert torch.equal(p.build()(x), expected)
    p.restore()
