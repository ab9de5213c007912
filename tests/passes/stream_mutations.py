"""Ways to break how weights are copied, arrive and are evicted, within a call and over the seam of two calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from itertools import pairwise

from torch import fx

from passes.program import Program
from runtime import ops
from runtime.layout import Bundle
from tests.passes.mutations import (
    SEAM,
    Broken,
    Edit,
    Register,
    detach,
    last_reader,
    layout_of,
    of_bundle,
    with_bundle,
)
from tests.passes.programs import nodes_calling

mutation = Register()


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
