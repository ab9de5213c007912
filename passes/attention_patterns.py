"""Finds attention that is written out: `softmax(scale * q @ k^T + mask) @ v`, with what models do in between.

Between the first product and the softmax: scales, masks that are added, masks that replace scores, casts to a wider type, other
batch dimensions. Between the softmax and the second product: casts back, other batch dimensions. What is found is the same
function as `scaled_dot_product_attention` of one additive mask; anything else is left alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from passes.attention_products import Operand, Product, Weighted, product_of, scores_of, weighted_by
from passes.mark_state import written_nodes
from passes.program import is_symbolic, storage_id, tensors_of
from passes.value_bounds import number_of

aten = torch.ops.aten

SOFTMAXES = (aten.softmax.int, aten._softmax.default)
CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout)
# They keep the elements' order; whether they leave the last two dimensions alone, shapes tell.
_RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.flatten.using_ints, aten.unflatten.int, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.detach.default,
)  # fmt: skip
_MULTIPLIES = (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar)
_DIVIDES = (aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar)
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_SUBTRACTS = (aten.sub.Tensor, aten.sub_.Tensor)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Tensor)
_WHERES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_STEPS = 48


@dataclass(frozen=True)
class Scale:
    """Scores times a number."""

    by: float


@dataclass(frozen=True)
class Factor:
    """Scores times, or divided by, a tensor that is the same for all keys."""

    tensor: fx.Node
    divides: bool
    batch: tuple[int, ...]


@dataclass(frozen=True)
class Add:
    """Scores, whose batch dimensions are `batch`, plus a tensor times a number."""

    tensor: fx.Node
    times: float
    batch: tuple[int, ...]


@dataclass(frozen=True)
class Fill:
    """Scores replaced by a number where the condition holds, or where it does not."""

    condition: fx.Node
    holds: bool
    value: float
    batch: tuple[int, ...]


Step = Scale | Factor | Add | Fill


@dataclass(frozen=True)
class Attention:
    """An attention that is written out.

    `steps` lead from the products of queries and keys to the softmax. `batch`: the two dimensions that it is brought to;
    `score_batch` and `value_batch` those at the two products. `chain`: the nodes that it replaces, the last product at the end.
    """

    query: Operand
    key: Operand
    weighted: Weighted
    steps: tuple[Step, ...]
    batch: tuple[int, int]
    score_batch: tuple[int, ...]
    value_batch: tuple[int, ...]
    chain: tuple[fx.Node, ...]

    @property
    def last(self) -> fx.Node:
        return self.chain[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys, values, mask and result."""
        return self.last.meta["val"].dtype


class Writes:
    """What a program writes in place: positions by storage, and the positions of all nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.storages: dict[int, list[int]] = {}
        for node, i in self.position.items():
            for written in written_nodes(node):
                for tensor in tensors_of(written):
                    self.storages.setdefault(storage_id(tensor), []).append(i)

    def between(self, node: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether a node's memory is written after `first` and before `last`."""
        for tensor in tensors_of(node):
            found = self.storages.get(storage_id(tensor), [])
            at = bisect_left(found, self.position[first])
            if at < len(found) and found[at] < self.position[last]:
                return True
        return False

    def ever(self, node: fx.Node) -> bool:
        """Whether a node's memory is written at all."""
        return any(storage_id(tensor) in self.storages for tensor in tensors_of(node))


