"""Constants, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from tests.passes.tile_rules.drawing import shapes, values
from tests.passes.tile_rules.harness import call_on, check_tiles, cuts_of

aten = torch.ops.aten


@given(st.data())
def test_constants(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    dim = data.draw(st.integers(0, len(shape) - 1))
    x = data.draw(values(shape))
    operator, args = data.draw(
        st.sampled_from(
            [
                (aten.zeros.default, (shape,)),
                (aten.ones.default, (shape,)),
                (aten.full.default, (shape, 2.5)),
                (aten.zeros_like.default, (x,)),
                (aten.ones_like.default, (x,)),
                (aten.full_like.default, (x, 3)),
                (aten.new_zeros.default, (x, shape)),
                (aten.new_full.default, (x, shape, 1.5)),
                (aten.new_ones.default, (x, [*shape, 2])),
                (aten.new_ones.default, (x, [n + 1 for n in shape])),
            ]
        )
    )
    size = shape[dim] + (operator is aten.new_ones.default and len(args[1]) == len(shape))
    check_tiles(operator, args, dim, data.draw(cuts_of(size)), {"dtype": data.draw(st.sampled_from([None, torch.float32]))})


def test_uninitialised() -> None:
    for operator, args in ((aten.empty.memory_format, ([4, 3],)), (aten.new_empty.default, (torch.ones(2), [4, 3]))):
        call, tensors, _ = call_on(operator, args)
        part = tile(call, Part(0, 1, 3)).compute(lambda f, *a, **k: f(*a, **k), tensors)
        assert part.shape == (2, 3)


@given(st.integers(-20, 20), st.integers(1, 12), st.sampled_from([-3, -1, 1, 2]), st.data())
def test_arange(start: int, size: int, step: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([None, torch.int32, torch.float32, torch.float64, torch.bfloat16]))
    end = start + size * step - data.draw(st.integers(0, abs(step) - 1)) * (1 if step > 0 else -1)
    cuts = data.draw(cuts_of(size))
    check_tiles(aten.arange.start_step, (start, end, step), 0, cuts, {"dtype": dtype})
    check_tiles(aten.arange.start, (start, start + size), 0, cuts, {"dtype": dtype})
    check_tiles(aten.arange.default, (size,), 0, cuts, {"dtype": dtype})
    check_tiles(aten.arange.start_step, (float(start), float(end), float(step)), 0, cuts)


def test_arange_without_a_step() -> None:
    check_tiles(aten.arange.start_step, (2, 9), 0, [0, 3, 7])


@pytest.mark.parametrize(
    ("args", "dtype", "reason"),
    [
        ((0, 1, 0.1), torch.float32, "counts in steps that are rounded"),
        ((0.5, 4), torch.float64, "counts in steps that are rounded"),
        ((0, 300, 1), torch.bfloat16, "counts further than torch.bfloat16 is exact"),
        ((0, 4.0, 1.0), torch.int64, "counts in torch.int64 by numbers that are not whole"),
    ],
)
def test_arange_refuses_what_is_rounded(args: tuple[Any, ...], dtype: torch.dtype, reason: str) -> None:
    operator = aten.arange.start_step if len(args) == 3 else aten.arange.start
    with pytest.raises(Untileable, match=reason):
        check_tiles(operator, args, 0, [0, 1, 2], {"dtype": dtype})


def test_random_numbers_have_no_rule() -> None:
    for operator in (aten.rand.default, aten.randn.default):
        with pytest.raises(Untileable, match="has no tile rule"):
            check_tiles(operator, ([4],), 0, [0, 1])
