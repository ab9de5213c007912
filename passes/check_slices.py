"""The checker's part about weights that come in rows: the parts make the whole, and what they compute is put together.

It looks at the emitted graph and at `Weight.rows` alone, and shares no code with what cut the weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.program import Program, Weight
from runtime import ops
from runtime.errors import CheckError
from runtime.executable import Rows

aten = torch.ops.aten
_FRESH = {aten.new_empty.default, aten.new_empty_strided.default, aten.empty_like.default}
_TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default}
# Positions of what is added to the features.
_BIAS: dict[Any, int] = {aten.linear.default: 2, aten.addmm.default: 0} | {
    getattr(getattr(aten, f"conv{rank}d"), overload): 2 for rank in (1, 2, 3) for overload in ("default", "padding")
}

Refuse = Callable[[fx.Node | None, str, str], CheckError]


def check_parts(program: Program, refuse: Refuse) -> None:
    """The parts of a weight lie one behind the other and are all of it (I3); `refuse(node, invariant, message)` if not."""
    parts: dict[str, list[Weight]] = {}
    for weight in program.weights.values():
        if weight.rows is not None:
            parts.setdefault(weight.host_name, []).append(weight)
    for name, found in parts.items():
        _check_weight(name, found, refuse)


def check_features(program: Program, refuse: Refuse) -> None:
    """Each part computes its own features, of the same call, which are written to their place in one result before anything
    reads that (I5); `refuse(node, invariant, message)` if not.

    Requires a program of which everything else is proved: every value is there when it is read.
    """
    if any(weight.rows is not None for weight in program.weights.values()):
        _Uses(program, refuse).check()


def _check_weight(name: str, parts: list[Weight], refuse: Refuse) -> None:
    cursor, of = 0, _rows(parts[0]).of
    kind = parts[0].spec.shape[1:], parts[0].spec.stride, parts[0].spec.dtype
    for weight in sorted(parts, key=lambda w: _rows(w).start):
        rows, spec = _rows(weight), weight.spec
        if (rows.of, (spec.shape[1:], spec.stride, spec.dtype)) != (of, kind):
            raise refuse(None, "I3", f"the parts of {name} are not of one weight")
        if spec.shape[0] != rows.stop - rows.start or weight.nbytes != spec.shape[0] * spec.stride[0] * spec.dtype.itemsize:
            raise refuse(None, "I3", f"{weight.label} has {spec.shape[0]} rows, or they are no run of bytes")
        if weight.state:
            raise refuse(None, "I6", f"{weight.label} is state, which does not come in parts")
        if rows.start != cursor:
            what = "overlaps the part before it" if rows.start < cursor else f"leaves rows {cursor} to {rows.start} out"
            raise refuse(None, "I3", f"{weight.label} {what}")
        cursor = rows.stop
    if cursor != of:
        raise refuse(None, "I3", f"{name} has {of} rows, and its parts end at {cursor}")


@dataclass(frozen=True)
class _Use:
    """Operator `node` reads a part as its argument number `at`; `copy` writes what it gives to `into`, a slice of a result."""

    node: fx.Node
    weight: Weight
    at: int
    copy: fx.Node
    into: fx.Node

    @property
    def rows(self) -> Rows:
        return _rows(self.weight)

    @property
    def call(self) -> tuple[Any, ...]:
        return self.node.target, self.at, self.into.args[1], len(self.node.args), dict(self.node.kwargs)


class _Uses:
    """All operators that read parts, and the results that they make."""

    def __init__(self, program: Program, refuse: Refuse) -> None:
        self.refuse = refuse
        self.weights = program.weights
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}
        self.arrived = dict(arrivals(program))

    def check(self) -> None:
        results: dict[fx.Node, list[_Use]] = {}
        for use in self._uses():
            result: Any = use.into.args[0]
            results.setdefault(result, []).append(use)
        for result, uses in results.items():
            self._check_result(result, sorted(uses, key=lambda use: use.rows.start))

    def _uses(self) -> Iterator[_Use]:
        for node, key in self.arrived.items():
            weight = self.weights[key]
            if weight.rows is None or (weight.stored is not None and weight.stored.part == "scales"):
                continue
            # What is stored in another type is cast back first, which `check_casts` proves.
            for whole in [node] if weight.stored is None or weight.stored.part == "layout" else _users(node):
                for user in _users(whole):
                    for reader, held in [(u, user) for u in _users(user)] if user.target in _TRANSPOSES else [(user, whole)]:
                        yield self._use(reader, held, weight)

    def _use(self, node: fx.Node, held: fx.Node, weight: Weight) -> _Use:
        at = [i for i, argument in enumerate(node.args) if argument is held]
        users = _users(node)
        if len(at) != 1 or len(users) != 1 or users[0].target is not aten.copy_.default or users[0].args[1] is not node:
            raise self.refuse(node, "I5", f"{node.name} reads {weight.label}, and what it gives is not put into one result")
        copy, into, rows = users[0], users[0].args[0], _rows(weight)
        assert isinstance(into, fx.Node)
        if into.target is not aten.slice.Tensor or into.args[2:] != (rows.start, rows.stop):
            raise self.refuse(copy, "I5", f"{node.name} gives features {rows}, which are written elsewhere")
        if not isinstance(into.args[0], fx.Node) or into.args[0].target not in _FRESH:
            raise self.refuse(into, "I5", f"{into.name} is no part of a new result")
        return _Use(node, weight, at[0], copy, into)

    def _check_result(self, result: fx.Node, uses: list[_Use]) -> None:
        first, cursor = uses[0], 0
        for use in uses:
            if use.weight.name != first.weight.name or use.call != first.call or not self._same_arguments(first, use):
                raise self.refuse(use.node, "I5", f"{use.node.name} and {first.node.name} are not parts of one call")
            if use.rows.start != cursor:
                raise self.refuse(use.node, "I5", f"features of {result.name} come twice or never")
            cursor = use.rows.stop
        features = int(result.meta["val"].shape[first.into.args[1]])
        if not cursor == first.rows.of == features:
            raise self.refuse(result, "I5", f"{result.name} has {features} features, and {cursor} are written")
        parts, last = {use.into for use in uses}, max(self.order[use.copy] for use in uses)
        early = next((user for user in _users(result) if user not in parts and self.order[user] < last), None)
        if early is not None:
            raise self.refuse(early, "I5", f"{early.name} reads {result.name} before all of it is written")

    def _same_arguments(self, one: _Use, other: _Use) -> bool:
        """Whether two calls differ in the weight, and in that each takes its own rows of the same bias, and in nothing else."""
        bias = _BIAS.get(one.node.target)
        for i, (x, y) in enumerate(zip(one.node.args, other.node.args, strict=True)):
            if i == bias and not (x is None and y is None):
                cut = self._cut(x, one.rows)
                if cut is None or cut != self._cut(y, other.rows):
                    return False
            elif i not in (one.at, bias) and self._identity(x) != self._identity(y):
                return False
        return True

    def _cut(self, bias: Any, rows: Rows) -> Any:
        """What is cut, where a bias is a slice at those rows of a tensor's last dimension."""
        if not isinstance(bias, fx.Node) or bias.target is not aten.slice.Tensor or bias.args[2:] != (rows.start, rows.stop):
            return None
        source: Any = bias.args[0]
        sizes = source.meta["val"].shape
        return self._identity(source) if (bias.args[1], sizes[-1]) == (len(sizes) - 1, rows.of) else None

    def _identity(self, argument: Any) -> Any:
        """Weights by name: a streamed one arrives anew for every part."""
        return self.arrived.get(argument, argument) if isinstance(argument, fx.Node) else argument


def arrivals(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """The nodes that hold weights, resident or onloaded, with the weights' keys."""
    assert program.layout is not None
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.weights:
            yield node, node.name
        elif node.target is operator.getitem and node.args[0].target is ops.onload:
            bundle = program.layout.bundles[node.args[0].args[0]]
            yield node, bundle.slots[node.args[1]].weight


def _users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is not ops.free]


def _rows(weight: Weight) -> Rows:
    assert weight.rows is not None
    return weight.rows
