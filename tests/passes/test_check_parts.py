"""The checker on programs whose weights come in parts or are looked up: every way to break one is refused by invariant."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from passes.check_kernels import Kernels
from passes.check_plan import check_plan
from passes.program import Program
from planner.plan import Plan
from runtime import ops
from runtime.errors import CheckError
from runtime.executable import Rows
from runtime.layout import Slot
from tests.passes.in_parts import plan_cut
from tests.passes.mutations import Edit, Mutation, layout_of, with_layout
from tests.passes.plan_mutations import MUTATIONS
from tests.passes.programs import nodes_calling

aten = torch.ops.aten
AMPLE = 10**9
Broken = tuple[Program, str, str]  # with the invariant, and words of the message
PARTS: list[Callable[[Program], Iterator[Broken]]] = []
PLACES = 3


KERNELS = Kernels()


@pytest.fixture(autouse=True)
def shared_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache of operators for all checks here: broken programs have the operators of good ones."""
    monkeypatch.setattr("passes.check_plan.Kernels", lambda: KERNELS)


class Tied(nn.Module):
    """A table at both ends, a layer with a bias that is called twice, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.layer = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.layer(torch.tanh(self.layer(self.table(ids)))))
        return self.head(torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2))


@cache
def plans() -> tuple[Plan, Plan]:
    """Everything resident, and the least there can be."""
    roomy = plan_cut(Tied(), torch.tensor([[1, 11, 0, 5]]), count=3)
    return roomy, roomy.replan(roomy.minimum_bytes)


def part(make: Callable[[Program], Iterator[Broken]]) -> Callable[[Program], Iterator[Broken]]:
    PARTS.append(make)
    return make


def some(places: list[Any]) -> list[Any]:
    return places if len(places) <= PLACES else [places[i * (len(places) - 1) // (PLACES - 1)] for i in range(PLACES)]


def parts(program: Program) -> list[str]:
    return some([key for key, weight in program.weights.items() if weight.rows is not None])


def with_rows(program: Program, key: str, rows: Rows, length: int | None = None) -> Program:
    weight = program.weights[key]
    spec = weight.spec if length is None else replace(weight.spec, shape=(length, *weight.spec.shape[1:]))
    return replace(program, weights={**program.weights, key: replace(weight, rows=rows, spec=spec)})


def calls(program: Program, target: Any, words: str) -> list[fx.Node]:
    return some([n for n in nodes_calling(program.graph, target) if words in n.name])


@part
def leave_a_gap(program: Program) -> Iterator[Broken]:
    for key in parts(program):
        rows = program.weights[key].rows
        assert rows is not None
        length = rows.stop - rows.start - 1
        if length:
            yield with_rows(program, key, replace(rows, start=rows.start + 1), length), "I3", "leaves rows"
            yield with_rows(program, key, replace(rows, stop=rows.stop - 1), length), "I3", "rows"


@part
def overlap(program: Program) -> Iterator[Broken]:
    for key in parts(program):
        rows = program.weights[key].rows
        assert rows is not None
        if rows.start:
            shifted = replace(rows, start=rows.start - 1, stop=rows.stop - 1)
            yield with_rows(program, key, shifted), "I3", "overlaps the part before it"


@part
def take_other_rows_than_there_are(program: Program) -> Iterator[Broken]:
    for key in parts(program):
        rows = program.weights[key].rows
        assert rows is not None
        yield with_rows(program, key, replace(rows, stop=rows.stop + 1)), "I3", "or they are no run of bytes"
        yield with_rows(program, key, replace(rows, of=rows.of + 1)), "I3", "weight"


@part
def exchange_two_parts(program: Program) -> Iterator[Broken]:
    """Their rows alone: both are as long, and each then computes the other's features."""
    for key in parts(program):
        for other, weight in program.weights.items():
            own = program.weights[key]
            if weight.name == own.name and weight.rows != own.rows and weight.spec.shape == own.spec.shape:
                changed = {**program.weights, key: replace(own, rows=weight.rows), other: replace(weight, rows=own.rows)}
                yield replace(program, weights=changed), "I5", "written elsewhere"
                break


