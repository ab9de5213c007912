"""Matrix products, linear layers and einsum, part by part and summed over parts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.tile_rules import Part, Untileable, reduce_parts, tile
from tests.passes.tile_rules.harness import call_on, check_reduction, check_tiles, cut, cuts_of, run

aten = torch.ops.aten
SIZES = st.integers(1, 5)


def laid_out(data: st.DataObject, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers; contiguous, transposed, or a window of something larger."""
    form = data.draw(st.sampled_from(["contiguous", "transposed", "window"]))
    if form == "transposed" and len(shape) > 1:
        return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)
    if form == "window" and shape:
        return torch.randn(*shape[:-1], shape[-1] + 2, dtype=dtype)[..., 1:-1]
    return torch.randn(shape, dtype=dtype)


def check_all(data: st.DataObject, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Every dimension of the result, cut at random."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    for dim, size in enumerate(target(*args, **(kwargs or {})).shape):
        if size:
            check_tiles(target, args, dim, data.draw(cuts_of(size)), kwargs)


def matmul_shapes(data: st.DataObject) -> tuple[list[int], list[int]]:
    """Shapes of all combinations of ranks, batches broadcast."""
    m, k, n = (data.draw(SIZES) for _ in range(3))
    batch = data.draw(st.lists(SIZES, max_size=2))
    shapes = []
    for matrix, vector in (([m, k], [k]), ([k, n], [k])):
        own = [data.draw(st.sampled_from([1, size])) for size in batch][data.draw(st.integers(0, len(batch))) :]
        shapes.append(data.draw(st.sampled_from([own + matrix, matrix, vector])))
    return shapes[0], shapes[1]


@given(st.data())
def test_matmul_of_all_ranks(data: st.DataObject) -> None:
    left, right = matmul_shapes(data)
    x, other = laid_out(data, *left), laid_out(data, *right)
    check_all(data, aten.matmul.default, (x, other))
    check_reduction(aten.matmul.default, (x, other), len(left) - 1, data.draw(cuts_of(left[-1])))


@given(st.data())
def test_linear_of_any_rank(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, 4), max_size=3))
    k, n = data.draw(SIZES), data.draw(SIZES)
    weight = laid_out(data, n, k) if data.draw(st.booleans()) else laid_out(data, k)
    bias = laid_out(data, data.draw(st.sampled_from([1, n]))) if weight.dim() == 2 and data.draw(st.booleans()) else None
    args = (laid_out(data, *rows, k), weight, bias)
    check_all(data, aten.linear.default, args)
    check_reduction(aten.linear.default, args, len(rows), data.draw(cuts_of(k)))


@given(st.data())
def test_products_of_fixed_rank(data: st.DataObject) -> None:
    b, m, k, n = (data.draw(SIZES) for _ in range(4))
    mm = aten.mm.default, (laid_out(data, m, k), laid_out(data, k, n))
    bmm = aten.bmm.default, (laid_out(data, b, m, k), laid_out(data, b, k, n))
    inner = aten.inner.default, (laid_out(data, b, m, k), laid_out(data, n, k))
    mv = aten.mv.default, (laid_out(data, m, k), laid_out(data, k))
    tensordot = aten.tensordot.default, (laid_out(data, k, m, b), laid_out(data, n, b, k), [0, -1], [-1, 1])
    target, args = data.draw(st.sampled_from([mm, bmm, inner, mv, tensordot]))
    check_all(data, target, args)
    reduced = 0 if target is aten.tensordot.default else args[0].dim() - 1
    check_reduction(target, args, reduced, data.draw(cuts_of(k)))


@given(st.data())
def test_products_with_something_added(data: st.DataObject) -> None:
    b, m, k, n = (data.draw(SIZES) for _ in range(4))
    left, right = laid_out(data, b, m, k), laid_out(data, b, k, n)

    def added(*shape: int) -> Tensor:
        skipped = data.draw(st.integers(0, len(shape)))
        return laid_out(data, *(data.draw(st.sampled_from([1, size])) for size in shape[skipped:]))

    calls = {
        aten.addmm.default: lambda: (added(m, n), left[0], right[0]),
        aten.addmv.default: lambda: (added(m), left[0], right[0, :, 0]),
        aten.addr.default: lambda: (added(m, n), left[0, :, 0], right[0, 0]),
        aten.baddbmm.default: lambda: (added(b, m, n), left, right),
        aten.addbmm.default: lambda: (added(m, n), left, right),
    }
    target = data.draw(st.sampled_from(list(calls)))
    check_all(data, target, calls[target](), {"beta": 0.5, "alpha": -2})


@given(st.data())
def test_vectors(data: st.DataObject) -> None:
    m, n = data.draw(SIZES), data.draw(SIZES)
    for target in (aten.outer.default, aten.ger.default):
        check_all(data, target, (laid_out(data, m), laid_out(data, n)))
    for target in (aten.dot.default, aten.vdot.default):
        check_reduction(target, (laid_out(data, m), laid_out(data, m)), 0, data.draw(cuts_of(m)))


EQUATIONS = [
    "ij,jk->ik", "ij , jk -> ki", "bhid,bhjd->bhij", "bhij,bhjd->bihd", "i,j", "ba,cb", "ij->ji", "bi,bj,ijk->bk",
    "...d,de->...e",    "b...i,i...->...b", "...ij,...jk", "aij,jB", "ii,ij->j", "bij->b",
]  # fmt: skip


