"""What ways to break an emitted program are made of: each says where it can be applied, and what the checker must then say."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from passes.program import Program
from runtime import ops
from runtime.layout import Bundle, Layout
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


SEAM: tuple[Mode, ...] = ("seam", "seam in an arena")


class Register:
    """Decorates generators of functions that each make one broken program: `found` has the mutations made of them."""

    def __init__(self) -> None:
        self.found: list[Mutation] = []

    def __call__(
        self, *invariants: str, arena_only: bool = False, modes: tuple[Mode, ...] = ()
    ) -> Callable[[Callable[[Program], Any]], Callable[[Program], Any]]:
        def register(make: Callable[[Program], Any]) -> Callable[[Program], Any]:
            usual: tuple[Mode, ...] = ("arena",) if arena_only else ("arena", "allocator")
            self.found.append(Mutation(make.__name__, invariants, make, modes or usual))
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


def without_frees(edit: Edit, name: str) -> None:
    """Nothing frees a value any more: it is read where it would have been freed."""
    for node in nodes_calling(edit.graph, ops.free):
        node.args = tuple(value for value in node.args if value.name != name)  # type: ignore[union-attr]
        if not node.args:
            edit.graph.erase_node(node)
