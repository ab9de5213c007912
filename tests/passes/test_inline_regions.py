"""`InlineRegions`, which runs at the end of capture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passes.inline_regions import InlineRegions
from runtime.errors import CaptureError
from tests.passes.programs import text, traced


def test_switched_off_autocast_and_no_grad_are_inlined() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = x.sin()
            z = x.cos()
        with torch.no_grad():
            return (y + z).exp()

    assert text(traced(function, torch.ones(3))).splitlines()[1:] == [
        "sin = sin(arg_0)",
        "cos = cos(arg_0)",
        "add = add.Tensor(sin, cos)",
        "exp = exp(add)",
        "return exp",
    ]


def test_autocast_switched_on_is_refused() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    message = r"switches autocast on inside \(.*\); a plan keeps dtypes as captured: cast the module itself"
    with pytest.raises(CaptureError, match=message):
        traced(function, torch.ones(2, 2))


def test_a_program_without_regions_is_given_back() -> None:
    program = traced(torch.sin, torch.ones(3))
    assert InlineRegions().apply(program) is program
