"""What a plan says of its distance to the limit is true of its own numbers, and is said where there is something to say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner import plan
from planner.machine import Machine
from planner.parted import PartedPlan
from planner.plan import Plan
from planner.sizes import format_bytes, format_seconds
from tests.planner.routed import Experts, Layers, rows
from tests.zoo import ZOO

# Small models stream over it as large ones do.
SLOW = replace(Machine.preset("rtx-4090"), name="slow link", link_latency_seconds=1e-7, launch_seconds=1e-7, link_bandwidth=5e9)


@pytest.fixture(scope="module")
def bert() -> Plan:
    module, args, kwargs = ZOO["bert"]()
    return plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", machine=SLOW)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_limit_is_below_the_step_and_the_bound_below_the_limit(bert: Plan, share: float) -> None:
    p = bert.replan(int(bert.minimum_bytes + share * (bert.unplanned_bytes - bert.minimum_bytes)))
    gap = p.gap
    assert p.bound_seconds <= gap.lp_seconds * (1 + 1e-5)
    assert gap.lp_seconds <= p.step_seconds * (1 + 1e-9)
    reached = p.step_seconds <= gap.lp_seconds * 1.01
    assert gap.describe_limit().startswith("reached: " if reached else "no schedule takes less than ")
    assert format_seconds(gap.lp_seconds) in gap.describe_limit()
    assert bool(gap.why) == ("  above it  " in str(p)) == (not reached)
    assert max(map(len, str(p).splitlines())) <= 100
    assert str(gap).split() == " ".join(f"{label} {text}" for label, text in gap.rows()).split()
    assert max(map(len, str(gap).splitlines())) <= 100
    assert len(repr(gap)) < 100


def test_what_the_allocator_reserves_and_nothing_fills_is_said(bert: Plan) -> None:
    module, args, kwargs = ZOO["bert"]()
    on_cuda = plan(module, "1GB", inputs=args, kwargs=kwargs, device="cuda", machine=SLOW)
    for p in (bert.replan(bert.minimum_bytes), on_cuda.replan(on_cuda.minimum_bytes)):
        unused = p.reserved_bytes - p.peak_bytes  # proved by the checker, which knows nothing of the gap
        assert (unused == 0) == (p.device == "accounting")
        said = f"and the allocator reserves {format_bytes(unused)} more than is live"
        assert (said in p.gap.why) == (p.device == "cuda")


def test_one_gb_more_keeps_a_small_model_on_the_device(bert: Plan) -> None:
    p = bert.replan(bert.minimum_bytes)
    assert p.gap.seconds_with_more == pytest.approx(p.untiled_seconds)
    saved = 1 - p.untiled_seconds / p.step_seconds
    assert p.gap.describe_more() == f"gives {format_seconds(p.untiled_seconds)} per step ({saved:.0%} less)"
    assert f"  1 GB more {p.gap.describe_more()}" in str(p)


def test_nothing_is_said_of_a_plan_that_streams_nothing(bert: Plan) -> None:
    assert bert.gap.seconds_with_more is None
    assert bert.gap.lp_seconds == bert.bound_seconds == pytest.approx(bert.step_seconds)
    assert "limit  " not in str(bert)
    assert str(bert.gap).endswith("1 GB more makes no difference: everything is on the device")
    assert "1 GB more" not in str(bert)


def test_where_compute_is_the_limit_more_memory_makes_no_difference(bert: Plan) -> None:
    """A link so fast that all copies hide, and no first copy that compute has to wait for."""
    fast = replace(SLOW, name="fast link", link_bandwidth=1e15, link_latency_seconds=0.0)
    p = bert.replan((bert.minimum_bytes + bert.unplanned_bytes) // 2, machine=fast)
    assert p.gap.resource == "compute"
    assert p.gap.describe_limit().endswith("set by the compute")
    assert p.gap.describe_more() == "makes no difference"
    assert p.gap.why == ""


def test_parts() -> None:
    p = plan(Layers(Experts).eval(), "1GB", inputs=(rows(),), device="accounting", machine=SLOW)
    assert isinstance(p, PartedPlan)
    assert p.gap.describe_more() == "makes no difference: everything is on the device"
    tight = p.replan(p.minimum_bytes)
    assert tight.gap.seconds_with_more <= tight.step_seconds
    assert "1 GB more gives " in str(tight)
    assert str(tight.gap).startswith(f"limit     nothing takes less than {format_seconds(tight.bound_seconds)}, set by the ")
    assert len(repr(tight.gap)) < 100
