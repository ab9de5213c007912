"""Any budget of the host between the least and everything: the same bits, within it by a counter that nothing else shares."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.check_host import check_host
from planner import InfeasibleBudget, Plan, plan
from runtime.weight_file import OpenFile
from tests.planner.test_tilings import Skips
from tests.properties.test_plans import SHARES, planned, same
from tests.strategies.modules import Case, cases
from tests.zoo import ZOO

ALL = 10**9


def least_host_bytes(p: Plan, device_bytes: int) -> int:
    """The least budget of the host, from the error that says it; one byte where nothing is needed."""
    try:
        p.replan({p.device: device_bytes, "cpu": 1})
    except InfeasibleBudget as caught:
        error = caught
    else:
        return 1
    assert error.memory == "cpu"
    assert str(error.minimum_bytes) in str(error)
    return error.minimum_bytes


def within(p: Plan, device_share: float, host_share: float) -> Plan:
    """The plan at shares of what lies between the least and everything, of the device's memory and the host's."""
    device = p.minimum_bytes + int(device_share * (p.unplanned_bytes - p.minimum_bytes))
    most = p.replan({p.device: device, "cpu": ALL})
    least = least_host_bytes(p, device)
    return p.replan({p.device: device, "cpu": least + int(host_share * max(0, check_host(most.emitted) - least))})


@settings(max_examples=25)
@given(cases(), SHARES, SHARES)
def test_random_modules(case: Case, device_share: float, host_share: float) -> None:
    eager, module = case.fresh(), case.fresh()
    p = planned(case, module)
    if p is None:
        return
    p = within(p, device_share, host_share)
    with torch.no_grad():
        m = p.build()
        for _ in range(2):
            assert same(m(*case.args, **case.kwargs), eager(*case.args, **case.kwargs))
            report = m.report()
            assert report.peak_bytes == p.peak_bytes <= p.budget_bytes
            assert report.locked_bytes == check_host(p.emitted) <= (p.budget.host_bytes or 0)
        assert same(dict(m.named_buffers()), dict(eager.named_buffers()))
    assert p.restore() is module
    assert same(dict(module.state_dict()), dict(eager.state_dict()))


@pytest.mark.parametrize(("name", "repeats"), [("bert", 1), ("bert", 4), ("t5_encoder", 4), ("vae_decoder", 1)])
def test_models(name: str, repeats: int) -> None:
    """As predicted in the call that is: the fourth of four that follow each other, where the ring is filled over the seam."""
    module, args, kwargs = ZOO[name]()
    with torch.no_grad():
        expected = module(*args, **kwargs)
    free = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", repeats=repeats, allow=("offload",))
    read = 0
    for device_share, host_share in ((0.0, 0.0), (0.4, 0.2), (0.2, 1.0)):
        p = within(free, device_share, host_share)
        host = p.layout.host
        assert host is not None
        read += host.read_bytes
        m = p.build()
        for _ in range(repeats):
            with torch.no_grad():
                assert same(m(*args, **kwargs), expected)
        report = m.report()
        assert report.peak_bytes == p.peak_bytes <= p.budget_bytes
        assert report.locked_bytes == check_host(p.emitted) <= host.budget_bytes
        assert report.read_bytes == host.read_bytes
        assert report.step_seconds == pytest.approx(p.step_seconds)
        assert report.disk_stall_seconds == pytest.approx(p.timeline.disk_stall_seconds, abs=1e-12)
        assert [(r.bundle, r.nbytes) for r in report.measured_timeline.reads] == [(r.bundle, r.nbytes) for r in host.reads]
        found = [t for r in report.measured_timeline.reads for t in (r.start, r.stop)]
        assert found == pytest.approx([t for r in p.timeline.reads for t in (r.start, r.stop)], abs=1e-9)
        p.restore()
    assert read > 0


def test_more_memory_on_the_host_reads_no_more() -> None:
    module, args, kwargs = ZOO["bert"]()
    free = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting")
    read = [within(free, 0.1, share).layout.host.read_bytes for share in (0.0, 0.25, 0.5, 0.75, 1.0)]  # type: ignore[union-attr]
    assert read == sorted(read, reverse=True)
    assert read[0] > read[-1] == 0


def test_values_and_weights_share_the_host() -> None:
    module, x = Skips().eval(), torch.randn(1, 3, 128, 96)
    roomy = plan(module, "1GB", inputs=(x,), device="accounting", machine="rtx-4090")
    least = roomy.replan(roomy.minimum_bytes)
    assert least.layout.host_bytes > 0
    with torch.no_grad():
        expected = module(x)
    p = roomy.replan({"accounting": least.budget_bytes, "cpu": least_host_bytes(roomy, least.budget_bytes)})
    m = p.build()
    for _ in range(2):
        assert torch.allclose(m(x), expected, atol=1e-5)
        assert m.report().peak_bytes == p.peak_bytes
        assert m.report().locked_bytes == check_host(p.emitted) <= (p.budget.host_bytes or 0)
    p.restore()


@cache
def late_plan(repeats: int) -> tuple[Plan, torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    module, args, kwargs = ZOO["bert"]()
    free = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", repeats=repeats, allow=("offload",))
    return within(free, 0.1, 0.3), module, args, kwargs


@settings(max_examples=8)
@given(st.lists(st.sampled_from([0.0, 0.0, 0.002]), min_size=4, max_size=4), st.sampled_from([1, 3]))
def test_a_late_disk_gives_the_same_bits(delays: list[float], repeats: int) -> None:
    p, module, args, kwargs = late_plan(repeats)
    with torch.no_grad():
        expected = module(*args, **kwargs)
    assert p.layout.host is not None
    assert p.layout.host.reads
    own, count = OpenFile.read_into, iter(range(10**9))

    def late(self: OpenFile, target: memoryview, offset: int) -> None:
        time.sleep(delays[next(count) % len(delays)])
        own(self, target, offset)

    m = p.build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenFile, "read_into", late)
        for _ in range(3):
            assert same(m(*args, **kwargs), expected)
            assert m.report().peak_bytes == p.peak_bytes
    p.restore()
