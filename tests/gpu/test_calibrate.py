"""Calibration of a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner import Machine
from planner.measure_machine import Effort, calibrate

pytestmark = pytest.mark.gpu


def test_a_device_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
    mib = 2**20
    effort = Effort((mib // 16, mib, 16 * mib, 64 * mib), (mib,), 8 * mib, 4096, 256 * mib, seconds=0.5)
    machine = calibrate("cuda", effort=effort).machine
    assert Machine.detect("cuda") == machine
    assert machine.capability is not None
    assert machine.flops["float16"] > machine.flops["float32"]
    assert machine.pageable_bandwidth <= 1.2 * machine.link_peak_bandwidth < machine.memory_bandwidth
    assert 0 < machine.launch_seconds < 1e-3
