"""Profiling on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from planner import plan
from tests.planner.toys import Mlp, x

pytestmark = pytest.mark.gpu


def test_operators_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
    state = torch.cuda.get_rng_state()
    p = plan(Mlp().eval(), "1GB", inputs=(x(),), device="cuda", profile=True)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert p.profiled is not None
    assert p.profiled[0] == p.profiled[1] > 0
    assert all(seconds < 1e-2 for seconds in p.problem.seconds)
    again = plan(Mlp().eval(), "1GB", inputs=(x(),), device="cuda", profile=True)
    assert again.problem.seconds.tolist() == p.problem.seconds.tolist()
