"""Elementwise operators, part by part."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.passes.tile_rules.harness import check_tiles, cuts_of

aten = torch.ops.aten


@given(st.data())
def test_broadcasting(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    masks = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    skipped = data.draw(st.integers(0, len(shape) - 1))
    x = torch.randn(shape, dtype=torch.float64)
    other = torch.randn([1 if one else n for n, one in zip(shape, masks, strict=True)][skipped:], dtype=torch.float64)
    dim = data.draw(st.integers(0, len(shape) - 1))
    check_tiles(aten.add.Tensor, (x, other), dim, data.draw(cuts_of(shape[dim])))
