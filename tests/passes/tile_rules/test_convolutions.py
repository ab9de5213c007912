"""Convolutions, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from tests.passes.tile_rules.harness import call_on, check_tiles, cuts_of, run
from tests.passes.tile_rules.poison import check_needs

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

NUMERIC = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
NAMED = {1: aten.conv1d.padding, 2: aten.conv2d.padding, 3: aten.conv3d.padding}


@dataclass
class Drawn:
    """A convolution's arguments, and how much of its padding can be met."""

    target: Any
    args: tuple[Any, ...]
    rank: int

    @property
    def sizes(self) -> torch.Size:
        return self.target(*self.args).shape


def strided(data: st.DataObject, shape: list[int]) -> torch.Tensor:
    """Random values, contiguous, channels last, transposed or narrowed."""
    kind = data.draw(st.sampled_from(["plain", "channels_last", "transposed", "narrowed"]))
    if kind == "channels_last" and len(shape) in (4, 5):
        form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        return torch.randn(shape, dtype=torch.float64).to(memory_format=form)
    if kind == "transposed":
        return torch.randn(shape[::-1], dtype=torch.float64).permute(*range(len(shape) - 1, -1, -1))
    if kind == "narrowed":
        return torch.randn([n + 1 for n in shape], dtype=torch.float64)[tuple(slice(1, None) for _ in shape)]
    return torch.randn(shape, dtype=torch.float64)


