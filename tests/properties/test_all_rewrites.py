"""All that a plan may change, together: streams, tiles, slices, casts, fused attention, channels-last, memory used again.

Whatever of it a budget, a machine and permissions bring about, the result is the module's with the values that are stored, and
the bytes are those that were predicted. With streams and memory used again alone it is the same bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from planner import Machine, Plan, plan
from tests.planner.test_casting import TYPES, with_stored_values

EXACT = 1e-12
# Launches take nothing, copies take long, and channels-last is twice as fast.
MACHINE = replace(
    Machine.preset("cpu"), name="slow link", link_latency_seconds=1e-7, launch_seconds=0.0, link_bandwidth=3e8,
    channels_last={"float64": 0.5},
)  # fmt: skip
ALLOWED = ("tile", "layout", "attention")


class Net(nn.Module):
    """A resnet block with a skip that is joined again, attention by hand over its pixels, and a wide feed-forward."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(2 * width, 3, 3, padding=1)
        self.norm, self.inner = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 16 * width), nn.Linear(16 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        y = skip + self.inner(functional.silu(self.norm(skip)))
        tokens = y.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        tokens = tokens + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        tokens = tokens + self.down(functional.gelu(self.up(tokens)))
        y = tokens.transpose(1, 2).unflatten(2, tuple(x.shape[2:]))
        return self.last(torch.cat([functional.relu(y), skip], dim=1))


@cache
def subject() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().double().eval(), torch.randn(2, 4, 12, 10, dtype=torch.float64)


@cache
def roomy(allowed: tuple[str, ...], casts: tuple[str, ...], tiles: int) -> Plan:
    module, x = subject()
    return plan(
        module, "1GB", inputs=(x,), device="accounting", machine=MACHINE, allow=("offload", *allowed), allow_cast=casts or None,
        keep={"*": {"tile": tiles}} if tiles and "tile" in allowed else None,
    )  # fmt: skip


@settings(max_examples=6)
@given(
    allowed=st.sets(st.sampled_from(ALLOWED)).map(lambda names: tuple(sorted(names))),
    casts=st.sampled_from(((), TYPES[:1], TYPES)),
    tiles=st.sampled_from((0, 0, 3)),
    share=st.sampled_from((0.0, 0.1, 0.3, 0.7, 1.0)),
)
def test_the_same_result_in_the_bytes_that_were_predicted(
    allowed: tuple[str, ...], casts: tuple[str, ...], tiles: int, share: float
) -> None:
    module, x = subject()
    p = roomy(allowed, casts, tiles)
    p = p.replan(int(p.minimum_bytes + share * max(0, p.unplanned_bytes - p.minimum_bytes)))
    with torch.no_grad():
        expected = with_stored_values(module, p)(x)
    m = p.build()
    try:
        for _ in range(2):
            found = m(x)
            assert m.report().peak_bytes == p.peak_bytes <= p.budget_bytes
            assert float((found - expected).abs().max()) <= EXACT * float(expected.abs().max())
            assert allowed or casts or torch.equal(found, expected)
    finally:
        p.restore()


def test_all_of_it_is_met() -> None:
    """The law above is not of plans that change nothing."""
    p = roomy(ALLOWED, TYPES, 0)
    found = [p.replan(int(p.minimum_bytes + share * (p.unplanned_bytes - p.minimum_bytes))) for share in (0.1, 0.3)]
    tilings = [each.decisions.tiling for each in found]
    for kind in ("tiles", "casts", "attention", "channels_last"):
        assert any(getattr(tiling, kind) for tiling in tilings), kind
    assert any(each.decisions.streams for each in found)
    assert any(tiling.casts and (tiling.tiles or tiling.attention) for tiling in tilings)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_saved_and_loaded(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    module, x = subject()
    p = roomy(ALLOWED, TYPES, 0)
    p = p.replan(int(p.minimum_bytes + share * (p.unplanned_bytes - p.minimum_bytes)))
    path = tmp_path_factory.mktemp("plans") / "p.json"
    p.save(path)
    assert Plan.load(path, module, inputs=(x,)) == p
