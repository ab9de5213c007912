"""Pools, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from tests.passes.tile_rules.harness import call_on, check_tiles, cuts_of, run
from tests.passes.tile_rules.poison import check_needs
from tests.passes.tile_rules.test_convolutions import Drawn, calls_of, check_spatial, strided

aten = torch.ops.aten

AVERAGES = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}
MAXIMA = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}
WITH_INDICES = {
    1: aten.max_pool1d_with_indices.default,
    2: aten.max_pool2d_with_indices.default,
    3: aten.max_pool3d_with_indices.default,
}


@st.composite
def pools(draw: st.DrawFn, data: st.DataObject, maximum: bool) -> Drawn:
    """Any pool that has a result."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    rank = draw(st.integers(1, 3))
    kernel, stride, padding, dilation, sizes = [], [], [], [], []
    for _ in range(rank):
        k, s, d, n = (draw(st.integers(1, most)) for most in (5, 4, 3 if maximum else 1, 9))
        p = draw(st.integers(0, k // 2))
        # Averages of volumes refuse images smaller than the kernel.
        n = max(n, d * (k - 1) + 1 - 2 * p, 1 if maximum or rank < 3 else k)
        for to, value in zip((kernel, stride, padding, dilation, sizes), (k, s, p, d, n), strict=True):
            to.append(value)
    batch = [] if draw(st.booleans()) else [draw(st.integers(1, 2))]
    shape = [*batch, draw(st.integers(1, 2)), *sizes]
    # The kernels refuse a single volume in some layouts.
    x = strided(data, shape) if batch or rank < 3 else torch.randn(shape, dtype=torch.float64)
    ceil, steps = draw(st.booleans()), [] if draw(st.booleans()) else stride
    if maximum:
        return Drawn(MAXIMA[rank], (x, kernel, steps, padding, dilation, ceil), rank)
    options: tuple[Any, ...] = (ceil, draw(st.booleans()))
    if rank > 1:
        options = (*options, draw(st.none() | st.integers(1, 7)))
    return Drawn(AVERAGES[rank], (x, kernel, steps, padding, *options), rank)


@given(st.data())
def test_rows_of_an_average(data: st.DataObject) -> None:
    check_spatial(data, data.draw(pools(data, maximum=False)))


@given(st.data())
def test_rows_of_a_maximum(data: st.DataObject) -> None:
    drawn = data.draw(pools(data, maximum=True))
    if touched(drawn):
        check_spatial(data, drawn)


@given(st.data())
def test_values_where_nobody_reads_the_indices(data: st.DataObject) -> None:
    drawn = data.draw(pools(data, maximum=True))
    if not touched(drawn):
        return
    target = WITH_INDICES[drawn.rank]
    sizes = drawn.sizes
    dim = data.draw(st.integers(0, len(sizes) - 1))
    check_tiles(target, drawn.args, dim, data.draw(cuts_of(sizes[dim])))


def touched(drawn: Drawn) -> bool:
    """Whether every window has a row: a dilated one can step over the tensor."""
    return bool(drawn.target(*drawn.args).isfinite().all())


@given(st.data())
def test_images_and_channels(data: st.DataObject) -> None:
    drawn = data.draw(pools(data, maximum=data.draw(st.booleans())))
    dim = data.draw(st.integers(0, len(drawn.sizes) - drawn.rank - 1))
    check_tiles(drawn.target, drawn.args, dim, data.draw(cuts_of(drawn.sizes[dim])))


@given(st.data())
def test_no_row_is_needed_in_vain(data: st.DataObject) -> None:
    drawn = data.draw(pools(data, maximum=data.draw(st.booleans())))
    if not touched(drawn):
        return
    sizes = drawn.sizes
    dim = data.draw(st.integers(len(sizes) - drawn.rank, len(sizes) - 1))
    check_needs(drawn.target, drawn.args, dim, data.draw(cuts_of(sizes[dim])))


@given(st.data())
def test_indices_of_images_and_channels(data: st.DataObject) -> None:
    drawn = data.draw(pools(data, maximum=True))
    target = WITH_INDICES[drawn.rank]
    dim = data.draw(st.integers(0, len(drawn.sizes) - drawn.rank - 1))
    for output in (0, 1):
        check_tiles(target, drawn.args, dim, data.draw(cuts_of(drawn.sizes[dim])), output=output)


def test_both_values_and_indices() -> None:
    args = (torch.randn(4, 2, 6, 6), [2, 2])
    call, (x,), (values, indices) = call_on(aten.max_pool2d_with_indices.default, args)
    part = Part(0, 1, 3)
    found = tile(call, part, part).compute(run, [x[1:3]])
    assert torch.equal(found[0], values[1:3])
    assert torch.equal(found[1], indices[1:3])
    with pytest.raises(Untileable, match="different parts"):
        tile(call, part, Part(0, 0, 1))
    with pytest.raises(Untileable, match="indices that count"):
        tile(call, None, Part(2, 0, 1))


def test_a_window_without_rows() -> None:
    call, _, _ = call_on(aten.max_pool1d.default, (torch.randn(1, 1, 1), [2], [1], [1], [2]))
    with pytest.raises(Untileable, match="no rows"):
        tile(call, Part(2, 0, 1))


def test_a_tile_inside_is_one_pool() -> None:
    args = (torch.randn(1, 4, 33, 33), [3, 3], [2, 2], [1, 1])
    for target in (aten.max_pool2d.default, aten.avg_pool2d.default):
        calls = calls_of(args, Part(2, 4, 8), target)
        assert [operator for operator, _ in calls] == [target]
        assert calls == calls_of(args, Part(2, 8, 12), target), "tiles inside are computed alike"


@pytest.mark.parametrize("rows", [32, 33])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil"),
    [(3, 2, 1, False), (2, 2, 0, False), (3, 1, 1, False), (5, 1, 2, False), (3, 2, 0, True), (2, 2, 0, True)],
)
def test_no_tile_at_a_border_is_copied(kernel: int, stride: int, padding: int, ceil: bool, rows: int) -> None:
    window = ([kernel] * 2, [stride] * 2, [padding] * 2)
    x = torch.randn(1, 2, rows, rows)
    for target, options in ((aten.max_pool2d.default, ([1, 1], ceil)), (aten.avg_pool2d.default, (ceil, False))):
        size = target(x, *window, *options).shape[2]
        for part in (Part(2, 0, 5), Part(2, size - 5, size)):
            found = [operator for operator, _ in calls_of((x, *window, *options), part, target)]
            assert aten.constant_pad_nd.default not in found
