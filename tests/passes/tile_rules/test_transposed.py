"""Transposed convolutions, part by part."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from tests.passes.tile_rules.harness import call_on, check_tiles, cuts_of
from tests.passes.tile_rules.poison import check_needs
from tests.passes.tile_rules.test_convolutions import Drawn, calls_of, check_spatial, strided

aten = torch.ops.aten

NAMED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


@st.composite
def transposed(draw: st.DrawFn, data: st.DataObject, general: bool = False) -> Drawn:
    """Any transposed convolution that has a result."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    rank = draw(st.integers(1, 3))
    kernel, stride, dilation, padding, extra, sizes = [], [], [], [], [], []
    for _ in range(rank):
        k, s, d, n = (draw(st.integers(1, most)) for most in (4, 4, 3, 5))
        e = draw(st.integers(0, max(s, d) - 1))
        p = draw(st.integers(0, max(0, ((n - 1) * s + d * (k - 1) + e) // 2)))
        for to, value in zip((kernel, stride, dilation, padding, extra, sizes), (k, s, d, p, e, n), strict=True):
            to.append(value)
    groups, inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    batch = [] if not general and draw(st.booleans()) else [draw(st.integers(1, 2))]
    x = strided(data, [*batch, groups * inputs, *sizes])
    weight = torch.randn(groups * inputs, outputs, *kernel, dtype=torch.float64)
    bias = torch.randn(groups * outputs, dtype=torch.float64) if draw(st.booleans()) else None
    if general:
        return Drawn(aten.convolution.default, (x, weight, bias, stride, padding, dilation, True, extra, groups), rank)
    return Drawn(NAMED[rank], (x, weight, bias, stride, padding, extra, groups, dilation), rank)


@given(st.data())
def test_rows(data: st.DataObject) -> None:
    check_spatial(data, data.draw(transposed(data)))


@given(st.data())
def test_rows_of_the_general_operator(data: st.DataObject) -> None:
    drawn = data.draw(transposed(data, general=True))
    check_spatial(data, drawn)
    check_spatial(data, Drawn(aten._convolution.default, (*drawn.args, False, False, True, False), drawn.rank))


@given(st.data())
def test_images_of_a_batch(data: st.DataObject) -> None:
    drawn = data.draw(transposed(data, general=True))
    check_tiles(drawn.target, drawn.args, 0, data.draw(cuts_of(drawn.sizes[0])))


@given(st.data())
def test_channels(data: st.DataObject) -> None:
    """Of any group; only a part of several groups that lies in all of them is refused."""
    general = data.draw(st.booleans())
    drawn = data.draw(transposed(data, general=general))
    dim = len(drawn.sizes) - drawn.rank - 1
    groups, channels = drawn.args[8 if general else 6], drawn.sizes[dim]
    cuts = data.draw(cuts_of(channels))
    per_group = channels // groups
    for a, b in pairwise(cuts):
        if groups > 1 and b - a < channels and a < per_group and b > channels - per_group:
            with pytest.raises(Untileable, match="without all of its"):
                check_tiles(drawn.target, drawn.args, dim, [a, b])
        else:
            check_tiles(drawn.target, drawn.args, dim, [a, b])


@given(st.data())
def test_no_row_is_needed_in_vain(data: st.DataObject) -> None:
    """Of parts that a row reaches at all."""
    drawn = data.draw(transposed(data))
    sizes = drawn.sizes
    reached = [reached_in(drawn, axis) for axis in range(drawn.rank)]
    if not all(any(axis) for axis in reached):
        return
    axis = data.draw(st.integers(0, drawn.rank - 1))
    dim = axis + len(sizes) - drawn.rank
    cuts = data.draw(cuts_of(sizes[dim]))
    for a, b in pairwise(cuts):
        if any(reached[axis][a:b]):
            check_needs(drawn.target, drawn.args, dim, [a, b])


def reached_in(drawn: Drawn, axis: int) -> list[bool]:
    """Whether any row of the argument adds to each result along a spatial dimension, by brute force."""
    x, weight, _, stride, padding, _, _, dilation = drawn.args
    rows, taps = range(x.shape[axis - drawn.rank]), range(weight.shape[2 + axis])
    hit = {i * stride[axis] - padding[axis] + dilation[axis] * j for i in rows for j in taps}
    return [o in hit for o in range(drawn.sizes[axis - drawn.rank])]


def test_results_of_nothing_but_the_bias() -> None:
    """Between windows where the stride is larger than the kernel, and after the last where there is output padding."""
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    weight, bias = torch.randn(2, 2, 1, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    args = (x, weight, bias, [4], [0], [3])
    check_tiles(aten.conv_transpose1d.default, args, 2, [0, 1, 4, 6, 8, 9, 11, 12])
    x.fill_(torch.nan)
    check_tiles(aten.conv_transpose1d.default, args, 2, [1, 4])


def test_channels_of_one_of_several_groups() -> None:
    args = (torch.randn(2, 6, 9), torch.randn(6, 3, 3), torch.randn(9), [1], [1], [0], 3)
    call, _, _ = call_on(aten.conv_transpose1d.default, args)
    assert tile(call, Part(1, 4, 5)).needs == (Part(1, 2, 4), Part(0, 2, 4), Part(0, 4, 5))
    assert tile(call, Part(1, 3, 9)).needs == (Part(1, 2, 6), Part(0, 2, 6), Part(0, 3, 9))
    whole = call_on(aten.conv_transpose1d.default, (args[0], args[1], args[2][:3]))[0]
    assert tile(whole, Part(1, 1, 3)).needs == (None, Part(1, 1, 3), Part(0, 1, 3))


def test_a_tile_inside_is_one_operator() -> None:
    """The operator's own padding cuts off on both sides alike what its rows add to other tiles."""
    args: tuple[Any, ...] = (torch.randn(1, 4, 32), torch.randn(4, 4, 4), None, [2], [1])
    calls = calls_of(args, Part(2, 16, 32), aten.conv_transpose1d.default)
    assert [operator for operator, _ in calls] == [aten.conv_transpose1d.default]
    assert calls == calls_of(args, Part(2, 32, 48), aten.conv_transpose1d.default), "tiles inside are computed alike"
