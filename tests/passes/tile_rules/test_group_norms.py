"""Group norm: samples and groups part by part, rows by statistics that are merged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from planner import plan
from tests.passes.tile_rules.drawing import values
from tests.passes.tile_rules.harness import call_on, check_reduction, check_tiles, cuts_of

aten = torch.ops.aten
own = torch.ops.vramplan


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, int, torch.Tensor | None, torch.Tensor | None]:
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    channels = groups * per_group
    shape = [draw(st.integers(1, 3)), channels, *draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))]
    weight, bias = (draw(st.none() | values([channels])) for _ in range(2))
    return draw(values(shape)), groups, weight, bias


def channels_allowed(cuts: Sequence[int], channels: int, groups: int) -> bool:
    """Whether no part of the channels lies in all of several groups."""
    size = channels // groups
    return all(stop - start == channels or -(-stop // size) - start // size < groups for start, stop in pairwise(cuts))


def check_or_refuse(allowed: bool, reason: str, *args: Any, **kwargs: Any) -> None:
    if allowed:
        check_tiles(*args, **kwargs)
    else:
        with pytest.raises(Untileable, match=reason):
            check_tiles(*args, **kwargs)


@given(problems(), st.data())
def test_group_norm(problem: tuple[torch.Tensor, int, Any, Any], data: st.DataObject) -> None:
    x, groups, weight, bias = problem
    dim = data.draw(st.integers(0, x.dim() - 1))
    cuts = data.draw(cuts_of(x.shape[dim]))
    allowed = dim == 0 or (dim == 1 and channels_allowed(cuts, x.shape[1], groups))
    reason = "needs all of its" if dim == 1 else "needs statistics over all of its input"
    check_or_refuse(allowed, reason, aten.group_norm.default, (x, groups, weight, bias, 1e-5, False), dim, cuts)
    native = (x.contiguous(), weight, bias, x.shape[0], x.shape[1], x[0, 0].numel(), groups, 1e-5)
    check_or_refuse(allowed, reason, aten.native_group_norm.default, native, dim, cuts)
    check_tiles(aten.native_group_norm.default, native, 0, [0, x.shape[0]], output=data.draw(st.integers(1, 2)))


@given(problems(), st.data())
def test_normalise(problem: tuple[torch.Tensor, int, Any, Any], data: st.DataObject) -> None:
    x, groups, weight, bias = problem
    dim = data.draw(st.integers(0, x.dim() - 1))
    cuts = data.draw(cuts_of(x.shape[dim]))
    args = (x, own.group_statistics(x, groups), weight, bias, 1e-5)
    allowed = dim != 1 or channels_allowed(cuts, x.shape[1], groups)
    check_or_refuse(allowed, "needs all of its", own.group_normalise.default, args, dim, cuts)


@given(problems(), st.data())
def test_statistics(problem: tuple[torch.Tensor, int, Any, Any], data: st.DataObject) -> None:
    x, groups, _, _ = problem
    check_tiles(own.group_statistics.default, (x, groups), 0, data.draw(cuts_of(x.shape[0])))
    check_tiles(own.group_statistics.default, (x, groups), 1, data.draw(cuts_of(groups)))
    dim = data.draw(st.integers(2, x.dim() - 1))
    check_reduction(own.group_statistics.default, (x, groups), dim, data.draw(cuts_of(x.shape[dim])))
    stacked = torch.stack([own.group_statistics(x, groups), own.group_statistics(x * 2, groups)])
    check_tiles(own.merge_statistics.default, (stacked,), 0, data.draw(cuts_of(x.shape[0])))
    check_tiles(own.merge_statistics.default, (stacked,), 1, data.draw(cuts_of(groups)))


def test_whole_groups_need_their_own_channels_only() -> None:
    call, _, _ = call_on(aten.group_norm.default, (torch.randn(2, 12, 3), 4, torch.ones(12)))
    assert tile(call, Part(1, 3, 9)).needs == (Part(1, 3, 9), Part(0, 3, 9))
    assert tile(call, Part(1, 4, 5)).needs == (Part(1, 3, 6), Part(0, 3, 6))


class _InTwoSteps(torch.nn.Module):
    """Group norm of the rows above and below a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.GroupNorm(4, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        statistics = own.merge_statistics(torch.stack([own.group_statistics(part, 4) for part in h.split([5, 11], 2)]))
        return own.group_normalise(h, statistics, self.norm.weight, self.norm.bias, self.norm.eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["accounting", "cpu"])
def test_a_plan_holds_them(device: str, dtype: torch.dtype) -> None:
    """They are sized, checked, printed and run, and take what was predicted."""
    model = _InTwoSteps().eval().to(dtype)
    x = torch.randn(2, 4, 16, 16).to(dtype)
    planned = plan(model, "100MB", inputs=(x,), device=device)
    assert (
        "torch.ops.vramplan.group_normalise.default(conv2d, merge_statistics, w.norm_weight, w.norm_bias, 1e-05)"
        in planned.code
    )
    with torch.no_grad():
        wanted = model.norm(model.conv(x)).double()
        found = planned.build()(x).double()
    spacing = torch.finfo(dtype).eps * wanted.abs() + 2e-6
    assert ((found - wanted).abs() <= spacing).all()
    if device == "accounting":
        assert planned.report().peak_bytes == planned.peak_bytes
    else:
        assert planned.report().peak_bytes <= planned.peak_bytes


def test_refused() -> None:
    x = torch.randn(2, 4, 3)
    for dim in (0, 1):
        with pytest.raises(Untileable, match=f"keeps dimension {dim}"):
            check_reduction(own.group_statistics.default, (x, 2), dim, [0, 1, 2])
    with pytest.raises(Untileable, match="gives count, mean and deviations together"):
        check_tiles(own.group_statistics.default, (x, 2), 2, [0, 1, 3])
    with pytest.raises(Untileable, match="merges count, mean and deviations together"):
        check_tiles(own.merge_statistics.default, (torch.ones(2, 2, 2, 3),), 2, [0, 1, 3])
    call, _, _ = call_on(aten.native_group_norm.default, (x, None, None, 2, 4, 3, 2, 1e-5))
    with pytest.raises(Untileable, match="is wanted in part along its groups"):
        tile(call, None, Part(1, 0, 1), None)
