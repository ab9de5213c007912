"""Joined tensors, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from tests.passes.tile_rules.harness import call_on, check_tiles, cut
from tests.passes.tile_rules.moves import check_parts, parts_of, shapes, tensors

aten = torch.ops.aten


@st.composite
def pieces(draw: st.DrawFn, shape: list[int], dim: int) -> list[torch.Tensor]:
    """Tensors that differ along one dimension, some without elements, the first never."""
    sizes = [shape[dim], *draw(st.lists(st.integers(0, 4), max_size=3))]
    return [draw(tensors([size if d == dim else n for d, n in enumerate(shape)])) for size in sizes]


@given(st.data())
def test_concatenated(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    dim = data.draw(st.integers(0, len(shape) - 1))
    given_ = data.draw(pieces(shape, dim))
    if data.draw(st.booleans()):
        given_.insert(data.draw(st.integers(0, len(given_))), torch.zeros(0, dtype=torch.float64))
    asked = dim - len(shape) * data.draw(st.booleans())
    for target in (aten.cat.default, aten.concat.default, aten.concatenate.default):
        check_parts(target, (given_, asked), [data.draw(parts_of(target(given_, asked).shape))])


@given(st.data())
def test_rows_and_columns(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    given_ = data.draw(pieces(shape, min(len(shape) - 1, 1)))
    check_parts(aten.hstack.default, (given_,), [data.draw(parts_of(aten.hstack.default(given_).shape))])
    if len(shape) > 1:
        given_ = data.draw(pieces(shape, 0))
        check_parts(aten.vstack.default, (given_,), [data.draw(parts_of(aten.vstack.default(given_).shape))])


@given(st.data())
def test_stacked(data: st.DataObject) -> None:
    shape = data.draw(shapes(0))
    given_ = [data.draw(tensors(shape)) for _ in range(data.draw(st.integers(1, 4)))]
    dim = data.draw(st.integers(-len(shape) - 1, len(shape)))
    check_parts(aten.stack.default, (given_, dim), [data.draw(parts_of(torch.stack(given_, dim).shape))])


@pytest.mark.parametrize("target", [aten.cat.default, aten.stack.default])
@pytest.mark.parametrize("dim", [0, 1])
def test_types_are_those_of_the_whole(target: Any, dim: int) -> None:
    """Large integers survive double precision, not single: no piece may go by way of the type of a few."""
    given_ = [torch.full((2, 3), 2**24 + 1), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)]
    check_tiles(target, (given_, dim), dim, [0, 1, 2, 3])
    check_tiles(target, (given_, dim), dim, [0, 2, 3])
    check_tiles(target, (given_, dim), 1 - dim, [0, 1, 2])


def called(target: Any, args: tuple[Any, ...], part: Part) -> list[Any]:
    """The operators that compute the part."""
    call, found, _ = call_on(target, args)
    tiled, out = tile(call, part), []

    def run(operator: Any, *args_: Any, **kwargs: Any) -> Any:
        out.append(operator)
        return operator(*args_, **kwargs)

    tiled.compute(run, [cut(t, need) for t, need in zip(found, tiled.needs, strict=True)])
    return out


def test_only_tensors_in_the_interval_are_joined() -> None:
    given_ = [torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(2, 2)]
    call, _, _ = call_on(aten.cat.default, (given_,))
    assert tile(call, Part(0, 3, 5)).needs == (Part(0, 3, 3), Part(0, 0, 2), Part(0, 0, 0))
    assert called(aten.cat.default, (given_,), Part(0, 3, 5)) == []
    assert called(aten.cat.default, (given_,), Part(0, 3, 8)) == [aten.cat.default]
    assert called(aten.cat.default, (given_,), Part(1, 0, 1)) == [aten.cat.default]
    assert called(aten.stack.default, ([*given_[:1], *given_[:1]],), Part(0, 0, 1)) == [aten.unsqueeze.default]


def test_grids_are_made_whole() -> None:
    call, _, _ = call_on(aten.meshgrid.indexing, ([torch.zeros(2), torch.zeros(3)],), {"indexing": "ij"})
    with pytest.raises(Untileable, match="makes grids of a few numbers"):
        tile(call, Part(0, 0, 1), None)
