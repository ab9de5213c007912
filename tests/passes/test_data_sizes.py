"""Sizes and numbers that depend on data are refused, with their line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from planner import plan
from planner.capture import capture
from runtime.errors import CaptureError
from tests.planner.toys import x


class _Module(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def _picked(y: Tensor) -> Tensor:
    return y[y.sum(1) > 0]


def _split(y: Tensor) -> Tensor:
    sizes = (y > 0).sum(0).tolist()
    return y.reshape(-1)[: sizes[0]]


def _scaled(y: Tensor) -> Tensor:
    return y * y.sum().item()


def _checked(y: Tensor) -> Tensor:
    torch._check((y > -100).sum().item() >= 1)
    return y * 2


@pytest.mark.parametrize("function", [_picked, _split, _scaled])
def test_a_size_or_number_that_depends_on_data(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match=r"test_data_sizes\.py:\d+ \(`return self.function.*`\): a size or number depends"):
        capture(_Module(function).eval(), (x(),))


def test_an_assertion_is_left_out() -> None:
    module = _Module(_checked).eval()
    with torch.no_grad():
        wanted = module(x())
    assert torch.equal(plan(module, "1GB", inputs=(x(),), device="accounting").build()(x()), wanted)
