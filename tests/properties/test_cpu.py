"""I7 on `cpu`: what PyTorch's C++ allocator counts never exceeds the prediction, which knows the scratch of kernels too."""

import copy

import pytest
import torch
from hypothesis import given
from torch import nn

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
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="cpu", allow=("offload",))
    p = p.replan(max(p.minimum_bytes, int(share * p.unplanned_bytes)))
    m = measured(p)
    for _ in range(3):
        assert same(m(*args, **kwargs), expected)
        assert 0.8 * p.peak_bytes <= m.report().peak_bytes <= p.peak_bytes <= p.budget_bytes
    p.restore()


class _Recurrent(nn.Module):
    """Sequences [T, B, 16] through a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(16, 32, num_layers=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(x)[0]


class _Attention(nn.Module):
    """Tokens [B, T, 64] through projections and masked attention of 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


HIDDEN = {
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 16, 3, padding=1), nn.SiLU(), nn.Conv3d(16, 4, 3)), (1, 4, 6, 12, 12)),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 16, 3), nn.GroupNorm(4, 16), nn.ConvTranspose2d(16, 4, 4, 2)),
        (2, 4, 16, 16),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(100, 300), nn.GELU(), nn.Linear(300, 77)), (3, 20, 100)),
    "gru": (_Recurrent, (9, 2, 16)),
    "attention": (_Attention, (2, 40, 64)),
}


@pytest.mark.parametrize("name", sorted(HIDDEN))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_kernels_hide_is_predicted(name: str, dtype: torch.dtype) -> None:
    make, shape = HIDDEN[name]
    module, x = make().eval().to(dtype), torch.randn(shape).to(dtype)
    with torch.no_grad():
        expected = module(x)
    p = plan(module, "1GB", inputs=(x,), device="cpu", allow=("offload",))  # whole operators give the same bits
    assert p.minimum_bytes >= plan(module, "1GB", inputs=(x,), device="accounting", allow=("offload",)).minimum_bytes
    p = p.replan(p.minimum_bytes)
    m = measured(p)
    for _ in range(3):
        assert same(m(x), expected)
        assert 0.8 * p.peak_bytes <= m.report().peak_bytes <= p.peak_bytes <= p.budget_bytes
    p.restore()
