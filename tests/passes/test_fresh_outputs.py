"""`FreshOutputs` on tiny programs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.fresh_outputs import FreshOutputs
from planner.capture import capture
from tests.passes.programs import text


class _Gives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.w, x + self.w, self.w.t(), self.w, x


def test_weights_and_their_views_are_copied_once_each() -> None:
    program = FreshOutputs().apply(capture(_Gives().eval(), (torch.ones(2, 3),)))
    assert text(program).splitlines()[2:] == [
        "add = add.Tensor(arg_0, w_w)",
        "t = t(w_w)",
        "clone_default = clone(w_w)",
        "clone_default_1 = clone(t)",
        "return clone_default, add, clone_default_1, clone_default, arg_0",
    ]
    assert program.node("clone_default_1").meta["val"].stride() == (1, 3)