class Finder:
    """Looks for attentions in one graph. `constants`: tensors that the program has baked in, by placeholder."""

    def __init__(self, graph: fx.Graph, constants: Mapping[str, torch.Tensor]) -> None:
        self._writes = Writes(graph)
        self._constants = constants

    @property
    def written(self) -> Mapping[int, list[int]]:
        """Positions of writes by storage."""
        return self._writes.storages

    def find(self, softmax: fx.Node) -> Attention | None:
        """The attention whose shares a softmax gives; None where there is none."""
        if softmax.target not in SOFTMAXES or not _is_plain(softmax):
            return None
        scores, dim = softmax.args[:2]
        rank = softmax.meta["val"].dim()
        if not isinstance(scores, fx.Node) or dim not in (-1, rank - 1) or rank < 2 or not _leads_only_to(scores, softmax):
            return None
        back = self._back(scores, [_MOST_STEPS])
        forth = _forth(softmax)
        if back is None or forth is None:
            return None
        product, steps, before = back
        after, shares, weighted = forth
        return self._fitted(product, steps, weighted, shares, (*before, softmax, *after))

    def _fitted(
        self, product: Product, steps: tuple[Step, ...], weighted: Weighted, shares: fx.Node, chain: tuple[fx.Node, ...]
    ) -> Attention | None:
        """With types, batch dimensions and writes looked at."""
        sides = scores_of(product)
        assert sides is not None
        first = Scale(product.alpha)
        dtype = chain[-1].meta["val"].dtype
        if dtype not in _FLOATS or not _is_plain(*chain) or weighted.value.node.meta["val"].dtype != dtype:
            return None
        if any(torch.promote_types(node.meta["val"].dtype, dtype) != node.meta["val"].dtype for node in chain):
            return None  # something was rounded to less than that
        query, key = (Operand(narrowed(side.node, dtype), side.dims) for side in sides)
        score_batch, value_batch = tuple(product.node.meta["val"].shape[:-2]), tuple(shares.meta["val"].shape[:-2])
        batch = _batch_of(score_batch, value_batch, steps)
        if batch is None or not _are_understood((first, *steps), score_batch, batch, dtype):
            return None
        steps = tuple(_narrowed_step(step, dtype) for step in (first, *steps))
        found = Attention(query, key, weighted, steps, batch, score_batch, value_batch, chain)
        return found if self._may_move(found) and _is_typed(found) else None

    def _may_move(self, found: Attention) -> bool:
        """Whether all that is read can be read where the last product is, and nobody writes into what that gives."""
        position = self._writes.position
        reads = [found.query.node, found.key.node, found.weighted.value.node, *(n for s in found.steps for n in tensors_in(s))]
        first = min((n for n in found.chain if n in position), key=position.__getitem__)
        sources = [user for n in reads for user in n.users if user.target in CASTS and user in position]
        first = min([first, *sources], key=position.__getitem__)
        if any(self._writes.between(node, first, found.last) for node in reads):
            return False
        return not self._writes.ever(found.last)

    def _back(self, node: fx.Node, left: list[int]) -> tuple[Product, tuple[Step, ...], tuple[fx.Node, ...]] | None:
        """From scores to the product that they come from: it, the steps from there, the nodes up to `node`."""
        left[0] -= 1
        if left[0] < 0 or not isinstance(node.meta.get("val"), torch.Tensor) or is_symbolic(node):
            return None
        product = product_of(node)
        if product is not None and scores_of(product) is not None and product.left is not product.right:
            batch = tuple(node.meta["val"].shape[:-2])
            addend = () if product.addend is None else (Add(product.addend, product.beta, batch),)
            return product, addend, (node,)
        for source, step in self._steps(node):
            if not _leads_only_to(source, node):
                continue
            found = self._back(source, left)
            if found is not None:
                return found[0], (*found[1], *(() if step is None else (step,))), (*found[2], node)
        return None

    def _steps(self, node: fx.Node) -> Iterator[tuple[fx.Node, Step | None]]:
        """Which of its arguments may be scores, and what is done to them."""
        args: Any = node.args
        if node.op != "call_function" or not args or node.meta["val"].dim() < 2:
            return
        shape, batch = node.meta["val"].shape, tuple(node.meta["val"].shape[:-2])
        same = [n for n in node.all_input_nodes if _shape(n) == shape]
        if node.target in CASTS and same:
            yield args[0], None
        if node.target in _RESHAPES and _keeps_scores(args[0], node):
            yield args[0], None
        if node.target in _MULTIPLIES + _DIVIDES:
            yield from _scaled(node, same, batch)
        if node.target in _ADDS + _SUBTRACTS and not isinstance(args[1], fx.Node) and args[1] == 0 and args[0] in same:
            yield args[0], None
        if node.target in _ADDS + _SUBTRACTS and isinstance(args[1], fx.Node):
            alpha = node.kwargs.get("alpha", 1)
            sign = -1 if node.target in _SUBTRACTS else 1
            if args[0] in same and isinstance(alpha, (int, float)):
                yield args[0], Add(args[1], float(sign * alpha), batch)
            if args[1] in same and alpha == 1 and sign == 1:
                yield args[1], Add(args[0], 1.0, batch)
        if node.target in _FILLS and args[0] in same:
            value = self._number(args[2])
            if value is not None:
                yield args[0], Fill(args[1], True, value, batch)
        if node.target in _WHERES:
            for kept, other, holds in ((args[1], args[2], False), (args[2], args[1], True)):
                value = self._number(other)
                if isinstance(kept, fx.Node) and kept in same and value is not None:
                    yield kept, Fill(args[0], holds, value, batch)

    def _number(self, value: Any) -> float | None:
        """A number that is written in the program, or in a tensor of one element that it has as a constant."""
        found = number_of(value, self._writes.storages)
        while found is None and isinstance(value, fx.Node) and value.target in (aten.lift_fresh_copy.default, *CASTS):
            value = value.args[0]
        if found is not None or not isinstance(value, fx.Node) or self._writes.ever(value):
            return found
        constant = self._constants.get(value.name) if value.op == "placeholder" else None
        return float(constant) if constant is not None and constant.numel() == 1 and not constant.is_meta else None


