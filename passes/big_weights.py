"""Which weights could be brought in parts, or read where they live: what a planner may choose from and rewrites accept.

A weight can be sliced over its rows where every reader computes output features from rows: `linear`, an ungrouped convolution,
a product with its transpose. A table can be looked up on the host where `embedding` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.program import Program, Weight, is_symbolic

aten = torch.ops.aten

# Position of the weight, which is [out, in, ...], of the bias and of the groups.
_LINEARS = {aten.linear.default: (1, 2)}
_CONVOLUTIONS = {
    getattr(getattr(aten, f"conv{rank}d"), overload): (1, 2, 6) for rank in (1, 2, 3) for overload in ("default", "padding")
}
# Position of what is the transposed weight, and of what is added.
_PRODUCTS: dict[Any, tuple[int, int | None]] = {
    aten.mm.default: (1, None),
    aten.matmul.default: (1, None),
    aten.addmm.default: (2, 0),
}


@dataclass(frozen=True)
class Reader:
    """An operator `node` that makes features [a, b) of dimension `dim` of its result from rows [a, b) of a weight.

    `weight` and `bias` are positions among its arguments; `view` is the transpose of the weight that it reads, where it does.
    """

    node: fx.Node
    weight: int
    bias: int | None
    dim: int
    view: fx.Node | None = None


def sliceable(program: Program) -> dict[str, int]:
    """The weights that `SliceWeights` can cut, by placeholder, with their numbers of rows.

    A table that is read by `embedding` too is among them once `HostLookup` was applied.
    """
    return {
        node.name: program.weights[node.name].spec.shape[0]
        for node in program.graph.nodes
        if node.name in program.weights and why_not_sliced(program, node) is None
    }


def host_lookups(program: Program) -> tuple[str, ...]:
    """The weights of which `HostLookup` can replace readers, by placeholder: tables that some `embedding` reads."""
    return tuple(
        node.name for node in program.graph.nodes if node.name in program.weights and why_not_looked_up(program, node) is None
    )


def why_not_sliced(program: Program, node: fx.Node) -> str | None:
    """Why the weight behind a placeholder cannot be brought in rows; None where it can."""
    weight = program.weights[node.name]
    shared = _why_not_in_rows(weight)
    if shared is not None:
        return shared
    if weight.spec.shape[0] < 2:
        return "it has one row"
    if not node.users:
        return "nothing reads it"
    for user in node.users:
        if not list(_readings(node, user)):
            return f"{user.name} reads it otherwise than row by row for features"
    readers = readers_of(node)
    odd = next((r.node for r in readers if is_symbolic(r.node) and r.node.target in _CONVOLUTIONS), None)
    return None if odd is None else f"{odd.name} gives a size that varies"


def readers_of(weight: fx.Node) -> list[Reader]:
    """The operators that read a sliceable weight, in program order."""
    found = [reading for user in weight.users for reading in _readings(weight, user)]
    return sorted(found, key=lambda reader: reader.node)


def why_not_looked_up(program: Program, node: fx.Node) -> str | None:
    """Why no row of the weight behind a placeholder can be gathered on the host; None where some can."""
    weight = program.weights[node.name]
    shared = _why_not_in_rows(weight)
    if shared is not None:
        return shared
    if len(weight.spec.shape) != 2 or weight.spec.stride != (weight.spec.shape[1], 1):
        return "it is no contiguous table of two dimensions"
    return None if embeddings_of(node) else "no embedding reads it"


def embeddings_of(weight: fx.Node) -> list[fx.Node]:
    """The operators that look rows of a weight up, in program order."""
    found = [n for n in weight.users if n.target is aten.embedding.default and n.args[0] is weight and n.args[1] is not weight]
    return sorted(found)


def dense_rows(weight: Weight) -> bool:
    """Whether each row is a run of bytes right behind the one before, in whatever order its elements are."""
    shape, stride = weight.spec.shape, weight.spec.stride
    if not shape or 0 in shape:
        return False
    step = 1
    for one, size in sorted((s, n) for n, s in zip(shape[1:], stride[1:], strict=True) if n != 1):
        if one != step:
            return False
        step *= size
    return stride[0] == step


def _why_not_in_rows(weight: Weight) -> str | None:
    if weight.state:
        return "the program writes it"
    if weight.kind == "constant":
        return "it is a constant, neither parameter nor buffer"
    if weight.rows is not None:
        return "it is a part of a weight"
    return None if dense_rows(weight) else "its rows are not runs of bytes, one behind the other"


def _readings(weight: fx.Node, user: fx.Node) -> Iterator[Reader]:
    """How one user reads the weight; nothing where it is not understood."""
    rank = weight.meta["val"].dim()
    if user.target in _LINEARS and rank == 2:
        at, bias = _LINEARS[user.target]
        yield from _reading(weight, user, at, bias, _rank(user) - 1, None)
    elif user.target in _CONVOLUTIONS:
        at, bias, groups = _CONVOLUTIONS[user.target]
        if _argument(user, groups, "groups", 1) == 1:
            yield from _reading(weight, user, at, bias, _rank(user) - (rank - 2) - 1, None)
    elif rank == 2 and _is_transpose(user):
        found = []
        for product in user.users:
            if product.target not in _PRODUCTS:
                return
            at, added = _PRODUCTS[product.target]
            found += list(_reading(user, product, at, added, _rank(product) - 1, user))
        if len(found) == len(user.users):
            yield from found


def _reading(held: fx.Node, node: fx.Node, weight: int, bias: int | None, dim: int, view: fx.Node | None) -> Iterator[Reader]:
    others = [argument for at, argument in enumerate(node.args) if at != weight]
    if node.kwargs.keys() - {"beta", "alpha"} or len(node.args) <= weight or node.args[weight] is not held:
        return
    if any(held in _nodes(argument) for argument in others):
        return
    added = node.args[bias] if bias is not None and len(node.args) > bias else None
    if isinstance(added, fx.Node) and not _has_features(added, node.meta["val"].shape[dim]):
        return
    yield Reader(node, weight, bias if added is not None else None, dim, view)


def _has_features(bias: fx.Node, features: int) -> bool:
    sizes = bias.meta["val"].shape
    return len(sizes) > 0 and bool(sizes[-1] == features)


def _is_transpose(node: fx.Node) -> bool:
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return True
    if node.target is aten.transpose.int:
        return {int(d) % 2 for d in node.args[1:3]} == {0, 1}  # type: ignore[arg-type]
    return node.target is aten.permute.default and [int(d) % 2 for d in node.args[1]] == [1, 0]  # type: ignore[union-attr,arg-type]


def _nodes(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
