"""Predicted against measured seconds on a CUDA device; prints how much copying is hidden and the share of the link used."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

from planner import Plan, plan
from planner.measure_machine import calibrate

pytestmark = pytest.mark.gpu

CALLS = 12


class Block(nn.Module):
    """A feed-forward block of 256 MiB in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4096)
        self.up, self.down = nn.Linear(4096, 16384), nn.Linear(16384, 4096)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def streamed(tokens: int, budget: str) -> Plan:
    """Eight blocks, 2 GiB, of which some do not fit."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(8)]).to(torch.bfloat16).eval()
    x = torch.randn(tokens, 4096, dtype=torch.bfloat16)
    return plan(model, budget, inputs=(x,), device="cuda", repeats=CALLS, profile=True)


@pytest.mark.parametrize(("tokens", "budget"), [(512, "1.2GB"), (16384, "2.2GB")], ids=["link", "compute"])
def test_predicted_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, budget: str) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
    calibrate("cuda")
    p = streamed(tokens, budget)
    assert p.streamed_bytes > 0
    module = p.build()
    x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
    seconds, hidden, link = [], [], []
    for _ in range(CALLS):
        module(x)
        report = p.report()
        timeline = report.measured_timeline
        seconds.append(timeline.step_seconds)
        hidden.append(timeline.hidden_seconds / timeline.copy_seconds)
        assert report.link_fraction is not None
        link.append(report.link_fraction)
        assert report.reserved_bytes is not None
        assert report.reserved_bytes <= p.budget_bytes
    p.restore()
    measured = statistics.median(seconds[2:])
    print(
        f"{tokens} tokens in {budget}: predicted {p.step_seconds * 1e3:.2f} ms, measured {measured * 1e3:.2f} ms "
        f"({p.step_seconds / measured:.2f}); hidden {statistics.median(hidden[2:]):.0%} of the copying; "
        f"link {statistics.median(link[2:]):.0%} of {p.machine.link_peak_bandwidth / 1e9:.1f} GB/s; "
        f"{p.step_seconds / p.bound_seconds:.2f} x the bound"
    )
    assert p.step_seconds == pytest.approx(measured, rel=0.15)
