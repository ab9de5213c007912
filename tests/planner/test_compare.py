"""`p.compare()`: our plan beside other policies, and beside itself in their memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest

from planner import Plan, PlannerError, plan
from planner.compare import OURS
from tests.planner.routed import Experts, rows
from tests.planner.test_baselines import MACHINE
from tests.zoo import ZOO


@functools.cache  # plans that nobody builds
def captured(name: str, repeats: int) -> Plan:
    module, args, kwargs = ZOO[name]()
    return plan(module, "1GB", inputs=args, kwargs=kwargs, machine=MACHINE, device="accounting", repeats=repeats)


def planned(name: str = "vae_decoder", share: float = 0.4, repeats: int = 1, **options: Any) -> Plan:
    p = captured(name, repeats)
    if options:
        call = {"inputs": p.options.args, "kwargs": p.options.kwargs}
        p = plan(p.target, "1GB", machine=MACHINE, device="accounting", repeats=repeats, **call, **options)
    return p.replan(int(p.minimum_bytes + share * (p.unplanned_bytes - p.minimum_bytes)))


def test_golden(golden: Callable[[str, str], None]) -> None:
    text = str(planned().compare())
    assert max(map(len, text.splitlines())) <= 100
    assert "nothing was measured" in text
    golden("compare", text)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_rows(name: str) -> None:
    p = planned(name)
    found = p.compare()
    ours, *others = found.rows
    assert (ours.policy, ours.peak_bytes, ours.step_seconds) == (OURS, p.reserved_bytes, p.step_seconds)
    assert ours.fits
    assert ours.ratio == pytest.approx(p.step_seconds / p.bound_at(p.reserved_bytes).seconds)
    for row in others:
        assert row.fits == (row.peak_bytes <= p.budget_bytes)
        assert row.ratio >= 1 - 1e-9
        assert row.ours_seconds is not None
        assert row.ours_seconds == pytest.approx(p.replan(row.peak_bytes).step_seconds, rel=1e-9)
        assert row.speedup == pytest.approx(row.step_seconds / row.ours_seconds)


def test_json_is_plain_data() -> None:
    found = planned().compare()
    data = json.loads(json.dumps(found.to_json()))
    assert (data["budget_bytes"], data["device"], data["repeats"]) == (found.budget_bytes, "accounting", 1)
    assert [row["policy"] for row in data["rows"]] == [row.policy for row in found.rows]
    assert data["rows"][1]["ratio"] == found.rows[1].ratio


def test_below_the_least_of_ours() -> None:
    """`keep` binds our plan alone."""
    p = planned(keep={"*": {"resident": True}}, share=1.0)
    text = str(p.compare())
    row = next(row for row in p.compare().rows if row.policy == "sequential offload")
    assert (row.ours_seconds, row.speedup) == (None, None)
    assert "below ours" in text


def test_repeats_are_said() -> None:
    assert ", 28 calls\n" in str(planned("lstm", repeats=28).compare())


def test_a_plan_in_parts_is_compared_part_by_part() -> None:
    p = plan(Experts().eval(), "1GB", inputs=(rows(),), machine=MACHINE, device="accounting")
    with pytest.raises(PlannerError, match=r"compare one of its parts, p\.parts\['[^']+'\]\.compare\(\)"):
        p.compare()
    part = next(iter(p.parts.values()))
    found = {row.policy: row for row in part.compare().rows}
    assert found["sequential offload"].step_seconds > found["everything resident"].step_seconds  # its weights are known
