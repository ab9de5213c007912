"""Slices, selections and splits, part by part."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from tests.passes.tile_rules.harness import call_on
from tests.passes.tile_rules.moves import check_parts, listed, parts_of, shapes, tensors

aten = torch.ops.aten


def check_some(data: st.DataObject, target: Any, args: tuple[Any, ...]) -> None:
    """Parts of one dimension of some of the results, at least one; nothing where all are empty."""
    results = listed(target(*args))
    dim = data.draw(st.integers(0, results[0].ndim - 1))
    able = [i for i, result in enumerate(results) if result.numel()]
    if not able:
        return
    chosen = data.draw(st.sets(st.sampled_from(able), min_size=1))
    check_parts(target, args, [data.draw(parts_of(r.shape, dim)) if i in chosen else None for i, r in enumerate(results)])


@given(st.data())
def test_sliced(data: st.DataObject) -> None:
    x = data.draw(tensors(data.draw(shapes(largest=9))))
    dim, edge = data.draw(st.integers(-x.ndim, x.ndim - 1)), st.none() | st.integers(-12, 12)
    step = data.draw(st.integers(1, 4))
    check_some(data, aten.slice.Tensor, (x, dim, data.draw(edge), data.draw(edge), step))
    check_some(data, aten.slice.Tensor, (x, dim))


@given(st.data())
def test_narrowed(data: st.DataObject) -> None:
    x = data.draw(tensors(data.draw(shapes(largest=9))))
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    part = data.draw(parts_of(x.shape, dim % x.ndim))
    start = part.start - x.shape[dim] * data.draw(st.booleans())
    check_some(data, aten.narrow.default, (x, dim, start, part.size))


@given(st.data())
def test_selected(data: st.DataObject) -> None:
    x = data.draw(tensors(data.draw(shapes(2))))
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    index = data.draw(st.integers(-x.shape[dim], x.shape[dim] - 1))
    check_some(data, aten.select.int, (x, dim, index))
    check_some(data, aten.unbind.int, (x, dim))


@given(st.data())
def test_split(data: st.DataObject) -> None:
    x = data.draw(tensors(data.draw(shapes(largest=8))))
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    count = data.draw(st.integers(1, 9))
    check_some(data, aten.split.Tensor, (x, count, dim))
    check_some(data, aten.chunk.default, (x, count, dim))
    check_some(data, aten.tensor_split.sections, (x, count, dim))
    check_some(data, aten.tensor_split.indices, (x, data.draw(st.lists(st.integers(-9, 9), max_size=4)), dim))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, x.shape[dim]), max_size=4))), x.shape[dim]]
    sizes = [b - a for a, b in pairwise(edges)]
    check_some(data, aten.split_with_sizes.default, (x, sizes, dim))
    check_some(data, aten.split.sizes, (x, sizes, dim))


def test_the_piece_itself_needs_no_operator() -> None:
    def run(*_: Any) -> Any:
        raise AssertionError("called")

    x = torch.randn(6, 4)
    for target, args in ((aten.slice.Tensor, (x, 0, 2, 6)), (aten.narrow.default, (x, 0, 2, 4))):
        call, _, _ = call_on(target, args)
        tiled = tile(call, Part(0, 1, 3))
        assert tiled.needs == (Part(0, 3, 5),)
        assert tiled.compute(run, ["x"]) == "x"


def test_halves_of_a_split_along_itself_need_what_lies_between() -> None:
    call, _, _ = call_on(aten.chunk.default, (torch.randn(8), 2))
    assert tile(call, Part(0, 1, 2), Part(0, 0, 3)).needs == (Part(0, 1, 7),)
    assert tile(call, None, Part(0, 0, 3)).needs == (Part(0, 4, 7),)


def test_parts_of_different_dimensions() -> None:
    call, _, _ = call_on(aten.chunk.default, (torch.randn(8, 4), 2))
    with pytest.raises(Untileable, match="parts of different dimensions"):
        tile(call, Part(0, 1, 2), Part(1, 0, 3))