@given(st.data(), st.sampled_from(EQUATIONS))
def test_einsum(data: st.DataObject, equation: str) -> None:
    sizes = {letter: data.draw(SIZES) for letter in "aBbcdehijk"}
    hidden = [data.draw(SIZES) for _ in range(data.draw(st.integers(0, 2)))]
    operands = []
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term in terms:
        before, ellipsis, after = term.partition("...")
        own = [data.draw(st.sampled_from([1, size])) for size in hidden][data.draw(st.integers(0, len(hidden))) :]
        shape = [sizes[c] for c in before] + (own if ellipsis else []) + [sizes[c] for c in after]
        operands.append(laid_out(data, *shape))
    check_all(data, aten.einsum.default, (equation, operands))
    output = aten.einsum.default(equation, operands)
    for dim, letter in enumerate(terms[0]):
        if "..." in equation or letter in equation.partition("->")[2] or terms[0].count(letter) > 1 or not output.numel():
            continue
        if "->" in equation or equation.count(letter) > 1:
            check_reduction(aten.einsum.default, (equation, operands), dim, data.draw(cuts_of(sizes[letter])))


def test_letters_of_size_1_broadcast() -> None:
    short, long = torch.randn(4, 1, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    check_tiles(aten.einsum.default, ("ij,kj->ikj", [short, long]), 2, [0, 2, 5])
    check_reduction(aten.einsum.default, ("kj,ij->ik", [long, short]), 1, [0, 2, 5])
    with pytest.raises(Untileable, match="broadcasts its first argument"):
        check_reduction(aten.einsum.default, ("ij,kj->ik", [short, long]), 1, [0, 1])


def test_only_one_part_adds_the_bias() -> None:
    args = (torch.zeros(2, 6, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    check_reduction(aten.linear.default, args, 1, [0, 2, 4, 6])
    call, _, _ = call_on(aten.linear.default, args)
    assert reduce_parts(call, Part(1, 2, 4)).needs == (Part(1, 2, 4), Part(1, 2, 4), None)


def test_a_part_of_the_output_features_needs_its_rows_of_the_weight() -> None:
    args = (torch.zeros(2, 6, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    call, _, _ = call_on(aten.linear.default, args)
    assert tile(call, Part(1, 1, 3)).needs == (None, Part(0, 1, 3), Part(0, 1, 3))
    assert tile(call, Part(0, 1, 2)).needs == (Part(0, 1, 2), None, None)


def test_integers_and_complex_numbers() -> None:
    x, other = torch.randint(-9, 9, (4, 6)), torch.randint(-9, 9, (6, 3))
    check_reduction(aten.mm.default, (x, other), 1, [0, 1, 4, 6])
    check_reduction(aten.mm.default, (x.to(torch.uint8), other.to(torch.uint8)), 1, [0, 1, 4, 6])
    z = torch.randn(6, dtype=torch.complex128)
    check_reduction(aten.vdot.default, (z, z + 1j), 0, [0, 1, 4, 6])


def test_refused() -> None:
    x = torch.randn(3, 3, dtype=torch.float64)
    with pytest.raises(Untileable, match="does not sum over dimension 0"):
        check_reduction(aten.mm.default, (x, x), 0, [0, 1, 3])
    with pytest.raises(Untileable, match="takes the diagonal"):
        check_tiles(aten.einsum.default, ("ii->i", [x]), 0, [0, 1, 3])
    with pytest.raises(Untileable, match="takes the diagonal"):
        check_reduction(aten.einsum.default, ("ii,ij->j", [x, x]), 0, [0, 1, 3])
    with pytest.raises(Untileable, match="has a bias that is no vector"):
        check_tiles(aten.linear.default, (x, x, x), 0, [0, 1, 3])
    with pytest.raises(Untileable, match="multiplies by a single number"):
        check_tiles(aten.inner.default, (x, torch.tensor(2.0, dtype=torch.float64)), 0, [0, 1, 3])
    with pytest.raises(Untileable, match="no tile rule"):
        check_tiles(aten.bilinear.default, (x, x, torch.randn(2, 3, 3, dtype=torch.float64)), 0, [0, 1, 3])
    with pytest.raises(Untileable, match="no rule to merge"):  # its first argument is what is added
        check_reduction(aten.addmm.default, (x, x, x), 1, [0, 1, 3])


@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_partial_sums_are_as_accurate_as_the_whole(data: st.DataObject, dtype: torch.dtype) -> None:
    """Largest error against fp64 at most twice that of the whole operator, one rounding of the result and one of what is added.

    The last in fp32, in which all of them add up: which order kernels of other lengths take, and so how lucky the whole was,
    differs between processors.
    """
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    size = data.draw(st.integers(64, 600))
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((4, size), (8, size), (8,)))
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.linear.default, (x, weight, bias)),
        (aten.matmul.default, (x, weight.t())),
        (aten.einsum.default, ("ik,jk->ij", [x, weight])),
    ]
    target, args = data.draw(st.sampled_from(cases))
    call, tensors, whole = call_on(target, args)
    wide = torch.utils._pytree.tree_map_only(Tensor, Tensor.double, args)
    exact = target(*wide)
    partial, merge = [], None
    for start, stop in pairwise(data.draw(cuts_of(size, 12))):
        reduced = reduce_parts(call, Part(1, start, stop))
        partial.append(reduced.partial(run, [cut(t, need) for t, need in zip(tensors, reduced.needs, strict=True)]))
        merge = reduced.merge
    assert merge is not None
    found = merge(run, torch.stack(partial))
    assert found.dtype == dtype
    added = torch.nn.functional.linear(x.double().abs(), weight.double().abs()).max()
    rounding = torch.finfo(dtype).eps * exact.abs().max() + torch.finfo(torch.float32).eps * added
    assert (found.double() - exact).abs().max() <= 2 * (whole.double() - exact).abs().max() + rounding