def _scaled(node: fx.Node, same: list[fx.Node], batch: tuple[int, ...]) -> Iterator[tuple[fx.Node, Step]]:
    one, other = node.args[:2]
    divides = node.target in _DIVIDES
    if isinstance(other, (int, float)) and one in same and (other or not divides):
        yield one, Scale(1 / other if divides else float(other))  # type: ignore[misc]
    if isinstance(other, fx.Node) and one in same:
        yield one, Factor(other, divides, batch)  # type: ignore[misc]
    if isinstance(other, fx.Node) and other in same and not divides and isinstance(one, fx.Node):
        yield other, Factor(one, False, batch)


def _forth(softmax: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node, Weighted] | None:
    """From a softmax to the product that it weights: the nodes up to that, the shares that it reads, how it reads them."""
    node, passed, transposed = softmax, list[fx.Node](), False
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_function" or not isinstance(user.meta.get("val"), torch.Tensor) or is_symbolic(user):
            return None
        product = product_of(user)
        if product is not None:
            weighted = weighted_by(product, node, transposed)
            plain = transposed is False or tuple(node.meta["val"].shape[:-2]) == tuple(softmax.meta["val"].shape[:-2])
            return None if weighted is None or not plain else ((*passed, user), node, weighted)
        if user.target in CASTS and _shape(user) == _shape(node) and user.args[0] is node:
            pass
        elif _swaps_last_two(user):
            transposed = not transposed
        elif user.target not in _RESHAPES or not _keeps_scores(node, user):
            return None
        passed.append(user)
        node = user
    return None


def _swaps_last_two(node: fx.Node) -> bool:
    args: Any = node.args
    rank = node.meta["val"].dim()
    if node.target is aten.transpose.int:
        return {args[1] % rank, args[2] % rank} == {rank - 2, rank - 1}
    order = [*range(rank - 2), rank - 1, rank - 2]
    return node.target is aten.permute.default and [dim % rank for dim in args[1]] == order


def _keeps_scores(before: Any, after: fx.Node) -> bool:
    """Whether only batch dimensions are taken apart or put together."""
    one, other = _shape(before), _shape(after)
    return one is not None and other is not None and len(one) >= 2 and one[-2:] == other[-2:] and prod(one) == prod(other)


def _shape(node: Any) -> tuple[int, ...] | None:
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(val.shape) if isinstance(val, torch.Tensor) else None


def _leads_only_to(node: Any, user: fx.Node) -> bool:
    """Whether it is read there, once, and nowhere else, and made by the program."""
    return isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1 and user in node.users


def _is_plain(*nodes: fx.Node) -> bool:
    """Whether they are tensors of known sizes, none of them empty."""
    if any(not isinstance(node.meta.get("val"), torch.Tensor) or is_symbolic(node) for node in nodes):
        return False
    return all(node.meta["val"].numel() for node in nodes)


