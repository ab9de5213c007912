"""Reductions, along what they keep and merged of parts of what they reduce; scans."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, reduce_parts
from tests.passes.tile_rules.drawing import shapes, values
from tests.passes.tile_rules.harness import call_on, check_reduction, check_tiles, cuts_of, run

aten = torch.ops.aten


@st.composite
def reductions(draw: st.DrawFn, x: torch.Tensor) -> tuple[Any, tuple[Any, ...], dict[str, Any], list[int], bool, int]:
    """An operator on x, its arguments, what it reduces, whether that stays with size 1, and how many results it has."""
    rank, keep = x.dim(), draw(st.booleans())
    one = draw(st.integers(-rank, rank - 1))
    some = draw(st.lists(st.integers(0, rank - 1), unique=True, min_size=1))
    some = [dim - draw(st.sampled_from([0, rank])) for dim in some]
    single: list[tuple[Any, tuple[Any, ...], dict[str, Any], int]] = [
        (aten.any.dim, (x > 1, one, keep), {}, 1), (aten.all.dim, (x > -1, one, keep), {}, 1),
        (aten.max.dim, (x, one, keep), {}, 2), (aten.min.dim, (x, one, keep), {}, 2),
        (aten.argmax.default, (x, one, keep), {}, 1), (aten.argmin.default, (x, one, keep), {}, 1),
        (aten.prod.dim_int, (x, one, keep), {}, 1), (aten.aminmax.default, (x,), {"dim": one, "keepdim": keep}, 2),
        (aten.median.dim, (x, one, keep), {}, 2), (aten.kthvalue.default, (x, 1, one, keep), {}, 2),
    ]  # fmt: skip
    several: list[tuple[Any, tuple[Any, ...], dict[str, Any], int]] = [
        (aten.sum.dim_IntList, (x, some, keep), {}, 1), (aten.sum.dim_IntList, (x > 0, some, keep), {"dtype": torch.int32}, 1),
        (aten.mean.dim, (x, some, keep), {}, 1), (aten.nansum.default, (x, some, keep), {}, 1),
        (aten.amax.default, (x, some, keep), {}, 1), (aten.amin.default, (x, some, keep), {}, 1),
        (aten.any.dims, (x > 1, some, keep), {}, 1), (aten.all.dims, (x > -1, some, keep), {}, 1),
        (aten.var_mean.correction, (x, some), {"correction": 0, "keepdim": keep}, 2),
        (aten.var.dim, (x, some, False, keep), {}, 1), (aten.std.correction, (x, some), {"correction": 0, "keepdim": keep}, 1),
        (aten.logsumexp.default, (x, some, keep), {}, 1),
        (aten.linalg_vector_norm.default, (x, 2, some, keep), {}, 1), (aten.norm.ScalarOpt_dim, (x, None, some, keep), {}, 1),
    ]  # fmt: skip
    operator, args, kwargs, results = draw(st.sampled_from(single + several))
    dims = [one % rank] if any(operator is entry[0] for entry in single) else [dim % rank for dim in some]
    return operator, args, kwargs, dims, keep, results


@given(st.data())
def test_along_what_is_kept(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    operator, args, kwargs, dims, keep, results = data.draw(reductions(data.draw(values(shape))))
    sizes = [1 if dim in dims else n for dim, n in enumerate(shape) if keep or dim not in dims]
    output = data.draw(st.integers(0, results - 1))
    for dim, size in enumerate(sizes):
        cuts = data.draw(cuts_of(size))
        if keep and dim in dims:
            with pytest.raises(Untileable, match=f"reduces over dimension {dim}"):
                check_tiles(operator, args, dim, cuts, kwargs, output)
        else:
            check_tiles(operator, args, dim, cuts, kwargs, output)


@given(st.data())
def test_merged(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x, rank, keep = data.draw(values(shape)), len(shape), data.draw(st.booleans())
    dims = data.draw(st.lists(st.integers(-rank, rank - 1), unique_by=lambda dim: dim % rank, min_size=1))
    order = data.draw(st.sampled_from([1, 2, 3.5, float("inf")]))
    operator, args, kwargs = data.draw(
        st.sampled_from(
            [
                (aten.sum.dim_IntList, (x, dims, keep), {}),
                (aten.sum.dim_IntList, (x.float(), dims, keep), {"dtype": torch.float64}),
                (aten.sum.dim_IntList, (x > 0, dims, keep), {}),
                (aten.mean.dim, (x, dims, keep), {}),
                (aten.amax.default, (x, dims, keep), {}),
                (aten.amin.default, (x, dims, keep), {}),
                (aten.any.dims, (x > 1, dims, keep), {}),
                (aten.all.dim, (x > -1, dims[0], keep), {}),
                (aten.linalg_vector_norm.default, (x, order, dims, keep), {}),
                (aten.norm.ScalarOpt_dim, (x, 2, dims, keep), {}),
            ]
        )
    )
    dim = data.draw(st.sampled_from(dims)) % rank if operator is not aten.all.dim else dims[0] % rank
    check_reduction(operator, args, dim, data.draw(cuts_of(shape[dim])), kwargs)


@pytest.mark.parametrize("dim", [0, 1])
def test_merged_to_one_number(dim: int) -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    for operator in (aten.sum.default, aten.mean.default, aten.max.default, aten.min.default):
        check_reduction(operator, (x,), dim, [0, 2, x.shape[dim]])
    check_reduction(aten.norm.Scalar, (x, 2), dim, [0, 2, x.shape[dim]])
    check_reduction(aten.any.default, (x > 0,), dim, [0, 2, x.shape[dim]])
    check_reduction(aten.amax.default, (x,), dim, [0, 2, x.shape[dim]])


def test_extremes_of_nan_and_infinity() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), 1.0, 2.0], [-1.0, 0.0, 3.0]], dtype=torch.float64)
    check_reduction(aten.amax.default, (x, [1]), 1, [0, 1, 3])
    check_reduction(aten.sum.dim_IntList, (x, [1]), 1, [0, 1, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", [aten.sum.dim_IntList, aten.mean.dim, aten.linalg_vector_norm.default])
def test_half_is_added_in_fp32(dtype: torch.dtype, operator: Any) -> None:
    """4,096 ones and more: in half their sum would stop growing."""
    x = torch.ones(1, 9000).to(dtype)
    args = (x, 2, [1]) if operator is aten.linalg_vector_norm.default else (x, [1])
    call, _, whole = call_on(operator, args)
    partial = []
    for start, stop in pairwise([0, 4500, 9000]):
        reduced = reduce_parts(call, Part(1, start, stop))
        partial.append(reduced.partial(run, [x[:, start:stop]]))
    assert {each.dtype for each in partial} == {torch.float32}
    merged = reduced.merge(run, torch.stack(partial))
    assert torch.equal(merged, whole)
    exact = {aten.sum.dim_IntList: 9000.0, aten.mean.dim: 1.0, aten.linalg_vector_norm.default: 9000**0.5}[operator]
    assert torch.equal(merged, torch.tensor([exact], dtype=torch.float64).to(dtype))


@given(st.data())
def test_scans(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x, along = data.draw(values(shape)), data.draw(st.integers(0, len(shape) - 1))
    dim = data.draw(st.integers(0, len(shape) - 1))
    operator = data.draw(st.sampled_from([aten.cumsum.default, aten.cumprod.default, aten.cummax.default]))
    cuts = data.draw(cuts_of(shape[dim]))
    if dim != along:
        check_tiles(operator, (x, along - len(shape)), dim, cuts, output=int(operator is aten.cummax.default))
    else:
        with pytest.raises(Untileable, match=f"accumulates over dimension {dim}"):
            check_tiles(operator, (x, along), dim, cuts)


@pytest.mark.parametrize(
    ("operator", "args", "kwargs", "reason"),
    [
        (aten.sum.dim_IntList, ([0],), {}, "keeps dimension 1"),
        (aten.sum.dim_IntList, ([1],), {"dtype": torch.bfloat16}, "rounds to torch.bfloat16 before it adds"),
        (aten.sum.dim_IntList, ([1],), {"dtype": torch.int64}, "rounds to torch.int64 before it adds"),
        (aten.sum.dim_IntList, ([1],), {"dtype": torch.bool}, "whose sums are not sums of parts"),
        (aten.linalg_vector_norm.default, (0.5, [1]), {}, "has no norm of norms"),
        (aten.argmax.default, (1,), {}, "has no rule to merge partial results"),
    ],
    ids=str,
)
def test_refused(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(Untileable, match=reason):
        check_reduction(operator, (torch.rand(4, 3), *args), 1, [0, 1, 3], kwargs)


def test_half_of_integers_is_refused() -> None:
    with pytest.raises(Untileable, match=r"rounds to torch.float16 before it adds"):
        check_reduction(
            aten.sum.dim_IntList, (torch.ones(4, 3, dtype=torch.int64), [1]), 1, [0, 1, 3], {"dtype": torch.float16}
        )
