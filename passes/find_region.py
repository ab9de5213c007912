"""How a region is found: dimensions spread over a stretch of operators from one value from before, see `passes.regions`."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import fx

from passes.program import storage_id, tensors_of
from passes.regions import Calls, Region, is_view, writer_of
from passes.tile_rules import Untileable


def find_region(stretch: Sequence[fx.Node], seed: fx.Node, dim: int, calls: Calls, hosted: Collection[fx.Node] = ()) -> Region:
    """The region of a stretch of operators in program order, cut along dimension `dim` of `seed`, which comes from before it.

    `hosted` values live on the host and are never read whole.

    Raises:
        Untileable: nothing in the stretch can be cut so.
    """
    for node in stretch:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise Untileable(f"{node.name} writes to its argument")
    inside = set(stretch)
    if seed in inside:
        raise Untileable(f"{seed.name} does not come from before the region")
    forced: set[fx.Node] = set()
    outer, pulled = {seed: dim}, dict[fx.Node, int]()
    while True:
        spread = _Spread(stretch, outer, calls, forced, hosted, pulled)
        more = spread.demanded - forced
        wanted = {n: d for n, d in spread.outer.items() if n in inside and n not in spread.dims and n not in forced | more}
        if not more and wanted.keys() <= pulled.keys():
            break
        pulled |= wanted
        forced |= _with_ancestors(more, inside)
        outer |= {node: spread.dims[node] for node in forced if node in spread.dims}  # where others of their readers cut them
    tiled = {n for n in stretch if n in spread.dims}
    merged = {n: d for n, d in spread.merged.items() if any(a in tiled for a in calls.arguments(n))}
    nodes = tuple(n for n in stretch if n in tiled)
    results = tuple(n for n in nodes if isinstance(n.meta["val"], torch.Tensor) and any(u not in inside for u in n.users))
    if any(not isinstance(n.meta["val"], torch.Tensor) and any(u not in inside for u in n.users) for n in nodes):
        raise Untileable("the region ends between an operator and the members of its result")
    if not results and not merged:
        raise Untileable("nothing can be cut along this dimension")
    _refuse_two_names(results)
    whole = tuple(n for n in stretch if n not in tiled and n not in merged)
    if any(n in hosted for node in whole for n in node.all_input_nodes):
        raise Untileable("something reads a value that lives on the host as a whole")
    ordered = tuple(n for n in stretch if n in tiled or n in merged)
    return Region(calls, nodes, spread.dims, merged, whole, results, ordered)


class _Spread:
    """One pass over the stretch: dimensions by value, and the values that something reads whole."""

    def __init__(
        self,
        stretch: Sequence[fx.Node],
        outer: Mapping[fx.Node, int],
        calls: Calls,
        forced: set[fx.Node],
        hosted: Collection[fx.Node],
        pulled: Mapping[fx.Node, int],
    ) -> None:
        self.dims: dict[fx.Node, int] = {}
        self.merged: dict[fx.Node, int] = {}
        self.demanded: set[fx.Node] = set()
        self._calls, self._hosted, self._pulled, self._inside = calls, hosted, pulled, set(stretch)
        # Dimensions of values from before the loop: where a reader of only such values is cut, follows from them.
        self.outer = dict(outer)
        for node in stretch:
            if node in forced or not self._cut(node):
                self.demanded |= {n for n in node.all_input_nodes if n in self.dims or n in self.merged}

    def _cut(self, node: fx.Node) -> bool:
        """Gives the node a dimension; False where it has to run whole."""
        if node.target is operator.getitem:
            source = node.args[0]
            for known in (self.dims, self.outer):
                if source in known:
                    known[node] = known[source]  # type: ignore[index]
            return source in self.dims
        if not isinstance(node.target, torch._ops.OpOverload) or any(n in self.merged for n in node.all_input_nodes):
            return False
        arguments = self._calls.arguments(node)
        inner = [n for n in arguments if n in self.dims]
        if not inner and not any(n in self.outer for n in arguments):
            return self._pull(node, arguments)
        best: tuple[int, int] | None = None
        had = [(self.dims.get(a), self.outer.get(a)) for a in arguments]
        for dim in range(max((t.dim() for t in tensors_of(node)), default=0)):
            whole = self._whole(node, had, dim)
            if whole is not None and (best is None or whole < best[0]):
                best = whole, dim
        if not inner and is_view(node) and not any(n in self._hosted for n in arguments):
            if best is not None:  # it costs nothing, and is cut where it is read
                self.outer[node] = best[1]
            return False
        if best is None:
            return self._merge(node, arguments)
        self.dims[node] = best[1]
        for argument, cut in zip(arguments, self._calls.dims(node, best[1]), strict=True):
            if cut is None and argument in self.dims:
                self.demanded.add(argument)
            elif cut is not None and argument not in self.dims:
                self.outer.setdefault(argument, cut)
        return True

    def _pull(self, node: fx.Node, arguments: Sequence[fx.Node]) -> bool:
        """Whether what reads the result in parts has it computed so, from parts of what nothing else has cut."""
        if node not in self._pulled or (is_view(node) and not any(n in self._inside for n in arguments)):
            return False
        try:
            cuts = self._calls.dims(node, self._pulled[node])
        except Untileable:
            return False
        if all(cut is None for cut in cuts):
            return False
        self.dims[node] = self._pulled[node]
        self.outer |= {n: cut for n, cut in zip(arguments, cuts, strict=True) if cut is not None}
        return True

    def _whole(self, node: fx.Node, had: Sequence[tuple[int | None, int | None]], dim: int) -> int | None:
        """How many inner values a cut along `dim` reads whole; None where it does not fit how they are cut.

        `had`: for each argument how it is cut inside, and outside.
        """
        try:
            cuts = self._calls.dims(node, dim)
        except Untileable:
            return None
        whole, fits = 0, False
        for (inner, outer), cut in zip(had, cuts, strict=True):
            if cut is None:
                whole += inner is not None
            elif cut == (outer if inner is None else inner):
                fits = True
            elif inner is not None:
                return None
        return whole if fits else None

    def _merge(self, node: fx.Node, arguments: Sequence[fx.Node]) -> bool:
        """Whether the result can be merged from parts of its first argument."""
        if not arguments or arguments[0] not in self.dims:
            return False
        dim = self.dims[arguments[0]]
        try:
            cuts = self._calls.merges(node, dim)
        except Untileable:
            return False
        if any(a in self.dims and cut != self.dims[a] for a, cut in zip(arguments, cuts, strict=True)):
            return False
        self.merged[node] = dim
        return True


def _with_ancestors(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node in found or node not in inside:
            continue
        found.add(node)
        queue.extend(node.all_input_nodes)
    return found


def _refuse_two_names(results: Sequence[fx.Node]) -> None:
    """Results have each a memory of their own, so what is written to one of them later would not be in the others."""
    names: dict[int, fx.Node] = {}
    for node in results:
        other = names.setdefault(storage_id(node.meta["val"]), node)
        if other is not node and (writer := writer_of(node)) is not None:
            raise Untileable(f"{writer.name} writes to {other.name}, of which {node.name} is another name")
