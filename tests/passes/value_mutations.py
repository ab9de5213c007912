"""Ways to break what is freed, written and returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import fx

from passes.program import Program
from runtime import ops
from runtime.layout import Slot
from tests.passes.mutations import Broken, Edit, Register, layout_of, members, with_layout
from tests.passes.programs import nodes_calling

aten = torch.ops.aten

mutation = Register()


def _frees(program: Program) -> list[fx.Node]:
    return [node for node in nodes_calling(program.graph, ops.free) if node.args]


@mutation("I4")
def free_too_early(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in _frees(program):

        def broken(node: fx.Node = node) -> Broken:
            edit = Edit(program)
            edit[node].prev.prepend(edit[node])
            words = [f"{v} is used after it was freed" for v in node.args] + [
                f"{v} is freed twice or before" for v in node.args
            ]
            return edit.program, tuple(words)

        yield broken


@mutation("I4")
def free_twice(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in _frees(program):
        words = tuple(f"{v} is freed twice" for v in node.args)

        def later(node: fx.Node = node, words: tuple[str, ...] = words) -> Broken:
            edit = Edit(program)
            edit.insert_after(node, ops.free, *edit[node].args)
            return edit.program, words

        def at_once(node: fx.Node = node, words: tuple[str, ...] = words) -> Broken:
            edit = Edit(program)
            edit[node].args = (*edit[node].args, edit[node].args[0])
            return edit.program, words

        yield later
        yield at_once


@mutation("I4")
def free_an_output(program: Program) -> Iterator[Callable[[], Broken]]:
    for value in program.output.all_input_nodes:

        def broken(value: fx.Node = value) -> Broken:
            edit = Edit(program)
            edit.insert_before(program.output, ops.free, edit[value])
            return edit.program, (f"{value.name} is used after it was freed",)

        yield broken


@mutation("I4")
def free_an_input_or_a_weight(program: Program) -> Iterator[Callable[[], Broken]]:
    for value in program.graph.nodes:
        if value.op == "placeholder":

            def broken(value: fx.Node = value) -> Broken:
                edit = Edit(program)
                edit.insert_before(program.output, ops.free, edit[value])
                return edit.program, (f"{value.name} belongs to the caller or the arena and cannot be freed",)

            yield broken


@mutation("I6")
def write_a_resident_weight(program: Program) -> Iterator[Callable[[], Broken]]:
    for slot in layout_of(program).resident:

        def broken(slot: Slot = slot) -> Broken:
            edit = Edit(program)
            node = edit.insert_before(program.output, aten.zero_.default, edit.nodes[slot.weight])
            return edit.program, (f"{node.name} writes {slot.weight}, which is not state",)

        yield broken


@mutation("I6")
def write_a_streamed_weight_through_a_view(program: Program) -> Iterator[Callable[[], Broken]]:
    for onload in nodes_calling(program.graph, ops.onload):
        for member in members(onload):

            def broken(member: fx.Node = member) -> Broken:
                edit = Edit(program)
                node = edit.insert_after(member, aten.zero_.default)
                node.args = (edit.insert_after(member, aten.alias.default, edit[member]),)
                return edit.program, (f"{node.name} writes {member.name.removesuffix('_again')}, which is not state",)

            yield broken


@mutation("I6")
def drop_state_from_the_layout(program: Program) -> Iterator[Callable[[], Broken]]:
    state = layout_of(program).state
    for slot in state:
        changed = with_layout(program, state=tuple(s for s in state if s is not slot))
        yield lambda changed=changed: (changed, ("state and only state must have memory of its own",))


@mutation("I6")
def keep_state_in_the_arena(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    for slot in layout.state:
        own = replace(slot, offset=layout.resident_bytes)
        changed = with_layout(
            program,
            state=tuple(s for s in layout.state if s is not slot),
            resident=(*layout.resident, own),
            resident_bytes=layout.resident_bytes + slot.nbytes,
        )
        weights = {**program.weights, slot.weight: replace(program.weights[slot.weight], state=False)}
        changed = replace(changed, weights=weights)
        yield lambda changed=changed, slot=slot: (changed, (f"writes {slot.weight}, which is not state",))


@mutation("I4")
def return_a_resident_weight(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    for slot in (*layout.resident, *layout.state):

        def broken(slot: Slot = slot) -> Broken:
            edit = Edit(program)
            edit[program.output].args = ([*edit[program.output].args[0], edit.nodes[slot.weight]],)  # type: ignore[misc]
            return edit.program, (f"the output {slot.weight} lives in an arena, which the next call refills",)

        yield broken


@mutation("I4", "I3")
def return_a_streamed_weight(program: Program) -> Iterator[Callable[[], Broken]]:
    for onload in nodes_calling(program.graph, ops.onload):
        for member in members(onload):

            def broken(member: fx.Node = member) -> Broken:
                edit = Edit(program)
                for free in [u for u in edit[member].users if u.target is ops.free]:
                    free.args = tuple(a for a in free.args if a is not edit[member])
                edit[program.output].args = ([*edit[program.output].args[0], edit[member]],)  # type: ignore[misc]
                return edit.program, (f"{member.name} is read after bundle",)

            yield broken
