"""Look-ups, triangles, sorting and reversing, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from tests.passes.tile_rules.drawing import integers, shapes, values
from tests.passes.tile_rules.harness import call_on, check_tiles, cuts_of

aten = torch.ops.aten


@given(st.data())
def test_embedding(data: st.DataObject) -> None:
    table, ids = data.draw(values([7, 5])), data.draw(integers(data.draw(shapes(1, 3)), 7))
    shape = [*ids.shape, 5]
    dim = data.draw(st.integers(0, len(shape) - 1))
    check_tiles(aten.embedding.default, (table, ids, 0), dim, data.draw(cuts_of(shape[dim])))


@given(st.data())
def test_along_one_dimension(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x, rank = data.draw(values(shape)), len(shape)
    along, dim = data.draw(st.integers(-rank, rank - 1)), data.draw(st.integers(0, rank - 1))
    result = [data.draw(st.integers(1, 6)) if d == along % rank else n for d, n in enumerate(shape)]
    cuts = data.draw(cuts_of(result[dim]))
    flat = data.draw(integers([result[along]], shape[along]))
    check_tiles(aten.index_select.default, (x, along, flat), dim, cuts)
    full = data.draw(integers(result, shape[along]))
    check_tiles(aten.take_along_dim.default, (x, full, along), dim, cuts)
    check_tiles(
        aten.take_along_dim.default, (x, full.narrow(dim, 0, 1), along), dim, [0, 1 if dim == along % rank else shape[dim]]
    )
    smaller = [n if d == along % rank else data.draw(st.integers(1, n)) for d, n in enumerate(result)]
    full = full[tuple(slice(n) for n in smaller)]
    check_tiles(aten.gather.default, (x, along, full), dim, data.draw(cuts_of(smaller[dim])))


@given(st.data())
def test_index(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x = data.draw(values(shape))
    indexed = data.draw(st.lists(st.booleans(), min_size=1, max_size=len(shape)))
    common = data.draw(shapes(1, 2, 4))
    indices = []
    for n, used in zip(shape, indexed, strict=False):
        ones = [1 if data.draw(st.booleans()) else m for m in common][data.draw(st.integers(0, len(common))) :]
        indices.append(data.draw(integers(ones, n, -n)) if used else None)
    result = aten.index.Tensor(x, indices).shape if any(indexed) else x.shape
    for dim, size in enumerate(result):
        if any(indexed):
            check_tiles(aten.index.Tensor, (x, indices), dim, data.draw(cuts_of(size)))
            check_tiles(aten._unsafe_index.Tensor, (x, indices), dim, data.draw(cuts_of(size)))


def test_tables() -> None:
    ids = torch.randint(0, 9, (3, 4))
    check_tiles(aten.index.Tensor, (torch.randn(9, 5), [ids]), 1, [0, 1, 4])
    check_tiles(aten.one_hot.default, (ids, 9), 1, [0, 1, 4])
    check_tiles(aten.bucketize.Tensor, (ids, torch.arange(0, 9, 2)), 0, [0, 1, 3], {"right": True})
    check_tiles(aten.isin.Tensor_Tensor, (ids, torch.tensor([1, 3])), 0, [0, 1, 3])


@given(st.data())
def test_triangles(data: st.DataObject) -> None:
    shape = data.draw(shapes(2))
    x, diagonal = data.draw(values(shape)), data.draw(st.integers(-7, 7))
    dim = data.draw(st.integers(0, len(shape) - 1))
    operator = data.draw(st.sampled_from([aten.tril.default, aten.triu.default]))
    check_tiles(operator, (x, diagonal), dim, data.draw(cuts_of(shape[dim])))


def test_tiles_on_one_side_of_the_diagonal_look_alike() -> None:
    call, _, _ = call_on(aten.tril.default, (torch.ones(8, 4),))
    calls = []
    for start in (4, 6):
        tile(call, Part(0, start, start + 2)).compute(lambda *args, **kwargs: calls.append((args, kwargs)), ["x"])
    assert calls[0] == calls[1]


@given(st.data())
def test_order(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x, rank = data.draw(values(shape)), len(shape)
    along, dim = data.draw(st.integers(-rank, rank - 1)), data.draw(st.integers(0, rank - 1))
    cuts, output = data.draw(cuts_of(shape[dim])), data.draw(st.integers(0, 1))
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], int]] = [
        (aten.sort.default, (x, along, True), {}, output),
        (aten.sort.stable, (x,), {"stable": True, "dim": along}, output),
        (aten.argsort.default, (x, along), {}, 0),
        (aten.argsort.stable, (x,), {"stable": True, "dim": along}, 0),
        (aten.topk.default, (x, 1, along), {}, output),
    ]
    for operator, args, kwargs, each in calls:
        if along % rank != dim:
            check_tiles(operator, args, dim, cuts, kwargs, each)
        else:
            with pytest.raises(Untileable, match=f"sorts over dimension {dim}"):
                check_tiles(operator, args, dim, cuts, kwargs, each)


@given(st.data())
def test_reversed_rolled_and_repeated(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x, rank = data.draw(values(shape)), len(shape)
    along, dim = data.draw(st.integers(-rank, rank - 1)), data.draw(st.integers(0, rank - 1))
    cuts = data.draw(cuts_of(shape[dim]))
    check_tiles(aten.flip.default, (x, [along]), dim, cuts)
    check_tiles(aten.flip.default, (x, list(range(rank))), dim, cuts)
    if along % rank != dim:
        check_tiles(aten.roll.default, (x, [2], [along]), dim, cuts)
    else:
        with pytest.raises(Untileable, match=f"rolls over dimension {dim}"):
            check_tiles(aten.roll.default, (x, [2], [along]), dim, cuts)
    times = data.draw(st.integers(1, 3))
    size = shape[dim] * (times if along % rank == dim else 1)
    total = data.draw(st.sampled_from([None, shape[along] * times]))
    check_tiles(aten.repeat_interleave.self_int, (x, times, along), dim, data.draw(cuts_of(size)), {"output_size": total})


@given(st.data())
def test_differences(data: st.DataObject) -> None:
    shape = [n + 2 for n in data.draw(shapes())]
    x, rank, order = data.draw(values(shape)), len(shape), data.draw(st.integers(0, 2))
    along, dim = data.draw(st.integers(-rank, rank - 1)), data.draw(st.integers(0, rank - 1))
    size = shape[dim] - (order if along % rank == dim else 0)
    check_tiles(aten.diff.default, (x, order, along), dim, data.draw(cuts_of(size)))
    ends = (aten.diff.default, (x, 1, along, x.narrow(along, 0, 1), x.narrow(along, 0, 2)))
    if along % rank != dim:
        check_tiles(*ends, dim, data.draw(cuts_of(shape[dim])))
    else:
        with pytest.raises(Untileable, match=f"puts something to the ends of dimension {dim}"):
            check_tiles(*ends, dim, [0, shape[dim]])


@pytest.mark.parametrize(
    ("operator", "args", "reason"),
    [
        (aten.index.Tensor, ([torch.tensor([True, False, True, True])],), "looks up by a mask"),
        (aten.take_along_dim.default, (torch.tensor([1, 2]),), "looks up in its flattened input"),
        (aten.roll.default, ([1],), "rolls its flattened input"),
        (aten.repeat_interleave.self_int, (2,), "repeats its flattened input"),
        (aten.scatter.src, (0, torch.zeros(4, 3, dtype=torch.int64), torch.rand(4, 3)), "has no tile rule"),
        (aten.masked_select.default, (torch.ones(4, 3) > 0,), "has no tile rule"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused(operator: Any, args: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(Untileable, match=reason):
        check_tiles(operator, (torch.rand(4, 3), *args), 0, [0, 1])


def test_classes_are_refused() -> None:
    ids = torch.tensor([0, 2, 1])
    with pytest.raises(Untileable, match="makes rows over dimension 1"):
        check_tiles(aten.one_hot.default, (ids, 3), 1, [0, 1, 3])
    with pytest.raises(Untileable, match="has as many classes as its input says"):
        check_tiles(aten.one_hot.default, (ids,), 0, [0, 1, 3])
