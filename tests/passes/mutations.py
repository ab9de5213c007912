"""Ways to break an emitted program: each says where it can be applied, and what the checker must then say."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from passes.program import Program
from runtime import ops
from runtime.layout import Bundle, Layout, Slot
from tests.passes.programs import Mode, nodes_calling

aten = torch.ops.aten

# A broken program, and words of which the error's first line has at least one.
Broken = tuple[Program, tuple[str, ...]]


@dataclass(frozen=True)
class Mutation:
    """`make` yields one broken program per place; `invariants` are those of which the checker must cite one."""

    name: str
    invariants: tuple[str, ...]
    make: Callable[[Program], Iterator[Callable[[], Broken]]]
    modes: tuple[Mode, ...] = ("arena", "allocator")


MUTATIONS: list[Mutation] = []


SEAM: tuple[Mode, ...] = ("seam", "seam in an arena")


def mutation(
    *invariants: str, arena_only: bool = False, modes: tuple[Mode, ...] = ()
) -> Callable[[Callable[[Program], Any]], Callable[[Program], Any]]:
    """Registers a generator of functions that each make one broken program."""

    def register(make: Callable[[Program], Any]) -> Callable[[Program], Any]:
        usual: tuple[Mode, ...] = ("arena",) if arena_only else ("arena", "allocator")
        MUTATIONS.append(Mutation(make.__name__, invariants, make, modes or usual))
        return make

    return register


class Edit:
    """A private copy of a program to break: nodes by name, bundles by index."""

    def __init__(self, program: Program) -> None:
        self.original = program
        self.graph = program.copy_graph()
        self.nodes = {node.name: node for node in self.graph.nodes}

    def __getitem__(self, node: fx.Node) -> fx.Node:
        return self.nodes[node.name]

    @property
    def program(self) -> Program:
        return replace(self.original, graph=self.graph)

    def insert_after(self, node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        with self.graph.inserting_after(self[node]):
            return self.graph.call_function(target, args)

    def insert_before(self, node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        with self.graph.inserting_before(self[node]):
            return self.graph.call_function(target, args)


def layout_of(program: Program) -> Layout:
    assert program.layout is not None
    return program.layout


def with_layout(program: Program, **changes: Any) -> Program:
    return replace(program, layout=replace(layout_of(program), **changes))


def with_bundle(program: Program, index: int, **changes: Any) -> Program:
    bundles = list(layout_of(program).bundles)
    bundles[index] = replace(bundles[index], **changes)
    return with_layout(program, bundles=tuple(bundles))


def of_bundle(program: Program, target: Callable[..., Any], index: int) -> fx.Node:
    """The prefetch, onload or evict of a bundle."""
    return next(node for node in nodes_calling(program.graph, target) if node.args[0] == index)


def members(onload: fx.Node) -> list[fx.Node]:
    """The arrived weights of an onload."""
    return [user for user in onload.users if user.target is operator.getitem]


def last_reader(program: Program, index: int) -> fx.Node:
    """The last operator that takes a weight of the bundle itself."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    users = [u for m in members(of_bundle(program, ops.onload, index)) for u in m.users if u.target is not ops.free]
    return max(users, key=order.__getitem__)


def detach(node: fx.Node) -> None:
    """Takes a node out of the program although others use it."""
    node._remove_from_list()


