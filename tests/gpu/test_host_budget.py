"""On a real device: a budget for page-locked memory is kept, what is read from disk arrives in time and whole."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from passes.check_host import check_host
from planner import Plan, plan
from runtime.weight_file import OpenFile

pytestmark = pytest.mark.gpu

MB = 1_000_000


class Deep(nn.Module):
    """Layers of 4 MB each, and a table of which rows are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20_000, 1024)
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(24)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.table(x))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(tmp_path))


def spilled(module: nn.Module, ids: torch.Tensor, host: int, repeats: int) -> Plan:
    least = plan(module, "2GB", inputs=(ids,), device="cuda", repeats=repeats).minimum_bytes
    return plan(module, {"cuda": least + 12 * MB, "cpu": host}, inputs=(ids,), repeats=repeats)


@pytest.mark.parametrize("repeats", [1, 6])
@pytest.mark.parametrize("host", [8 * MB, 40 * MB, 90 * MB])
@pytest.mark.parametrize("late", [0.0, 0.003])
def test_within_both_budgets_the_same_values(host: int, repeats: int, late: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Deep().eval()
    ids = torch.randint(20_000, (256,), device="cuda")
    free = plan(module, "2GB", inputs=(ids,), device="cuda")
    with torch.no_grad():
        expected = free.build()(ids).clone()
    free.restore()
    p = spilled(module, ids, host, repeats)
    assert p.layout.host is not None
    assert p.layout.host.reads
    m = p.build()
    own = OpenFile.read_into

    def slow(self: OpenFile, target: memoryview, offset: int) -> None:
        time.sleep(late)
        own(self, target, offset)

    monkeypatch.setattr(OpenFile, "read_into", slow)
    for _ in range(6):
        assert torch.equal(m(ids), expected)
    report = m.report()
    assert report.host_pinned
    assert report.peak_bytes <= p.peak_bytes
    assert report.reserved_bytes is not None
    assert report.reserved_bytes <= p.budget_bytes
    assert report.locked_bytes == check_host(p.emitted) <= host
    assert report.read_bytes == p.layout.host.read_bytes
    p.restore()


def test_a_file_that_is_cut_is_named_and_the_module_stays_usable(tmp_path: Path) -> None:
    module, ids = Deep().eval(), torch.arange(64, device="cuda")
    p = spilled(module, ids, 20 * MB, 3)
    m = p.build()
    expected = m(ids).clone()
    own, broken = OpenFile.read_into, [True]

    def cut(self: OpenFile, target: memoryview, offset: int) -> None:
        if broken[0]:
            raise OSError("cut")
        own(self, target, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenFile, "read_into", cut)
        with pytest.raises(OSError, match="cut"):
            [m(ids) for _ in range(3)]  # what was read ahead may serve the first
        broken[0] = False
        assert torch.equal(m(ids), expected)
    p.restore()
