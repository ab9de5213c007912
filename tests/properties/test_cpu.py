"""I7 on `cpu`: what PyTorch's C++ allocator counts never exceeds the prediction, which knows the scratch of kernels too."""

import copy

import pytest
import torch
from hypothesis import given

from planner import Plan, plan
from runtime.devices.cpu import CpuDevice
from tests.properties.test_plans import SHARES, budget_at, planned, same
from tests.strategies.modules import Case, cases
from tests.zoo import ZOO


def measured(p: Plan) -> torch.nn.Module:
    """Built, and measured in every call."""
    m = p.build()
    device = m._runner.device
    assert isinstance(device, CpuDevice)
    device.measure_every_call = True
    return m


@given(cases(), SHARES)
def test_runs_as_eager_and_the_allocator_agrees(case: Case, share: float) -> None:
    eager, module = case.fresh(), case.fresh()
    p = planned(case, module, "cpu")
    if p is None:
        return
    p = p.replan(budget_at(p, share))
    m = measured(p)
    for _ in range(3):
        with torch.no_grad():
            expected = eager(*copy.deepcopy(case.args), **copy.deepcopy(case.kwargs))
        assert same(m(*case.args, **case.kwargs), expected)
        assert m.report().peak_bytes <= p.peak_bytes <= p.budget_bytes
    assert same(dict(m.named_buffers()), dict(eager.named_buffers()))
    assert p.restore() is module
    assert same(dict(module.state_dict()), dict(eager.state_dict()))


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_models_of_the_zoo(name: str, share: float) -> None:
    module, args, kwargs = ZOO[name]()
    with torch.no_grad():
        expected = module(*args, **kwargs)
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="cpu")
    p = p.replan(max(p.minimum_bytes, int(share * p.unplanned_bytes)))
    m = measured(p)
    for _ in range(3):
        assert same(m(*args, **kwargs), expected)
        assert 0.8 * p.peak_bytes <= m.report().peak_bytes <= p.peak_bytes <= p.budget_bytes
    p.restore()
