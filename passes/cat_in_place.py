"""Joined values are written part by part, as the parts come, so that these end early.

before:  a = f(x); b = g(x); y = cat([a, b], 1)
after:   a = f(x); y_buffer = empty_strided(...); y = alias(y_buffer); copy_(slice(y, 1, 0, 4), a)
         b = g(x); copy_(slice(y, 1, 4, 8), b)

The same bytes are moved, by as many copies as there are parts. The result lives longer than before, from the first copy on; so
this is worth it only where it lowers a peak, and which joins those are is found by trying (`joins_in_place`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.buffers import empty_strided
from passes.fakes import is_dense
from passes.liveness import analyse_liveness
from passes.loop import loop_of
from passes.mark_state import written_nodes
from passes.probe import Prober
from passes.program import Bytes, Program, is_symbolic, storage_bytes, storage_id, tensors_of
from passes.refresh_values import carry_on, value_of
from passes.visits import weight_visits
from runtime.errors import PlanFileError

aten = torch.ops.aten


@dataclass(frozen=True)
class Join:
    """A `cat` whose parts are copied as they come; `late`: not before the last of them is about to be made."""

    name: str
    late: bool = False


@dataclass(frozen=True)
class CatInPlace:
    """`joins`: in the order in which they are rewritten.

    Requires: everything else that rewrites operators is done. Ensures: the same values bit for bit (I5).
    Raises: PlanFileError, where a join cannot be written so.
    """

    joins: tuple[Join, ...]
    name: str = "cat_in_place"

    def apply(self, program: Program) -> Program:
        program = program.with_graph(program.copy_graph())
        for join in self.joins:
            node = next((node for node in program.ops() if node.name == join.name), None)
            if node is None or not _is_joined(node):
                raise PlanFileError(f"{join.name!r} joins nothing part by part; plan the model again")
            _Joiner(program.graph, node).rewrite(join.late)
        return program


def joins_in_place(
    program: Program,
    prober: Prober,
    round_bytes: Callable[[Bytes], Bytes] = lambda n: n,
    weight_bytes: Mapping[str, int] | None = None,
) -> tuple[Join, ...]:
    """The joins at which most is live, of those that need less part by part while nowhere more is needed than is anyway.

    What counts is both the most activation bytes and the most of activations with an operator's own weights, as the first is
    what a program with all its weights on the device needs and the second what it needs without. None where sizes are symbols.

    Args:
        program: canonical, or tiled.
        prober: of the device.
        round_bytes: what its allocator takes for an activation.
        weight_bytes: what it takes for each weight that may be away, by placeholder; their own size where that is not given.
    """
    if not any(_is_joined(node) for node in program.ops()) or any(is_symbolic(node) for node in program.graph.nodes):
        return ()
    own = {key: w.nbytes for key, w in program.weights.items()} if weight_bytes is None else weight_bytes
    joins: list[Join] = []
    need = _Need.of(program, prober, round_bytes, own)
    while True:
        options = []
        for join in (Join(name, late) for name in need.joined for late in (True, False)):
            changed = CatInPlace((join,)).apply(program)
            options.append((_Need.of(changed, prober, round_bytes, own), join, changed))
        options = [option for option in options if option[0].is_less_than(need)]
        if not options:
            return tuple(joins)
        need, join, program = min(options, key=lambda option: option[0].peaks)
        joins.append(join)


@dataclass(frozen=True)
class _Need:
    """What a program needs: `peaks`, each with the number of operators that have it, and which joins are among those."""

    peaks: tuple[tuple[Bytes, int], ...]
    joined: tuple[str, ...]

    @classmethod
    def of(
        cls, program: Program, prober: Prober, round_bytes: Callable[[Bytes], Bytes], weight_bytes: Mapping[str, int]
    ) -> _Need:
        liveness = analyse_liveness(program, prober, round_bytes)
        own = [0] * len(liveness.nodes)
        for visit in weight_visits(program):
            for position in range(visit.first, visit.last + 1):
                own[position] += weight_bytes.get(visit.weight, 0)
        peaks: list[tuple[Bytes, int]] = []
        joined: dict[str, None] = {}
        for needs in (liveness.bytes_at, [live + weights for live, weights in zip(liveness.bytes_at, own, strict=True)]):
            most = max(needs)
            there = [node for node, nbytes in zip(liveness.nodes, needs, strict=True) if nbytes == most]
            peaks.append((most, len(there)))
            joined |= {node.name: None for node in there if _is_joined(node)}
        return cls(tuple(peaks), tuple(joined))

    def is_less_than(self, other: _Need) -> bool:
        """Whether no peak is higher, and one is lower, or as high at fewer operators."""
        pairs = list(zip(self.peaks, other.peaks, strict=True))
        return all(mine <= its for mine, its in pairs) and any(mine < its for mine, its in pairs)


def _is_joined(node: fx.Node) -> bool:
    """Whether a node joins several parts of its own dtype and rank along one dimension, into memory without gaps."""
    value = node.meta.get("val")
    if node.target is not aten.cat.default or not isinstance(value, torch.Tensor) or is_symbolic(node):
        return False
    parts: Any = node.args[0]
    values = [part.meta.get("val") if isinstance(part, fx.Node) else None for part in parts]
    if len(values) < 2 or value.storage_offset() or storage_bytes(value) != value.numel() * value.dtype.itemsize:
        return False
    return is_dense(value) and all(
        isinstance(v, torch.Tensor) and v.dtype == value.dtype and v.dim() == value.dim() and v.numel() > 0 for v in values
    )


class _Joiner:
    """Rewrites one join in its graph."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self._graph, self._node = graph, node
        self._parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        value = node.meta["val"]
        given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        self._dim = given % value.dim()
        self._position = {n: i for i, n in enumerate(graph.nodes)}
        self._nodes = list(graph.nodes)
        self._holders: dict[int, list[fx.Node]] = {}
        for n in graph.nodes:
            for storage in dict.fromkeys(map(storage_id, tensors_of(n))):
                self._holders.setdefault(storage, []).append(n)

    def rewrite(self, late: bool) -> None:
        """Puts copies of the parts in the place of the join."""
        graph, node, old = self._graph, self._node, self._node.meta["val"]
        where = self._places(late)
        with graph.inserting_before(self._nodes[min(where)]):
            buffer = empty_strided(graph, f"{node.name}_buffer", tuple(old.shape), tuple(old.stride()), old)
            whole = graph.create_node("call_function", aten.alias.default, (buffer,))
        whole.meta |= {**node.meta, "val": value_of(whole)}
        start = 0
        for index, (part, position) in enumerate(zip(self._parts, where, strict=True)):
            stop = start + int(part.meta["val"].shape[self._dim])
            with graph.inserting_before(self._nodes[position]):
                self._copy(whole, part, index, (self._dim, start, stop))
            start = stop
        name = node.name
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
        whole.name = name
        carry_on({whole: old})

    def _copy(self, whole: fx.Node, part: fx.Node, index: int, cut: tuple[int, int, int]) -> None:
        name = self._node.name
        target = self._graph.create_node("call_function", aten.slice.Tensor, (whole, *cut), name=f"{name}_part_{index}")
        target.meta |= {**self._node.meta, "val": value_of(target)}
        write = self._graph.create_node("call_function", aten.copy_.default, (target, part), name=f"{name}_write_{index}")
        write.meta |= {**self._node.meta, "val": value_of(write)}

    def _places(self, late: bool) -> list[int]:
        """For every part the position of the operator before which it is copied."""
        end = self._position[self._node]
        ready = [self._ready(part) + 1 for part in self._parts]
        born = max(min(self._births(part), default=0) for part, at in zip(self._parts, ready, strict=True) if at == max(ready))
        places = [max(at, born) if late else at for at in ready]
        return [min(at, end) if self._ends(part) else end for part, at in zip(self._parts, places, strict=True)]

    def _births(self, part: fx.Node) -> list[int]:
        """The positions at which the memory of a part is taken."""
        return [self._position[self._holders[storage][0]] for storage in map(storage_id, tensors_of(part))]

    def _ready(self, part: fx.Node) -> int:
        """The position from which on a part is as it is when it is joined."""
        end = self._position[self._node]
        found = self._position[part]
        for storage in map(storage_id, tensors_of(part)):
            for user in self._readers(storage):
                position = self._position[user]
                if position < end and (loop_of(user) is not None or self._writes(user, storage)):
                    found = max(found, position)
        return found

    def _ends(self, part: fx.Node) -> bool:
        """Whether the program made what a part is of, and nothing reads it after the join."""
        end = self._position[self._node]
        for storage in map(storage_id, tensors_of(part)):
            made = self._holders[storage][0].op == "call_function"
            if not made or any(self._position[user] > end for user in self._readers(storage)):
                return False
        return True

    def _readers(self, storage: int) -> Iterable[fx.Node]:
        return (user for holder in self._holders[storage] for user in holder.users)

    @staticmethod
    def _writes(user: fx.Node, storage: int) -> bool:
        return any(storage in map(storage_id, tensors_of(n)) for n in written_nodes(user))
