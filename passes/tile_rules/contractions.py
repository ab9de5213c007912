"""Sums of products: matrix products in all their forms, linear layers, einsum.

A contraction labels every dimension of its operands and of its result. Dimensions with the same label run together; a label
that the result lacks is summed over. Any label of the result may be cut (rows of the input, output features with their rows of
the weight, batches): operands that have it give that part, the others are whole. A label that is summed over may be cut too,
and partial sums are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.spec import TensorSpec
from passes.tile_rules.base import Part, Reduced, Run, TileCall, Tiled, Untileable, reduction_rule, tile_rule

aten = torch.ops.aten

Labels = tuple[Hashable, ...]
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Contraction:
    """`operands`: for each of `TileCall.tensors` the label of each dimension; `output`: those of the result.

    A dimension of size 1 whose label is longer elsewhere is broadcast.
    """

    operands: tuple[Labels, ...]
    output: Labels


def _batch(rank: int) -> Labels:
    """Labels of leading dimensions that broadcast, counted from the right."""
    return tuple(range(-rank, 0))


def _added(spec: TensorSpec, output: Labels) -> Labels:
    """Labels of an operand that is added to the product, with broadcasting."""
    return output[len(output) - len(spec.shape) :]


def _matmul(call: TileCall) -> Contraction:
    """`y[..., m, n] = sum_k a[..., m, k] b[..., k, n]`; a vector has no m, or no n."""
    left, right = (len(spec.shape) for spec in call.tensors)
    a: Labels = ("k",) if left == 1 else (*_batch(left - 2), "m", "k")
    b: Labels = ("k",) if right == 1 else (*_batch(right - 2), "k", "n")
    rows: Labels = ("m",) if left > 1 else ()
    columns: Labels = ("n",) if right > 1 else ()
    return Contraction((a, b), (*_batch(max(left, right, 2) - 2), *rows, *columns))


def _linear(call: TileCall) -> Contraction:
    """`y[..., n] = sum_k x[..., k] w[n, k] + b[n]`; a weight that is a vector has no n."""
    x, weight, *bias = call.tensors
    features: Labels = ("n",) if len(weight.shape) == 2 else ()
    rows = _batch(len(x.shape) - 1)
    if any(len(spec.shape) > len(features) for spec in bias):
        raise Untileable("has a bias that is no vector")
    return Contraction(((*rows, "k"), (*features, "k"), *(_added(spec, features) for spec in bias)), (*rows, *features))


def _plus(product: Contraction) -> Callable[[TileCall], Contraction]:
    """`y = beta c + alpha (the product)`, c with broadcasting."""
    return lambda call: Contraction((_added(call.tensors[0], product.output), *product.operands), product.output)


def _inner(call: TileCall) -> Contraction:
    """`y[x..., z...] = sum_k a[x..., k] b[z..., k]`."""
    left, right = (len(spec.shape) for spec in call.tensors)
    if not left or not right:
        raise Untileable("multiplies by a single number")
    a, b = tuple(f"a{i}" for i in range(left - 1)), tuple(f"b{i}" for i in range(right - 1))
    return Contraction(((*a, "k"), (*b, "k")), (*a, *b))


def _tensordot(call: TileCall) -> Contraction:
    """`y[x..., z...] = sum_k... a[x..., k...] b[z..., k...]`, the summed dimensions anywhere."""
    left, right = (len(spec.shape) for spec in call.tensors)
    a: list[Hashable] = [f"a{i}" for i in range(left)]
    b: list[Hashable] = [f"b{i}" for i in range(right)]
    for i, (mine, other) in enumerate(zip(call.arg("dims_self"), call.arg("dims_other"), strict=True)):
        a[mine] = b[other] = i
    return Contraction((tuple(a), tuple(b)), tuple(label for label in (*a, *b) if isinstance(label, str)))


def _einsum(call: TileCall) -> Contraction:
    """The equation's letters are the labels; dimensions of an ellipsis broadcast, counted from the right.

    Without an arrow the result has the ellipsis, then the letters that occur once, `A..Z` before `a..z`.
    """
    left, arrow, right = call.arg("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(call.tensors):
        raise Untileable("has an equation with another number of operands")
    operands = tuple(_subscripts(term, len(spec.shape)) for term, spec in zip(terms, call.tensors, strict=True))
    hidden = max((sum(isinstance(label, int) for label in labels) for labels in operands), default=0)
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = "..." + "".join(letter for letter in sorted(set(letters)) if letters.count(letter) == 1)
    shown = len(right.replace("...", ""))
    output = _subscripts(right, shown + hidden if "..." in right else shown)
    if len(output) != len(call.output.shape):
        raise Untileable("has an equation that does not fit its result")
    return Contraction(operands, output)


def _subscripts(term: str, rank: int) -> Labels:
    """`i...j` of rank 4 is (i, -2, -1, j)."""
    before, ellipsis, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    letters = before + after
    if hidden < 0 or (hidden and not ellipsis) or (letters and not letters.isalpha()):
        raise Untileable(f"has a term {term!r} that does not fit its operand")
    return (*before, *_batch(hidden), *after)


_MM = Contraction((("m", "k"), ("k", "n")), ("m", "n"))
_BMM = Contraction((("b", "m", "k"), ("b", "k", "n")), ("b", "m", "n"))
_MV = Contraction((("m", "k"), ("k",)), ("m",))
_OUTER = Contraction((("m",), ("n",)), ("m", "n"))
_DOT = Contraction((("k",), ("k",)), ())

# The labels of every operator that is a product alone.
_PRODUCTS: dict[Any, Callable[[TileCall], Contraction]] = {
    aten.mm.default: lambda call: _MM,
    aten.bmm.default: lambda call: _BMM,
    aten.mv.default: lambda call: _MV,
    aten.dot.default: lambda call: _DOT,
    aten.vdot.default: lambda call: _DOT,
    aten.outer.default: lambda call: _OUTER,
    aten.ger.default: lambda call: _OUTER,
    aten.matmul.default: _matmul,
    aten.linear.default: _linear,
    aten.inner.default: _inner,
    aten.tensordot.default: _tensordot,
    aten.einsum.default: _einsum,
}
# And of those that add their first argument to it.
_SUMS: dict[Any, Callable[[TileCall], Contraction]] = {
    aten.addmm.default: _plus(_MM),
    aten.addmv.default: _plus(_MV),
    aten.addr.default: _plus(_OUTER),
    aten.baddbmm.default: _plus(_BMM),
    aten.addbmm.default: _plus(Contraction(_BMM.operands, ("m", "n"))),
}


def _needs(call: TileCall, contraction: Contraction, label: Hashable, part: Part) -> tuple[Part | None, ...]:
    """The part of each operand along a label: all of those that lack it or broadcast along it."""
    needs: list[Part | None] = []
    for spec, labels in zip(call.tensors, contraction.operands, strict=True):
        if labels.count(label) > 1:
            raise Untileable("takes the diagonal of the dimension that is cut")
        here = labels.index(label) if label in labels else None
        needs.append(None if here is None or spec.shape[here] == 1 else Part(here, part.start, part.stop))
    return tuple(needs)


@tile_rule(*_PRODUCTS, *_SUMS)
def contract(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b, ...] = sum_k x[a:b, k] w[k, ...]`: the same operator on the operands' parts along the label that is cut."""
    assert part is not None
    contraction = {**_PRODUCTS, **_SUMS}[call.target](call)
    return Tiled(_needs(call, contraction, contraction.output[part.dim], part), call.again)