def narrowed(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """What was cast from `dtype` to a wider type, as it was before that."""
    while node.meta["val"].dtype != dtype and node.target in CASTS and isinstance(node.args[0], fx.Node):
        before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype
        if torch.promote_types(before, after) != after or torch.promote_types(before, dtype) != before:
            return node
        node = node.args[0]
    return node


def _narrowed_step(step: Step, dtype: torch.dtype) -> Step:
    return Add(narrowed(step.tensor, dtype), step.times, step.batch) if isinstance(step, Add) else step


def tensors_in(step: Step) -> tuple[fx.Node, ...]:
    """The tensors that a step reads besides scores."""
    if isinstance(step, Scale):
        return ()
    return (step.condition,) if isinstance(step, Fill) else (step.tensor,)


def _is_typed(found: Attention) -> bool:
    """Whether all tensors have the type that one operator wants of them."""
    dtype = found.dtype
    nodes = [found.query.node, found.key.node, *(s.tensor for s in found.steps if isinstance(s, Add))]
    factors = [s.tensor for s in found.steps if isinstance(s, Factor)]
    fills = [s.condition for s in found.steps if isinstance(s, Fill)]
    if not _is_plain(*nodes, *factors, *fills, found.weighted.value.node):
        return False
    if any(n.meta["val"].dtype != dtype for n in (*nodes, *(f for f in factors if f.meta["val"].dim()))):
        return False
    return all(f.meta["val"].dtype in _FLOATS for f in factors) and all(f.meta["val"].dtype == torch.bool for f in fills)


def _batch_of(scores: tuple[int, ...], values: tuple[int, ...], steps: tuple[Step, ...]) -> tuple[int, int] | None:
    """The batch and the heads: of the first that has two dimensions; of more, the last are heads; what has one has heads."""
    shapes = [*(s.batch for s in steps if isinstance(s, (Add, Fill))), values, scores]
    shapes.sort(key=lambda shape: len(shape) != 2)
    several = next((shape for shape in shapes if len(shape) >= 2), None)
    return (1, prod(scores)) if several is None else (prod(several[:-1]), several[-1])


Fit = tuple[tuple[int, ...], tuple[int, ...]]


def fits(tensor: fx.Node, at: tuple[int, ...], batch: tuple[int, int]) -> Fit | None:
    """How a tensor that broadcasts to scores with batch dimensions `at` does so where those become `batch`.

    The shape that it is expanded to, and the four dimensions that it then has; None where there is no such way.
    """
    shape = tuple(tensor.meta["val"].shape)
    padded = (*(1,) * (len(at) + 2 - len(shape)), *shape)
    own, last = padded[: len(at)], padded[len(at) :]
    if prod(own) == 1:
        return padded, (1, 1, *last)
    for cut in range(len(at) + 1):
        if (prod(at[:cut]), prod(at[cut:])) == batch:
            wide = [full if prod(mine) > 1 else mine for mine, full in ((own[:cut], at[:cut]), (own[cut:], at[cut:]))]
            return (*wide[0], *wide[1], *last), (prod(wide[0]), prod(wide[1]), *last)
    return (padded, (*batch, *last)) if own == at else None


def _are_understood(steps: tuple[Step, ...], scores: tuple[int, ...], batch: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether a scale and an additive mask say the same as the steps do."""
    masked = False
    filled: float | None = None
    for step in steps:
        if isinstance(step, Scale):
            if not math.isfinite(step.by) or (filled is not None and not (filled == -math.inf and step.by > 0)):
                return False
        elif isinstance(step, Factor):
            shape = step.tensor.meta["val"].shape
            if masked or (len(shape) and (shape[-1] != 1 or step.batch != scores or len(shape) > len(scores) + 2)):
                return False
        else:
            (tensor,) = tensors_in(step)
            if not isinstance(tensor.meta.get("val"), torch.Tensor) or fits(tensor, step.batch, batch) is None:
                return False
            masked = True
            if isinstance(step, Fill):
                if not _outweighs(step.value, dtype):
                    return False
                filled = step.value if filled in (None, -math.inf) else filled
    return True


def _outweighs(value: float, dtype: torch.dtype) -> bool:
    """Whether a score of up to 2^20 plus that is that, as kernels compute it: so that adding is the same as replacing.

    Rows of which all scores are replaced then have equal shares in both. Half precision is computed in fp32.
    """
    if value == -math.inf:
        return True
    bits = 53 if dtype == torch.float64 else 24
    return value <= -(2.0 ** (bits + 20)) and value >= torch.finfo(dtype).min