@part
def write_features_elsewhere(program: Program) -> Iterator[Broken]:
    for node in calls(program, aten.slice.Tensor, "__into_"):
        edit = Edit(program)
        whole, dim, start, stop = edit[node].args
        edit[node].args = (whole, dim, start - 1, stop - 1) if start else (whole, dim, start + 1, stop + 1)  # type: ignore[operator]
        yield edit.program, "I5", "written elsewhere"


@part
def do_not_write_features(program: Program) -> Iterator[Broken]:
    for node in calls(program, aten.copy_.default, "__copied_"):
        edit = Edit(program)
        for free in [u for u in edit[node].users if u.target is ops.free]:
            free.args = tuple(a for a in free.args if a is not edit[node])
        edit.graph.erase_node(edit[node])
        yield edit.program, "I5", "is not put into one result"


@part
def write_features_of_another_part(program: Program) -> Iterator[Broken]:
    """Part 2 is computed with the weight of part 1, which has as many rows, where that is still there."""
    for node in calls(program, aten.linear.default, "__rows_2"):
        weight = node.args[1]
        before = program.node(node.name.replace("__rows_2", "__rows_1")).args[1]
        assert isinstance(weight, fx.Node)
        assert isinstance(before, fx.Node)
        if before.op == "placeholder" and "layer" in before.name:
            edit = Edit(program)
            edit[node].args = (edit[node].args[0], edit[before], *edit[node].args[2:])
            yield edit.program, "I5", "written elsewhere"


@part
def add_the_bias_of_another_part(program: Program) -> Iterator[Broken]:
    for node in calls(program, aten.slice.Tensor, "__bias_"):
        edit = Edit(program)
        bias, dim, start, stop = edit[node].args
        edit[node].args = (bias, dim, start - 1, stop - 1) if start else (bias, dim, start + 1, stop + 1)  # type: ignore[operator]
        yield edit.program, "I5", "are not parts of one call"


@part
def read_another_input(program: Program) -> Iterator[Broken]:
    for node in calls(program, aten.linear.default, "__rows_1"):
        edit = Edit(program)
        source = edit[node].args[0]
        other = edit.insert_before(node, aten.clone.default, source)
        other.meta["val"] = source.meta["val"]  # type: ignore[union-attr]
        edit[node].args = (other, *edit[node].args[1:])
        yield edit.program, "I5", "are not parts of one call"


@part
def read_the_result_too_early(program: Program) -> Iterator[Broken]:
    for node in calls(program, aten.copy_.default, "__copied_1"):
        edit = Edit(program)
        whole = node.args[0].args[0]  # type: ignore[union-attr]
        edit.insert_before(node, aten.sum.default, edit[whole])  # type: ignore[index]
        yield edit.program, "I5", "before all of it is written"


@part
def write_into_what_is_not_new(program: Program) -> Iterator[Broken]:
    for node in calls(program, aten.new_empty.default, "__whole"):
        edit = Edit(program)
        edit[node].target = aten.new_zeros.default
        yield edit.program, "I5", "is no part of a new result"


@part
def return_a_part_of_the_features(program: Program) -> Iterator[Broken]:
    for node in calls(program, aten.linear.default, "__rows_0"):
        edit = Edit(program)
        for free in [u for u in edit[node].users if u.target is ops.free]:
            free.args = tuple(a for a in free.args if a is not edit[node])
        edit[program.output].args = ([*edit[program.output].args[0], edit[node]],)  # type: ignore[misc]
        yield edit.program, "I5", "is not put into one result"


# Look-ups ------------------------------------------------------------------------------------------------------------


@part
def look_up_an_unknown_table(program: Program) -> Iterator[Broken]:
    (node,) = nodes_calling(program.graph, ops.lookup)
    edit = Edit(program)
    edit[node].args = ("other.weight", edit[node].args[1])
    yield edit.program, "I3", "other.weight, which the program does not have on the host"
    yield replace(program, tables={}), "I3", "which the program does not have on the host"
    table = next(iter(program.tables.values()))
    part = next(w for w in program.weights.values() if w.rows is not None)
    yield replace(program, tables={table.name: replace(part, name=table.name)}), "I3", "does not have on the host"