@reduction_rule(*_PRODUCTS)
def contract_by_parts(call: TileCall, part: Part) -> Reduced:
    """`y = sum over parts [a, b) of (sum_{k in [a, b)} x[..., k] w[..., k])`; what is added (a bias) goes with the first part.

    Kernels accumulate half precision in fp32 and round once. So do we: parts of half precision are cast to fp32 before they are
    multiplied, partial sums stay in fp32, and only their sum is rounded. (A half-precision product of the parts would round
    every partial sum: for N parts about sqrt(N) times the error of the whole operator.) Other types accumulate in themselves.
    """
    contraction = _PRODUCTS[call.target](call)
    label = contraction.operands[0][part.dim]
    if label in contraction.output:
        raise Untileable(f"does not sum over dimension {part.dim}")
    longest = max(n for spec, labels in zip(call.tensors, contraction.operands, strict=True)
                  for n, other in zip(spec.shape, labels, strict=True) if other == label)  # fmt: skip
    if call.tensors[0].shape[part.dim] != longest:
        raise Untileable("broadcasts its first argument along the dimension it sums over")
    dtype = call.output.dtype
    wide = torch.float32 if dtype in HALVES else dtype
    has_bias = call.target is aten.linear.default and len(call.tensors) == 3
    without: dict[str, Any] = {"bias": None} if has_bias and part.start else {}

    def partial(run: Run, values: Sequence[Any]) -> Any:
        if wide != dtype:
            used = len(values) - bool(without)  # a bias that is not added is not cast either
            values = [*(run(aten.to.dtype, value, wide) for value in values[:used]), *values[used:]]
        return call.again(run, values, **without)

    def merge(run: Run, stacked: Any) -> Any:
        total = run(aten.sum.dim_IntList, stacked, [0], dtype=wide)
        return total if wide == dtype else run(aten.to.dtype, total, dtype)

    return Reduced(_needs(call, contraction, label, part), partial, merge)
