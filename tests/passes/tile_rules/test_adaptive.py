"""Adaptive pools, part by part."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, reduce_parts, tile
from tests.passes.tile_rules.harness import assert_close, call_on, check_reduction, check_tiles, cut, cuts_of, run
from tests.passes.tile_rules.poison import check_needs
from tests.passes.tile_rules.test_convolutions import calls_of, strided

aten = torch.ops.aten

AVERAGES = {1: aten.adaptive_avg_pool1d.default, 2: aten.adaptive_avg_pool2d.default, 3: aten.adaptive_avg_pool3d.default}
MAXIMA = {1: aten.adaptive_max_pool1d.default, 2: aten.adaptive_max_pool2d.default, 3: aten.adaptive_max_pool3d.default}


@given(st.data())
def test_any_dimension(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    rank = data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank))
    shape = data.draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank))
    batch = [] if data.draw(st.booleans()) else [2]
    # The kernels refuse a single volume in some layouts.
    x = strided(data, [*batch, 2, *sizes]) if batch or rank < 3 else torch.randn([2, *sizes], dtype=torch.float64)
    dim = data.draw(st.integers(0, x.ndim - 1))
    cuts = data.draw(cuts_of([*x.shape[:-rank], *shape][dim]))
    for target in (AVERAGES[rank], MAXIMA[rank]):
        check_tiles(target, (x, shape), dim, cuts)
        check_needs(target, (x, shape), dim, cuts)


def test_rows_of_the_same_size_are_one_pool() -> None:
    calls = calls_of((torch.randn(1, 2, 12, 8), [6, 3]), Part(2, 2, 5), aten.adaptive_avg_pool2d.default)
    assert calls == [(aten.adaptive_avg_pool2d.default, ([3, 3],))]


def test_many_rows_of_different_sizes() -> None:
    call, _, _ = call_on(aten.adaptive_avg_pool1d.default, (torch.randn(1, 1, 103), [50]))
    with pytest.raises(Untileable, match="a launch for each row"):
        tile(call, Part(2, 1, 40))
    assert tile(call, Part(2, 1, 20)).needs == (Part(2, 2, 42),)


def test_indices() -> None:
    """Of images and channels alone."""
    for output in (0, 1):
        check_tiles(aten.adaptive_max_pool1d.default, (torch.randn(4, 3, 9), [3]), 0, [0, 1, 4], output=output)
    call, _, _ = call_on(aten.adaptive_max_pool1d.default, (torch.randn(1, 1, 9), [3]))
    with pytest.raises(Untileable, match="indices"):
        tile(call, Part(2, 0, 1), Part(2, 0, 1))


@given(st.data())
def test_an_average_of_everything(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank))
    x = strided(data, [2, 3, *sizes])
    dim = data.draw(st.integers(2, rank + 1))
    check_reduction(AVERAGES[rank], (x, [1] * rank), dim, data.draw(cuts_of(x.shape[dim])))


def test_half_precision_is_summed_in_single() -> None:
    x = torch.full((1, 1, 4096), 1.0, dtype=torch.float16)
    x[..., 1::2] = 1 + 2**-10
    call, _, whole = call_on(aten.adaptive_avg_pool1d.default, (x, [1]))
    parts = [reduce_parts(call, Part(2, i, i + 1024)) for i in range(0, 4096, 1024)]
    partial = [p.partial(run, [cut(x, p.needs[0])]) for p in parts]
    assert {p.dtype for p in partial} == {torch.float32}
    assert_close(parts[0].merge(run, torch.stack(partial)), whole, tolerance=2**-10)


def test_an_average_of_several_rows_is_not_merged() -> None:
    call, _, _ = call_on(aten.adaptive_avg_pool1d.default, (torch.randn(1, 1, 9), [3]))
    with pytest.raises(Untileable, match="no average over all"):
        reduce_parts(call, Part(2, 0, 3))
