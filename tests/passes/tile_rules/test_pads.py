"""Padding, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from tests.passes.tile_rules.harness import call_on, check_tiles, cut
from tests.passes.tile_rules.moves import check_parts, parts_of, tensors

aten = torch.ops.aten
# How far each mode can pad a dimension of a size.
LIMITS = {
    "constant": lambda size: 4,
    "replicate": lambda size: 4,
    "reflect": lambda size: size - 1,
    "circular": lambda size: size,
}


@st.composite
def paddings(draw: st.DrawFn, mode: str, sizes: list[int]) -> list[int]:
    """Paddings of the last dimensions, the last first, that leave an element; some are crops."""
    out: list[int] = []
    for size in reversed(sizes):
        most = LIMITS[mode](size)
        before = draw(st.integers(-min(size - 1, 2), most))
        out += [before, draw(st.integers(-(size + min(before, 0) - 1) if size + min(before, 0) < 3 else -2, most))]
        if mode == "circular":  # what is wrapped is what is left of it
            out[-2:] = [min(edge, size + min(out[-2], 0) + min(out[-1], 0)) for edge in out[-2:]]
    return out


@given(st.data())
def test_constant(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    pads = data.draw(paddings("constant", shape[data.draw(st.integers(0, len(shape) - 1)) :]))
    x = data.draw(tensors(shape))
    part = data.draw(parts_of(aten.constant_pad_nd.default(x, pads).shape))
    check_parts(aten.constant_pad_nd.default, (x, pads), [part])
    check_parts(aten.constant_pad_nd.default, (x, pads, -1.5), [part])
    check_parts(aten.pad.default, (x, pads), [part])
    check_parts(aten.pad.default, (x, pads, "constant", -0.5), [part])


NAMED = {
    "reflect": (aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default),
    "replicate": (aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default),
    "circular": (aten._pad_circular.default,) * 3,
}


@pytest.mark.parametrize("mode", NAMED)
@given(st.data())
def test_from_what_is_there(mode: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(1, 6 if count < 3 else 4), min_size=count, max_size=count))
    lead = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    x = data.draw(tensors([*lead, *sizes]))
    if mode == "circular":
        x = data.draw(tensors([2, 3, *sizes]))
    pads = data.draw(paddings(mode, sizes))
    part = data.draw(parts_of(aten.pad.default(x, pads, mode).shape))
    check_parts(aten.pad.default, (x, pads, mode), [part])
    check_parts(NAMED[mode][count - 1], (x, pads), [part])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("cuts", [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0, 5, 10], [1, 3, 4, 9], [2, 8], [0, 3, 10], [2, 9, 10]])
def test_cuts_anywhere_near_the_border(mode: str, cuts: list[int]) -> None:
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    check_tiles(aten.pad.default, (x, [1, 2, 3, 3], mode), 2, cuts)


def operators(x: torch.Tensor, pads: list[int], mode: str, part: Part) -> tuple[Part | None, list[Any]]:
    """What the rule needs of `x` and which operators it calls, each with its arguments but the tensor."""
    call, _, _ = call_on(aten.pad.default, (x, pads, mode))
    tiled, out = tile(call, part), []

    def run(target: Any, value: Any, *args: Any) -> Any:
        out.append((target, *args))
        return target(value, *args)

    tiled.compute(run, [cut(x, tiled.needs[0])])
    return tiled.needs[0], out


def test_the_interior_is_not_padded() -> None:
    x = torch.randn(1, 1, 9, 9)
    for mode in LIMITS:
        assert operators(x, [0, 0, 2, 2], mode, Part(2, 4, 7)) == (Part(2, 2, 5), [])
        need, called = operators(x, [1, 1, 2, 2], mode, Part(2, 4, 7))
        assert (need, [args[:2] for args in called]) == (Part(2, 2, 5), [(aten.pad.default, [1, 1, 0, 0])])


def test_the_border_is_mirrored_from_no_more_than_it_shows() -> None:
    x = torch.randn(1, 1, 9, 9)
    need, called = operators(x, [0, 0, 3, 3], "reflect", Part(2, 0, 8))
    assert (need, called) == (Part(2, 0, 5), [(aten.pad.default, [0, 0, 3, 0], "reflect")])
    need, called = operators(x, [0, 0, 3, 3], "reflect", Part(2, 0, 2))
    assert (need, called) == (Part(2, 2, 4), [(aten.flip.default, [2])])
    need, called = operators(x, [0, 0, 3, 3], "reflect", Part(2, 1, 4))
    assert (need, [name for name, *_ in called]) == (Part(2, 0, 3), [aten.pad.default, aten.slice.Tensor])


def test_a_constant_border_needs_nothing() -> None:
    x = torch.randn(1, 1, 4, 4)
    need, called = operators(x, [0, 0, 3, 3], "constant", Part(2, 0, 2))
    assert (need, called) == (Part(2, 0, 0), [(aten.pad.default, [0, 0, 2, 0], "constant")])
    need, _ = operators(x, [0, 0, 3, 3], "constant", Part(2, 8, 10))
    assert need == Part(2, 4, 4)


def test_an_unknown_mode() -> None:
    call, _, _ = call_on(aten.pad.default, (torch.zeros(4), [1, 1]))
    other = type(call)(call.target, (call.args[0], [1, 1], "mirror"), {}, call.outputs)
    with pytest.raises(Untileable, match="pads in a way that is not known: 'mirror'"):
        tile(other, Part(0, 0, 1))
