"""Channels-last as a decision: taken where the machine says that it pays, kept with the plan, together with everything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from planner import Machine, Plan, plan
from planner.cli import main
from planner.conv_layouts import Layouts
from planner.machine import MachineError
from planner.solve.decisions import Decisions
from tests.passes.in_parts import assert_same
from tests.passes.test_channels_last import CLOSE, Residual, image

# Launches take nothing, and doubles are convolved in half the time.
MACHINE = replace(Machine.preset("cpu"), launch_seconds=0.0, channels_last={"float64": 0.5})
X = image(2, 4, 12, 10)


def planned(budget: Any = "1GB", *, ratio: float = 0.5, **options: Any) -> Plan:
    machine = replace(MACHINE, channels_last={"float64": ratio})
    return plan(Residual().eval(), budget, inputs=(X,), device="accounting", machine=machine, **options)


def test_taken_where_it_pays_and_shown() -> None:
    p = planned()
    (region,) = p.decisions.tiling.channels_last
    assert region.operators[0] == "conv2d"
    assert p.step_seconds * 1.01 < planned(ratio=1.0).step_seconds
    assert "    channels-last: 3 convolutions in 1 region\n" in str(p)
    assert "passes: canonicalise, channels_last, write_in_place, stream_weights, insert_frees" in p.code


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": 2.0}, {"ratio": 0.999}, {"allow": ("offload", "tile")}])
def test_not_taken(options: dict[str, Any]) -> None:
    p = planned(**options)
    assert not p.decisions.tiling
    assert "channels-last" not in str(p)
    assert "channels_last" not in p.code


def test_detected_machines_are_left_alone_until_they_are_measured() -> None:
    """No second of planning is spent on what the machine says nothing of."""
    p = plan(Residual().eval(), "1GB", inputs=(X,), device="accounting", machine="cpu")
    layouts = Layouts(p.problem)
    assert (layouts.most_seconds, layouts.regions) == (0.0, ())
    assert Layouts(p.problem, measured=True).regions


def test_a_region_that_costs_more_than_it_saves_is_not_tried() -> None:
    slow = replace(MACHINE, launch_seconds=1.0)
    p = plan(Residual().eval(), "1GB", inputs=(X,), device="accounting", machine=slow)
    assert Layouts(p.problem).most_seconds > 1.0  # half of three launches, and two more for the conversions
    assert Layouts(p.problem).regions == ()
    assert Layouts(planned().problem).regions == ()  # nothing is left to gain there


def test_saved_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = planned()
    assert Decisions.from_json(p.decisions.to_json()) == p.decisions
    p.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json", Residual().eval()) == p
    assert main(["show", str(tmp_path / "p.json")]) == 0
    assert "  layout    conv2d .. conv2d_2 in channels-last\n" in capsys.readouterr().out
    planned(allow=("offload", "tile")).save(tmp_path / "q.json")
    again = Plan.load(tmp_path / "q.json", Residual().eval()).replan("2GB")
    assert not again.decisions.tiling


@pytest.mark.parametrize("options", [{}, {"keep": {"*": {"tile": 3}}}])
def test_with_streams_and_tiles(options: dict[str, Any]) -> None:
    p = planned(**options)
    module = p.target
    with torch.no_grad():
        expected = module(X)
    least = p.replan(p.minimum_bytes)
    for each in (p, least):
        if options or each is p:
            assert each.decisions.tiling.channels_last
        assert bool(each.decisions.tiling.tiles) or (each is p and not options)
        m = each.build()
        for _ in range(2):
            assert_same(m(X), expected, CLOSE)
            assert m.report().peak_bytes == each.peak_bytes <= each.budget_bytes
        each.restore()


def test_profiled_seconds_decide() -> None:
    """Whatever they say here: seconds are of calls in the layout that they run in, and the results stay."""
    p = planned(profile=True, ratio=1.0)
    assert p.profiled is not None
    with torch.no_grad():
        expected = p.target(X)
    assert_same(p.build()(X), expected, CLOSE)
    p.restore()


def test_presets() -> None:
    assert Machine.preset("rtx-4090").channels_last == {"float16": 0.9, "bfloat16": 0.9}
    assert Machine.preset("t4").channels_last == {"float16": 0.9}
    assert Machine.preset("cpu").channels_last == {}


@pytest.mark.parametrize("given", [0.9, {"float16": 0.0}, {"float16": "fast"}])
def test_ratios_that_are_none(given: Any) -> None:
    with pytest.raises(MachineError, match="channels_last"):
        replace(MACHINE, channels_last=given)
