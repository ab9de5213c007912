"""Reshapes, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from passes.tile_rules.reshapes import factor_groups
from tests.passes.tile_rules.harness import call_on, check_tiles, cuts_of, run
from tests.passes.tile_rules.moves import check_parts, elements_read, hull_along, parts_of, shapes, tensors

aten = torch.ops.aten


@st.composite
def factorisations(draw: st.DrawFn, primes: Sequence[int]) -> list[int]:
    """A shape of the product of these factors, in this order, with dimensions of size 1 here and there."""
    shape = [1]
    for prime in primes:
        if draw(st.booleans()):
            shape.append(1)
        shape[-1] *= prime
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return shape


@st.composite
def pairs_of_shapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    primes = draw(st.lists(st.sampled_from([2, 2, 2, 3, 3, 5]), min_size=1, max_size=5))
    other = primes if draw(st.booleans()) else draw(st.permutations(primes))
    return draw(factorisations(primes)), draw(factorisations(other))


@given(pairs_of_shapes())
def test_groups_are_the_finest(pair: tuple[list[int], list[int]]) -> None:
    source, target = pair
    groups = factor_groups(source, target)
    assert [d for ours, _ in groups for d in ours] == [d for d, n in enumerate(source) if n > 1]
    assert [d for _, theirs in groups for d in theirs] == [d for d, n in enumerate(target) if n > 1]
    for ours, theirs in groups:
        sides = [
            [prod(shape[d] for d in dims[:i]) for i in range(1, len(dims))]
            for shape, dims in ((source, ours), (target, theirs))
        ]
        assert prod(source[d] for d in ours) == prod(target[d] for d in theirs)
        assert not set(sides[0]) & set(sides[1])


@given(st.data())
def test_any_part_of_an_outermost_dimension(data: st.DataObject) -> None:
    source, target = data.draw(pairs_of_shapes())
    outermost = [theirs[0] for _, theirs in factor_groups(source, target)] + [d for d, n in enumerate(target) if n == 1]
    part = data.draw(parts_of(target, data.draw(st.sampled_from(outermost))))
    check_parts(aten.reshape.default, (data.draw(tensors(source)), target), [part])


@given(st.data())
def test_what_is_refused_is_strewn(data: st.DataObject) -> None:
    """Of a refused dimension two neighbouring elements need half of every dimension of the input, or more, somewhere."""
    source, target = data.draw(pairs_of_shapes())
    dim = data.draw(st.integers(0, len(target) - 1))
    x = torch.zeros(source, dtype=torch.float64)
    call, _, _ = call_on(aten.reshape.default, (x, target))
    ends = range(2, target[dim] + 1) if target[dim] > 1 else [1]
    parts = [Part(dim, max(end - 2, 0), end) for end in ends]
    try:
        tile(call, parts[0])
    except Untileable:
        read = [elements_read(aten.reshape.default, (x, target), [part])[0] for part in parts]
        for axis, size in enumerate(source):
            if size > 1:
                assert max(stop - start for start, stop in (hull_along(mask, axis) for mask in read)) >= size / 2


@given(st.data())
def test_cuts_of_a_dimension_need_parts_of_the_same_dimension(data: st.DataObject) -> None:
    source, target = data.draw(pairs_of_shapes())
    call, _, _ = call_on(aten.reshape.default, (torch.zeros(source), target))
    dim = data.draw(st.integers(0, len(target) - 1))
    try:
        needs = [tile(call, data.draw(parts_of(target, dim))).needs[0] for _ in range(4)]
    except Untileable:
        return
    assert len({need and need.dim for need in needs}) == 1


@given(st.data())
def test_every_way_to_write_it(data: st.DataObject) -> None:
    shape = data.draw(shapes(2))
    start = data.draw(st.integers(0, len(shape) - 1))
    stop = data.draw(st.integers(start, len(shape) - 1))
    flat = [*shape[:start], prod(shape[start : stop + 1]), *shape[stop + 1 :]]
    x = data.draw(tensors(shape))
    dense = torch.empty(shape, dtype=torch.float64).copy_(x)
    other, negative = torch.zeros(flat), st.sampled_from([0, len(shape)])
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.view.default, (dense, flat)),
        (aten._unsafe_view.default, (dense, [-1 if d == start else n for d, n in enumerate(flat)])),
        (aten.reshape.default, (x, [-1 if d == start else n for d, n in enumerate(flat)])),
        (aten.flatten.using_ints, (x, start - data.draw(negative), stop - data.draw(negative))),
        (aten.view_as.default, (dense, other)),
        (aten.reshape_as.default, (x, other)),
    ]
    part = data.draw(parts_of(flat))
    for target, args in calls:
        check_parts(target, args, [part])
    check_parts(aten.ravel.default, (x,), [data.draw(parts_of([prod(shape)]))])
    split = data.draw(st.sampled_from([shape[start : stop + 1], [-1, *shape[start + 1 : stop + 1]]]))
    check_parts(aten.unflatten.int, (data.draw(tensors(flat)), start, split), [data.draw(parts_of(shape, start))])


def test_a_view_of_a_part_that_has_no_such_view() -> None:
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    check_tiles(aten.view.default, (x, [2, 24]), 1, [0, 5, 8, 24])
    check_tiles(aten.view.default, (x.view(48), [2, 4, 6]), 0, [0, 1, 2])


def test_an_aligned_part_is_one_reshape() -> None:
    call, tensors_, _ = call_on(aten.view.default, (torch.randn(2, 6, 4), [2, 24]))
    tiled = tile(call, Part(1, 8, 16))
    assert tiled.needs == (Part(1, 2, 4),)
    called: list[Any] = []
    tiled.compute(lambda target, *args: called.append(target) or run(target, *args), [tensors_[0].narrow(1, 2, 2)])
    assert called == [aten.reshape.default]


def test_an_unaligned_part_is_cut_out_of_its_hull() -> None:
    """`[12] -> [3, 4]` of rows of 6."""
    call, _, _ = call_on(aten.reshape.default, (torch.randn(2, 6), [3, 4]))
    assert tile(call, Part(0, 0, 1)).needs == (Part(0, 0, 1),)
    assert tile(call, Part(0, 1, 2)).needs == (Part(0, 0, 2),)


def test_heads_are_tiled_and_what_is_in_a_head_is_not() -> None:
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    check_tiles(aten.view.default, (x, [2, 5, 3, 4]), 2, [0, 1, 3])
    with pytest.raises(Untileable, match="spreads dimension 3 of its result over all of dimension 2"):
        check_tiles(aten.view.default, (x, [2, 5, 3, 4]), 3, [0, 2])


def test_nothing_to_reshape() -> None:
    with pytest.raises(Untileable, match="has no elements"):
        check_tiles(aten.reshape.default, (torch.zeros(0, 4), [0, 2, 2]), 1, [0, 1])
    check_tiles(aten.reshape.default, (torch.tensor(2.0), [1, 1]), 1, [0, 1])


@given(st.data())
def test_another_type_for_the_same_bits(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x = data.draw(tensors(shape))
    dim = data.draw(st.integers(0, len(shape) - 1))
    check_tiles(aten.view.dtype, (x, torch.int64), dim, data.draw(cuts_of(shape[dim])))


def test_another_type_of_another_size() -> None:
    with pytest.raises(Untileable, match="changes the size of an element"):
        check_tiles(aten.view.dtype, (torch.zeros(4, 4), torch.float64), 0, [0, 1])
