"""Products of an attention: `matmul`, `bmm`, `baddbmm` and `einsum` as sums over labelled dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """`alpha * sum(left * right)` over what the result has not, plus `beta * addend`. Labels: one for each dimension."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    labels: tuple[str, ...]
    alpha: float = 1.0
    addend: fx.Node | None = None
    beta: float = 1.0


@dataclass(frozen=True)
class Operand:
    """A tensor whose dimensions are wanted in an order; None: a dimension of size 1 that it has not."""

    node: fx.Node
    dims: tuple[int | None, ...]

    def size(self, index: int) -> int:
        """Of one of the wanted dimensions."""
        dim = self.dims[index]
        return 1 if dim is None else int(self.node.meta["val"].shape[dim])


def product_of(node: fx.Node) -> Product | None:
    """The product that a node is; None where it is none, or one that these labels cannot say."""
    args: Any = node.args
    if node.target is aten.einsum.default:
        return _einsum(node)
    if node.target in (aten.matmul.default, aten.bmm.default):
        return _matmul(node, args[0], args[1])
    if node.target is aten.baddbmm.default:
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        found = _matmul(node, args[1], args[2])
        if found is None or not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
            return None
        addend = None if beta == 0 else args[0]  # then it is not even read
        return Product(node, found.left, found.right, found.left_labels, found.right_labels, found.labels, alpha, addend, beta)
    return None


def _matmul(node: fx.Node, left: fx.Node, right: fx.Node) -> Product | None:
    ranks = [len(n.meta["val"].shape) for n in (left, right)]
    if min(ranks) < 2:
        return None
    batch = tuple(str(i) for i in reversed(range(max(ranks) - 2)))
    one, other = (batch[len(batch) - rank + 2 :] for rank in ranks)
    return Product(node, left, right, (*one, "i", "d"), (*other, "d", "j"), (*batch, "i", "j"))


def _einsum(node: fx.Node) -> Product | None:
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or terms.count(",") != 1:
        return None
    left, right = operands
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    one, other = terms.split(",")
    shapes = [len(n.meta["val"].shape) for n in (left, right, node)]
    labels = [_labels(term, rank) for term, rank in zip((one, other, result), shapes, strict=True)]
    if any(found is None or len(set(found)) != len(found) for found in labels):
        return None
    return Product(node, left, right, *labels)  # type: ignore[arg-type]


def _labels(term: str, rank: int) -> tuple[str, ...] | None:
    """A letter for each dimension; those of an ellipsis are numbered from its end."""
    before, dots, after = term.partition("...")
    extra = rank - len(before) - len(after)
    if extra < 0 or (extra and not dots) or not (before + after).isalpha():
        return None
    return (*before, *(f"...{i}" for i in reversed(range(extra))), *after)


def scores_of(product: Product) -> tuple[Operand, Operand] | None:
    """(queries `[batch..., i, d]`, keys `[batch..., j, d]`) whose products `[batch..., i, j]` are; None where they are not."""
    one, other, result = set(product.left_labels), set(product.right_labels), product.labels
    if len(result) < 2:
        return None
    *batch, row, column = result
    summed = (one & other) - set(result)
    if len(summed) != 1 or one | other != set(result) | summed or {row, column} & one & other:
        return None
    sides = [(product.left, product.left_labels), (product.right, product.right_labels)]
    if row not in one:
        sides.reverse()
    (query, query_labels), (key, key_labels) = sides
    if row not in query_labels or column not in key_labels:
        return None
    (depth,) = summed
    found = (
        Operand(query, _places(query_labels, (*batch, row, depth))),
        Operand(key, _places(key_labels, (*batch, column, depth))),
    )
    return found if found[0].size(-1) == found[1].size(-1) else None


@dataclass(frozen=True)
class Weighted:
    """`[batch..., i, j]` shares times values `[batch..., j, e]`; `order`: the result's dimensions among `[batch..., i, e]`."""

    value: Operand
    order: tuple[int, ...]


def weighted_by(product: Product, shares: fx.Node, transposed: bool) -> Weighted | None:
    """The product as shares times values; `transposed`: the shares are `[batch..., j, i]`. None where it is something else."""
    if product.left is product.right or product.addend is not None or product.alpha != 1:
        return None
    value, labels, mine = product.right, product.right_labels, product.left_labels
    if product.right is shares:
        value, labels, mine = product.left, product.left_labels, product.right_labels
    *batch, row, column = mine
    if transposed:
        row, column = column, row
    features = set(labels) - set(mine)
    if len(features) != 1 or row in labels or column not in labels:
        return None
    (feature,) = features
    wanted = (*batch, row, feature)
    if set(product.labels) != set(wanted):
        return None
    sizes = dict(zip(mine, shares.meta["val"].shape, strict=True))
    shape = product.node.meta["val"].shape
    if any(size != sizes[label] for label, size in zip(product.labels, shape, strict=True) if label != feature):
        return None  # the values have a longer batch
    found = Operand(value, _places(labels, (*batch, column, feature)))
    if found.size(-2) != sizes[column]:
        return None
    return Weighted(found, tuple(wanted.index(label) for label in product.labels))


def _places(labels: Sequence[str], wanted: Sequence[str]) -> tuple[int | None, ...]:
    return tuple(labels.index(label) if label in labels else None for label in wanted)
