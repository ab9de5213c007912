"""What a plan says of the kernels that attention takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planner import Plan, plan


class Attend(nn.Module):
    """Attention of tokens to themselves, and to themselves with fewer heads and a mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(x, x, x)
        few = y[:, :2]
        return nn.functional.scaled_dot_product_attention(y, few, few, mask, enable_gqa=True)


def planned(device: str, machine: str | None = None, dtype: torch.dtype = torch.float16) -> Plan:
    args = torch.empty(1, 4, 64, 32, dtype=dtype, device="meta"), torch.empty(64, 64, dtype=dtype, device="meta")
    return plan(Attend().eval(), "1GB", inputs=args, device=device, machine=machine)


@pytest.mark.parametrize(
    ("machine", "dtype", "said"),
    [
        ("rtx-4090", torch.float16, "1 flash, 1 math (of the efficient kernel: it takes as many heads of k and v as of q)"),
        ("rtx-4090", torch.float32, "1 efficient, 1 math (of the efficient kernel: it takes as many heads of k and v as of q)"),
        ("h200", torch.bfloat16, "2 cudnn"),
    ],
)
def test_kernels_on_cuda(machine: str, dtype: torch.dtype, said: str) -> None:
    lines = str(planned("cuda", machine, dtype)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  attention "))
    found = " ".join(" ".join(lines[at : lines.index("  decisions")]).split())
    assert found == f"attention {said}; by PyTorch's source, no run on a GPU has confirmed it"


def test_nothing_elsewhere() -> None:
    assert "attention " not in str(planned("accounting"))


def test_what_runs_in_tiles_counts_once() -> None:
    """Single operators take attention in double precision; in tiles of queries they need a fraction of whole scores."""
    x, mask = (torch.empty(shape, dtype=torch.float64, device="meta") for shape in ((1, 4, 512, 8), (512, 512)))

    def attend() -> nn.Module:
        class Twice(nn.Module):
            def forward(self, x: Tensor, mask: Tensor) -> Tensor:
                return nn.functional.scaled_dot_product_attention(x, x, x, mask)

        return Twice().eval()

    p = plan(attend(), "1GB", inputs=(x, mask), device="cuda", machine="rtx-4090")
    tight = p.replan(p.minimum_bytes)
    assert any("loop" in node.meta for node in tight.problem.liveness.nodes)
    for each in (p, tight):
        assert "  attention 1 math (of the efficient kernel: it takes float16, float32" in str(each)