def concurrent(program: Program) -> list[tuple[Bundle, Bundle]]:
    """Pairs of bundles that are staged at the same time."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    spans = [
        (bundle, order[of_bundle(program, ops.prefetch, bundle.index)], order[of_bundle(program, ops.evict, bundle.index)])
        for bundle in layout_of(program).bundles
    ]
    return [(a, b) for a, start, stop in spans for b, first, last in spans if start < first < stop and a is not b]


# The stream ----------------------------------------------------------------------------------------------------------


@mutation("I3")
def drop_a_prefetch(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.prefetch):

        def broken(node: fx.Node = node) -> Broken:
            edit = Edit(program)
            detach(edit[node])
            return edit.program, (f"bundle {node.args[0]} is used before it is copied",)

        yield broken


@mutation("I3")
def drop_an_onload(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.onload):

        def broken(node: fx.Node = node) -> Broken:
            edit = Edit(program)
            detach(edit[node])
            return edit.program, (f"{node.name} is used before it exists",)

        yield broken


@mutation("I3")
def read_a_weight_before_its_onload(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.onload):

        def broken(node: fx.Node = node) -> Broken:
            edit = Edit(program)
            edit[last_reader(program, int(node.args[0]))].append(edit[node])  # type: ignore[arg-type]
            return edit.program, (f"{node.name} is used before it exists",)

        yield broken


@mutation("I4", "I2")
def drop_an_evict(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.evict):

        def broken(node: fx.Node = node) -> Broken:
            edit = Edit(program)
            detach(edit[node])
            index = node.args[0]
            return edit.program, (
                f"bundles [{index}] are never evicted",
                f"over bundle {index}, which is still in use",
            )

        yield broken


@mutation("I3")
def duplicate_an_evict(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.evict):

        def broken(node: fx.Node = node) -> Broken:
            edit = Edit(program)
            edit.insert_after(node, ops.evict, node.args[0])
            return edit.program, (f"bundle {node.args[0]} is evicted before it was onloaded, or twice",)

        yield broken


@mutation("I3")
def evict_before_the_last_use(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.evict):

        def broken(node: fx.Node = node) -> Broken:
            edit = Edit(program)
            edit[last_reader(program, int(node.args[0]))].prepend(edit[node])  # type: ignore[arg-type]
            return edit.program, (f"is read after bundle {node.args[0]} was evicted",)

        yield broken


@mutation("I3")
def evict_before_the_onload(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.evict):

        def broken(node: fx.Node = node) -> Broken:
            edit = Edit(program)
            edit[of_bundle(program, ops.onload, int(node.args[0]))].prepend(edit[node])  # type: ignore[arg-type]
            return edit.program, (f"bundle {node.args[0]} is evicted before it was onloaded, or twice",)

        yield broken


@mutation("I3")
def prefetch_after_the_onload(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.prefetch):

        def broken(node: fx.Node = node) -> Broken:
            edit = Edit(program)
            edit[of_bundle(program, ops.onload, int(node.args[0]))].append(edit[node])  # type: ignore[arg-type]
            return edit.program, (f"bundle {node.args[0]} is used before it is copied",)

        yield broken


@mutation("I4")
def prefetch_twice(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.prefetch):

        def broken(node: fx.Node = node) -> Broken:
            edit = Edit(program)
            edit.insert_after(node, ops.prefetch, *node.args)
            return edit.program, (f"bundle {node.args[0]} is copied twice",)

        yield broken


@mutation("I2", arena_only=True)
def refill_bytes_still_in_use(program: Program) -> Iterator[Callable[[], Broken]]:
    bundles = layout_of(program).bundles
    for node in nodes_calling(program.graph, ops.prefetch):
        for other in bundles:
            if other.index >= node.args[0] or not _share_bytes(other, bundles[node.args[0]]):  # type: ignore[operator,index]
                continue

            def broken(node: fx.Node = node, other: int = other.index) -> Broken:
                edit = Edit(program)
                edit[of_bundle(program, ops.evict, other)].prepend(edit[node])
                return edit.program, (f"bundle {node.args[0]} is copied over bundle",)

            yield broken


def _share_bytes(a: Bundle, b: Bundle) -> bool:
    assert a.offset is not None
    assert b.offset is not None
    return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


@mutation("I2", "I4")
def say_that_a_bundle_comes_over_the_seam(program: Program) -> Iterator[Callable[[], Broken]]:
    for bundle in layout_of(program).bundles:
        changed = with_bundle(program, bundle.index, carried=True)
        words = (f"bundle {bundle.index} is copied twice", f"over bundle {bundle.index}, which is still in use")
        yield lambda changed=changed, words=words: (changed, words)


@mutation("I3")
def copy_an_unknown_bundle(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, ops.prefetch):
        for index in (-1, len(layout_of(program).bundles)):

            def broken(node: fx.Node = node, index: int = index) -> Broken:
                edit = Edit(program)
                edit[node].args = (index,)
                return edit.program, (f"bundle {index} is copied, and the layout has no such bundle",)

            yield broken


@mutation("I3")
def take_a_member_that_is_not_there(program: Program) -> Iterator[Callable[[], Broken]]:
    for node in nodes_calling(program.graph, operator.getitem):
        for index in (-1, 99):

            def broken(node: fx.Node = node, index: int = index) -> Broken:
                edit = Edit(program)
                edit[node].args = (edit[node].args[0], index)
                return edit.program, (f"{node.name} is member {index} of",)

            yield broken


# The seam ------------------------------------------------------------------------------------------------------------


def _carried(program: Program) -> list[Bundle]:
    return [bundle for bundle in layout_of(program).bundles if bundle.carried]


@mutation("I3", modes=SEAM)
def leave_the_next_call_without_a_bundle(program: Program) -> Iterator[Callable[[], Broken]]:
    for bundle in _carried(program):

        def broken(index: int = bundle.index) -> Broken:
            edit = Edit(program)
            detach(edit[of_bundle(program, ops.prefetch, index)])
            return edit.program, (f"bundles [{index}] are used by the next call before they are copied",)

        yield broken


@mutation("I4", modes=SEAM)
def prefetch_for_the_next_call_before_the_evict(program: Program) -> Iterator[Callable[[], Broken]]:
    for bundle in _carried(program):

        def broken(index: int = bundle.index) -> Broken:
            edit = Edit(program)
            edit[of_bundle(program, ops.evict, index)].prepend(edit[of_bundle(program, ops.prefetch, index)])
            return edit.program, (f"bundle {index} is copied twice",)

        yield broken


@mutation("I3", modes=SEAM)
def say_that_nothing_comes_over_the_seam(program: Program) -> Iterator[Callable[[], Broken]]:
    for bundle in _carried(program):
        index = bundle.index
        changed = with_bundle(program, index, carried=False)
        yield lambda changed=changed, index=index: (changed, (f"bundle {index} is used before it is copied",))


@mutation("I2", modes=("seam in an arena",))
def overlap_what_comes_over_the_seam(program: Program) -> Iterator[Callable[[], Broken]]:
    carried = _carried(program)
    for a, b in pairwise(carried):
        assert a.offset is not None
        if a.offset + b.nbytes <= layout_of(program).staging_bytes:
            changed = with_bundle(program, b.index, offset=a.offset)
            yield lambda changed=changed: (changed, ("come over the seam in the same bytes", "is copied over bundle"))


# The layout ----------------------------------------------------------------------------------------------------------


@mutation("I2", "I4", arena_only=True)
def overlap_two_bundles(program: Program) -> Iterator[Callable[[], Broken]]:
    for a, b in concurrent(program):

        def broken(a: Bundle = a, b: Bundle = b) -> Broken:
            fits = a.offset is not None and a.offset + b.nbytes <= layout_of(program).staging_bytes
            changed = with_bundle(program, b.index, offset=a.offset) if fits else with_bundle(program, a.index, offset=b.offset)
            return changed, ("bundle",)

        yield broken


@mutation("I2", arena_only=True)
def push_a_bundle_out_of_the_arena(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    for bundle in layout.bundles:
        for offset in (layout.staging_bytes - bundle.nbytes + layout.alignment, -layout.alignment):

            def broken(bundle: Bundle = bundle, offset: int = offset) -> Broken:
                changed = with_bundle(program, bundle.index, offset=offset)
                return changed, (f"bundle {bundle.index} ends outside the staging arena",)

            yield broken


@mutation("I2", arena_only=True)
def shrink_the_staging_arena(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    for nbytes in (layout.staging_bytes - 1, layout.staging_bytes // 2, 0):
        yield lambda nbytes=nbytes: (with_layout(program, staging_bytes=nbytes), ("ends outside the staging arena",))


@mutation("I2")
def shrink_a_bundle(program: Program) -> Iterator[Callable[[], Broken]]:
    for bundle in layout_of(program).bundles:
        nbytes = max(s.offset + s.nbytes for s in bundle.slots) - 1
        changed = with_bundle(program, bundle.index, nbytes=nbytes)
        yield lambda changed=changed, bundle=bundle: (changed, (f"the weights of bundle {bundle.index} end 1 B behind it",))


@mutation("I3")
def exchange_two_bundles(program: Program) -> Iterator[Callable[[], Broken]]:
    first, second, *rest = layout_of(program).bundles
    yield lambda: (with_layout(program, bundles=(second, first, *rest)), ("bundle 1 is listed as number 0",))


def _slots(program: Program) -> list[tuple[tuple[Slot, ...], Callable[[tuple[Slot, ...]], Program]]]:
    """The resident slots and those of every bundle, with how to put others in their place."""
    places: list[tuple[tuple[Slot, ...], Callable[[tuple[Slot, ...]], Program]]] = [
        (layout_of(program).resident, lambda slots: with_layout(program, resident=slots))
    ]
    for bundle in layout_of(program).bundles:
        places.append((bundle.slots, lambda slots, index=bundle.index: with_bundle(program, index, slots=slots)))  # type: ignore[misc]
    return places


def _exchange(slots: tuple[Slot, ...], index: int, **changes: Any) -> tuple[Slot, ...]:
    return (*slots[:index], replace(slots[index], **changes), *slots[index + 1 :])


@mutation("I2")
def overlap_two_slots(program: Program) -> Iterator[Callable[[], Broken]]:
    for slots, put in _slots(program):
        for index in range(1, len(slots)):
            before = slots[index - 1]
            changed = put(_exchange(slots, index, offset=before.offset))
            names = before.weight, slots[index].weight
            yield lambda changed=changed, names=names: (changed, tuple(f"{n} overlaps the weight before it" for n in names))


@mutation("I3")
def misalign_a_slot(program: Program) -> Iterator[Callable[[], Broken]]:
    for slots, put in _slots(program):
        for index, slot in enumerate(slots):
            changed = put(_exchange(slots, index, offset=slot.offset + 4))
            yield lambda changed=changed, slot=slot: (changed, (f"{slot.weight} is not aligned to 64 B",))


@mutation("I3", arena_only=True)
def misalign_a_bundle(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    for bundle in layout.bundles:
        assert bundle.offset is not None
        if bundle.offset + bundle.nbytes + 4 <= layout.staging_bytes:
            changed = with_bundle(program, bundle.index, offset=bundle.offset + 4)
            yield lambda changed=changed, bundle=bundle: (changed, (f"bundle {bundle.index} is not aligned to 64 B",))


@mutation("I3")
def shrink_a_slot(program: Program) -> Iterator[Callable[[], Broken]]:
    state = layout_of(program).state
    for slots, put in [*_slots(program), (state, lambda slots: with_layout(program, state=slots))]:
        for index, slot in enumerate(slots):
            if slot.nbytes:
                changed = put(_exchange(slots, index, nbytes=slot.nbytes - 1))
                yield lambda changed=changed, slot=slot: (changed, (f"{slot.weight} does not fit its slot",))


@mutation("I2")
def shrink_the_resident_arena(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    if layout.resident:
        for nbytes in (layout.resident_bytes - layout.alignment, 0):
            changed = with_layout(program, resident_bytes=nbytes)
            yield lambda changed=changed: (changed, ("the weights of the resident arena end",))


@mutation("I3")
def forget_a_resident(program: Program) -> Iterator[Callable[[], Broken]]:
    resident = layout_of(program).resident
    for slot in resident:
        changed = with_layout(program, resident=tuple(s for s in resident if s is not slot))
        yield lambda changed=changed, slot=slot: (changed, (f"{slot.weight} is read but neither resident nor onloaded",))


@mutation("I2")
def give_a_weight_two_homes(program: Program) -> Iterator[Callable[[], Broken]]:
    layout = layout_of(program)
    for slot in (*layout.resident, *(s for b in layout.bundles for s in b.slots)):
        again = replace(slot, offset=layout.resident_bytes)
        changed = with_layout(program, resident=(*layout.resident, again), resident_bytes=layout.resident_bytes + slot.nbytes)
        yield lambda changed=changed: (changed, ("a weight has two homes",))


# Values --------------------------------------------------------------------------------------------------------------


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
