"""Products of matrices choose their kernels by `requires_grad` of the weight, without autograd too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planner import plan


class _Products(nn.Module):
    """Of a batch that lies across memory, as after `permute`: once as a linear layer, once by `@`."""

    def __init__(self, requires_grad: bool) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.second = nn.Parameter(torch.randn(32, 64) * 0.1)
        self.requires_grad_(requires_grad)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        across = x.permute(2, 0, 1)
        return self.first(across), across @ self.second


@pytest.mark.parametrize("requires_grad", [True, False])
def test_bits_and_bytes_of_eager(requires_grad: bool) -> None:
    module, x = _Products(requires_grad).eval(), torch.randn(3, 32, 64)
    with torch.no_grad():
        wanted = module(x)
    whole = plan(module, "1GB", inputs=(x,), device="accounting")
    assert {w.requires_grad for w in whole.program.weights.values()} == {requires_grad}
    for budget in (whole.unplanned_bytes, whole.minimum_bytes):
        made = whole.replan(budget)
        built = made.build()
        found = built(x)
        assert built.report().peak_bytes == made.peak_bytes
        assert not any(y.requires_grad for y in found)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
        built.close()
