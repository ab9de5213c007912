"""Regions under `torch.vmap` become plain operators with the same values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planner import plan
from tests.planner.toys import x


class _Masked(nn.Module):
    """A mask by two nested maps over indices, as transformers makes it, and another by a map over data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("reach", torch.tensor(2))

    def forward(self, x: Tensor) -> Tensor:
        y, index = self.layer(x), torch.arange(3)

        def near(i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < self.reach)

        mask = torch.vmap(torch.vmap(near, in_dims=(None, 0)), in_dims=(0, None))(index, index)
        return mask.to(y.dtype) @ torch.vmap(torch.softmax, in_dims=(0, None))(y, 0)


def test_nested_maps() -> None:
    module = _Masked().eval()
    with torch.no_grad():
        wanted = module(x())
    whole = plan(module, "1GB", inputs=(x(),), device="accounting")
    assert not any("vmap" in str(node.target) or "batch_dim" in str(node.target) for node in whole.program.graph.nodes)
    made = whole.replan(whole.minimum_bytes)
    built = made.build()
    assert torch.equal(built(x()), wanted)
    assert built.report().peak_bytes == made.peak_bytes


def test_a_tensor_made_inside() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: row * torch.full((8,), 2.0).cumsum(0))(self.layer(x))

    module = Inside().eval()
    with torch.no_grad():
        wanted = module(x())
    built = plan(module, "1GB", inputs=(x(),), device="accounting").build()
    assert torch.equal(built(x()), wanted)