@st.composite
def convolutions(draw: st.DrawFn, data: st.DataObject, padding: str | None = None, general: bool = False) -> Drawn:
    """Any convolution that has a result, `padding` in words or numbers."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    rank = draw(st.integers(1, 3))
    axis = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(1, 9))
    kernel, stride, dilation, pads, sizes = (list(n) for n in zip(*[draw(axis) for _ in range(rank)], strict=True))
    if padding == "same":
        stride = [1] * rank
    if padding is not None:
        pads = [0] * rank
    if padding != "same":  # enough rows for one window
        sizes = [max(n, d * (k - 1) + 1 - 2 * p) for n, k, d, p in zip(sizes, kernel, dilation, pads, strict=True)]
    groups, inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    batch = [] if not general and draw(st.booleans()) else [draw(st.integers(1, 2))]
    x = strided(data, [*batch, groups * inputs, *sizes])
    weight = torch.randn(groups * outputs, inputs, *kernel, dtype=torch.float64)
    bias = torch.randn(groups * outputs, dtype=torch.float64) if draw(st.booleans()) else None
    if general:
        return Drawn(aten.convolution.default, (x, weight, bias, stride, pads, dilation, False, [0] * rank, groups), rank)
    target = NUMERIC[rank] if padding is None else NAMED[rank]
    return Drawn(target, (x, weight, bias, stride, pads if padding is None else padding, dilation, groups), rank)


def check_spatial(data: st.DataObject, drawn: Drawn) -> None:
    sizes = drawn.sizes
    dim = data.draw(st.integers(len(sizes) - drawn.rank, len(sizes) - 1))
    check_tiles(drawn.target, drawn.args, dim, data.draw(cuts_of(sizes[dim])))


@given(st.data())
def test_rows_of_any_convolution(data: st.DataObject) -> None:
    check_spatial(data, data.draw(convolutions(data)))


@given(st.data())
def test_rows_where_the_padding_is_a_word(data: st.DataObject) -> None:
    check_spatial(data, data.draw(convolutions(data, padding=data.draw(st.sampled_from(["same", "valid"])))))


@given(st.data())
def test_rows_of_the_general_operator(data: st.DataObject) -> None:
    drawn = data.draw(convolutions(data, general=True))
    check_spatial(data, drawn)
    internal = (*drawn.args, False, False, True)
    check_spatial(data, Drawn(aten._convolution.deprecated, internal, drawn.rank))
    check_spatial(data, Drawn(aten._convolution.default, (*internal, False), drawn.rank))


@given(st.data())
def test_images_of_a_batch(data: st.DataObject) -> None:
    drawn = data.draw(convolutions(data, general=True))
    check_tiles(drawn.target, drawn.args, 0, data.draw(cuts_of(drawn.sizes[0])))


@given(st.data())
def test_channels(data: st.DataObject) -> None:
    """Of any group; only a part of several groups that lies in all of them is refused."""
    drawn = data.draw(convolutions(data, general=data.draw(st.booleans())))
    dim = len(drawn.sizes) - drawn.rank - 1
    groups, channels = drawn.args[-1], drawn.sizes[dim]
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
    """Of parts that see a row at all."""
    drawn = data.draw(convolutions(data))
    sizes, args = drawn.sizes, drawn.args
    dim = data.draw(st.integers(len(sizes) - drawn.rank, len(sizes) - 1))
    seen = seen_from(drawn, dim)
    for axis in range(drawn.rank):  # in the other dimensions too, or all that is computed is the bias
        if not any(seen_from(drawn, len(sizes) - drawn.rank + axis)):
            return
    cuts = data.draw(cuts_of(sizes[dim]))
    for a, b in pairwise(cuts):
        if any(seen[a:b]):
            check_needs(drawn.target, args, dim, [a, b])


def seen_from(drawn: Drawn, dim: int) -> list[bool]:
    """Whether each result along a dimension looks at a row of the argument, by brute force."""
    x, weight, _, stride, padding, dilation, _ = drawn.args
    axis = dim - (len(drawn.sizes) - drawn.rank)
    taps = [dilation[axis] * j - padding[axis] for j in range(weight.shape[2 + axis])]
    return [any(0 <= i * stride[axis] + tap < x.shape[dim] for tap in taps) for i in range(drawn.sizes[dim])]


def test_channels_of_one_of_several_groups() -> None:
    x, weight, bias = torch.randn(2, 6, 9), torch.randn(9, 2, 3), torch.randn(9)
    args = (x, weight, bias, [1], [1], [1], 3)
    call, _, _ = call_on(aten.conv1d.default, args)
    assert tile(call, Part(1, 4, 5)).needs == (Part(1, 2, 4), Part(0, 4, 5), Part(0, 4, 5))
    assert tile(call, Part(1, 3, 9)).needs == (Part(1, 2, 6), Part(0, 3, 9), Part(0, 3, 9))
    assert tile(call, Part(1, 4, 7)).needs == (Part(1, 2, 6), Part(0, 3, 9), Part(0, 3, 9))


def calls_of(args: tuple[Any, ...], part: Part, target: Any = aten.conv2d.default) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators a part takes, with their arguments that are no tensors."""
    call, tensors, _ = call_on(target, args)
    tiled, calls = tile(call, part), []

    def note(operator: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((operator, tuple(a for a in (*args, *kwargs.values()) if not isinstance(a, torch.Tensor))))
        return run(operator, *args, **kwargs)

    tiled.compute(
        note, [t if n is None else t.narrow(n.dim, n.start, n.size) for t, n in zip(tensors, tiled.needs, strict=True)]
    )
    return calls


def test_a_tile_inside_is_one_convolution_without_padding() -> None:
    args = (torch.randn(1, 4, 32, 8), torch.randn(4, 4, 3, 3), None, [1, 1], [1, 1])
    calls = calls_of(args, Part(2, 8, 16))
    assert [operator for operator, _ in calls] == [aten.conv2d.default]
    assert [0, 1] in calls[0][1]
    assert calls == calls_of(args, Part(2, 16, 24)), "tiles inside are computed alike"


def test_a_tile_at_a_border_slices_few_rows_off_rather_than_copying_the_tile() -> None:
    args = (torch.randn(1, 4, 32, 8), torch.randn(4, 4, 3, 3), None, [1, 1], [1, 1])
    first, last = calls_of(args, Part(2, 0, 8)), calls_of(args, Part(2, 24, 32))
    assert [operator for operator, _ in first] == [operator for operator, _ in last] == [aten.conv2d.default, aten.slice.Tensor]
    assert (first[1][1], last[1][1]) == ((2, 0, 8), (2, 1, 9))


def test_a_thin_tile_at_a_border_is_copied_where_its_result_is_thick() -> None:
    args = (torch.randn(1, 4, 32, 8), torch.randn(512, 4, 3, 3), None, [1, 1], [1, 1])
    assert [operator for operator, _ in calls_of(args, Part(2, 0, 8))] == [aten.constant_pad_nd.default, aten.conv2d.default]


def test_a_part_that_sees_only_padding() -> None:
    """The one row that it asks for has no influence."""
    x = torch.full((1, 1, 2), torch.nan, dtype=torch.float64)
    weight, bias = torch.ones(1, 1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    check_tiles(aten.conv1d.default, (x, weight, bias, [1], [3]), 2, [0, 2, 3, 4, 5, 7, 8])


def test_no_images() -> None:
    args = (torch.empty(0, 3, 8, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64), None, [1], [1])
    check_tiles(aten.conv1d.default, args, 2, [0, 3, 8])


def test_the_scale_of_a_weight_is_not_tiled() -> None:
    call, _, _ = call_on(aten._weight_norm.default, (torch.randn(4, 3, 2), torch.randn(4, 1, 1)))
    with pytest.raises(Untileable, match="scales a weight"):
        tile(call, Part(0, 0, 2))
