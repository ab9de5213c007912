"""`SinkWeightViews`: views of weights beside their readers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.mark_state import MarkState
from passes.sink_weight_views import SinkWeightViews
from planner.capture import capture
from tests.passes.programs import text


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        view = self.w[:3].t()
        return torch.sin(x @ view) @ view


def test_every_reader_gets_its_own_chain_of_views() -> None:
    program = SinkWeightViews().apply(capture(_Twice().eval(), (torch.ones(3, 3),)))
    assert text(program).splitlines()[2:] == [
        "slice_1 = slice.Tensor(w_w, 0, 0, 3)",
        "t = t(slice_1)",
        "matmul = matmul(arg_0, t)",
        "sin = sin(matmul)",
        "slice_2 = slice.Tensor(w_w, 0, 0, 3)",
        "t_1 = t(slice_2)",
        "matmul_1 = matmul(sin, t_1)",
        "return matmul_1",
    ]


class _State(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        view = self.b.t()  # type: ignore[operator]
        self.b.add_(1)  # type: ignore[operator]
        return torch.sin(x) @ view


def test_views_of_state_stay() -> None:
    program = MarkState().apply(capture(_State().eval(), (torch.ones(3, 3),)))
    assert text(SinkWeightViews().apply(program)) == text(program)
