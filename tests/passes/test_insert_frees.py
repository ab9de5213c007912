"""`InsertFrees`: the end of every value, in the text of a program."""

from __future__ import annotations

import torch
from torch import Tensor

from passes.insert_frees import InsertFrees
from tests.passes.programs import text, traced


def test_values_are_freed_after_their_last_use_and_outputs_never() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        torch.rand(2)
        a = x.sin()
        b = a.cos() + a
        first, _ = b.split(2)
        return first * y, b

    assert text(InsertFrees().apply(traced(function, torch.ones(4), torch.ones(2)))).splitlines()[2:] == [
        "rand = rand([2], device=cpu, pin_memory=False)",
        "free(rand)",
        "sin = sin(arg_0)",
        "cos = cos(sin)",
        "add = add.Tensor(cos, sin)",
        "free(sin, cos)",
        "split = split.Tensor(add, 2)",
        "getitem = split[0]",
        "getitem_1 = split[1]",
        "free(split, getitem_1)",
        "mul = mul.Tensor(getitem, arg_1)",
        "free(getitem)",
        "return mul, add",
    ]
