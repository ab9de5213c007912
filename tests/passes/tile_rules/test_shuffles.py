"""Shuffled pixels and channels, windows, part by part."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Untileable
from tests.passes.tile_rules.harness import check_tiles
from tests.passes.tile_rules.moves import check_parts, parts_of, shapes, tensors

aten = torch.ops.aten


@given(st.data())
def test_pixels(data: st.DataObject) -> None:
    lead, factor = data.draw(shapes(0, 2, 2)), data.draw(st.integers(1, 3))
    c, h, w = data.draw(shapes(3, 3, 3))
    x = data.draw(tensors([*lead, c * factor**2, h, w]))
    check_parts(aten.pixel_shuffle.default, (x, factor), [data.draw(parts_of([*lead, c, h * factor, w * factor]))])
    x = data.draw(tensors([*lead, c, h * factor, w * factor]))
    check_parts(aten.pixel_unshuffle.default, (x, factor), [data.draw(parts_of([*lead, c * factor**2, h, w]))])


@given(st.data())
def test_channels(data: st.DataObject) -> None:
    groups, shape = data.draw(st.integers(1, 3)), data.draw(shapes(3, 4))
    shape[1] *= groups
    x = data.draw(tensors(shape))
    dim = data.draw(st.sampled_from([d for d in range(len(shape)) if d != 1]))
    check_parts(aten.channel_shuffle.default, (x, groups), [data.draw(parts_of(shape, dim))])
    with pytest.raises(Untileable, match="takes neighbouring channels from all over its input"):
        check_tiles(aten.channel_shuffle.default, (x, groups), 1, [0, 1])


@given(st.data())
def test_windows(data: st.DataObject) -> None:
    x = data.draw(tensors(data.draw(shapes(1, 3, 8))))
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    args = (x, dim, data.draw(st.integers(1, x.shape[dim])), data.draw(st.integers(1, 4)))
    check_parts(aten.unfold.default, args, [data.draw(parts_of(aten.unfold.default(*args).shape))])


def test_patches() -> None:
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    columns = ([2, 2], [1, 1], [0, 0], [1, 1])
    check_tiles(aten.im2col.default, (x, *columns), 0, [0, 1, 3])
    check_tiles(aten.col2im.default, (aten.im2col.default(x, *columns), [5, 5], *columns), 0, [0, 1, 3])
    with pytest.raises(Untileable, match="strewn over the image"):
        check_tiles(aten.im2col.default, (x, *columns), 2, [0, 1])