@part
def look_up_what_is_written(program: Program) -> Iterator[Broken]:
    tables = {name: replace(table, state=True) for name, table in program.tables.items()}
    yield replace(program, tables=tables), "I6", "which the program writes"


@part
def take_a_table_for_another(program: Program) -> Iterator[Broken]:
    for changes in ({"shape": (12, 9), "stride": (9, 1)}, {"dtype": torch.float64}):
        tables = {n: replace(t, spec=replace(t.spec, **changes)) for n, t in program.tables.items()}  # type: ignore[arg-type]
        yield replace(program, tables=tables), "I1", "takes it for something else"


@part
def look_up_what_are_no_indices(program: Program) -> Iterator[Broken]:
    (node,) = nodes_calling(program.graph, ops.lookup)
    for target, invariant, words in ((aten.isfinite.default, "I3", "no indices"), (None, "I3", "no indices")):
        edit = Edit(program)
        indices = edit[node].args[1]
        edit[node].args = (edit[node].args[0], 5 if target is None else edit.insert_before(node, target, indices))
        yield edit.program, invariant, words


@part
def look_up_freed_indices(program: Program) -> Iterator[Broken]:
    (node,) = nodes_calling(program.graph, ops.lookup)
    edit = Edit(program)
    indices = edit.insert_before(node, aten.clone.default, edit[node].args[1])
    edit[node].args = (edit[node].args[0], indices)
    with edit.graph.inserting_after(indices):
        edit.graph.call_function(ops.free, (indices,))
    yield edit.program, "I4", "used after it was freed"


@part
def keep_a_table_that_nobody_reads(program: Program) -> Iterator[Broken]:
    table, layout = next(iter(program.tables.values())), layout_of(program)
    slot = Slot("w_unread", layout.resident_bytes, table.nbytes)
    changed = with_layout(program, resident=(*layout.resident, slot), resident_bytes=layout.resident_bytes + 512)
    yield replace(changed, weights={**program.weights, "w_unread": table}), "I3", "where nothing reads it"


@pytest.mark.parametrize("make", PARTS, ids=lambda make: make.__name__)
def test_a_broken_program_is_refused(make: Callable[[Program], Iterator[Broken]]) -> None:
    places = 0
    for p in plans():
        for broken, invariant, words in make(p.emitted):
            places += 1
            with pytest.raises(CheckError) as caught:
                check_plan(broken, AMPLE)
            first, *around = str(caught.value).splitlines()
            assert first.startswith(f"{invariant}: "), first
            assert words in first
            assert sum(line.startswith("  > ") for line in around) == 1
    assert places


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if "seam" not in m.modes], ids=lambda m: m.name)
def test_what_breaks_any_program_breaks_these(mutation: Mutation) -> None:
    _, streamed = plans()
    for p in (streamed,) if "arena" not in mutation.modes or "allocator" in mutation.modes else ():
        for make in some(list(mutation.make(p.emitted))):
            broken, words = make()
            with pytest.raises(CheckError) as caught:
                check_plan(broken, AMPLE)
            first = str(caught.value).splitlines()[0]
            assert first[:2] in mutation.invariants
            assert any(word in first for word in words), f"{first!r} has none of {words}"


def test_what_a_look_up_gives_is_counted() -> None:
    program = plans()[0].emitted
    (node,) = nodes_calling(program.graph, ops.lookup)
    edit = Edit(program)
    again = edit.insert_after(node, ops.lookup, *edit[node].args)
    again.meta["val"] = node.meta["val"]
    assert (
        check_plan(edit.program, AMPLE).live_bytes[again.name] == check_plan(program, AMPLE).live_bytes[node.name] + 4 * 8 * 4
    )


def test_good_programs_pass_with_their_own_peak() -> None:
    for p in plans():
        assert check_plan(p.emitted, p.proof.peak_bytes) == p.proof
        assert any(n.target is operator.getitem for n in p.emitted.ops()) == bool(p.layout.bundles)
