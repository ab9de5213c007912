"""Models in parts whose weights do not fit the host: the same bits, every memory within its budget, reads as predicted."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from planner import InfeasibleBudget, Plan, PlanFileError
from planner.host_budget import all_bytes, module_tensors
from planner.parted import PartedPlan
from tests.planner.routed import Branch as Small
from tests.planner.routed import mlp
from tests.planner.test_parted import parted

pytestmark = pytest.mark.usefixtures("scratch")

WIDTH = 256


def rows(count: int = 8, shift: float = 0.0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count)) + shift


class Branch(Small):
    """The same, so large that a ring for its weights is little beside them."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 256)


class Loop(nn.Module):
    """Halves until it is small: how often only the data knows."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.after = mlp(256, WIDTH), mlp(256, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        turns = 0
        while x.abs().max() > 0.5 and turns < 5:
            x, turns = self.step(x) / 2, turns + 1
        return self.after(x)


VALUES = [rows(shift=shift) for shift in (-0.5, 0.5, 0.0)]


@functools.cache
def made(kind: type[nn.Module]) -> PartedPlan:
    torch.manual_seed(1)
    return parted(kind(), rows())


def weights_of(p: PartedPlan) -> int:
    return all_bytes(module_tensors(p.target, None))


def replanned(free: PartedPlan, host: int, share: float = 0.0, **more: int) -> PartedPlan:
    device = max(free.minimum_bytes, int(share * free.unplanned_bytes))
    p = free.replan({"accounting": device, "cpu": host, **more})
    assert isinstance(p, PartedPlan)
    return p


def least_of(free: PartedPlan, share: float = 0.0) -> int:
    with pytest.raises(InfeasibleBudget, match=r"host budget 1 B .* Write budget=") as caught:
        replanned(free, 1, share)
    assert caught.value.memory == "cpu"
    return caught.value.minimum_bytes


def check_runs(p: PartedPlan) -> None:
    reference = copy.deepcopy(p.target).eval()
    m = p.build()
    count = sum(p.exploration.calls[key] * len(part.program.weights) for key, part in p.parts.items())
    for value in VALUES:
        with torch.no_grad():
            assert torch.equal(m(value), reference(value))
        report = m.report()
        assert report.peak_bytes <= p.peak_bytes <= p.budget_bytes
        assert 0 < report.locked_bytes <= (p.locked_bytes or 0) <= (p.budget.host_bytes or 0)
        assert report.read_bytes <= p.read_bytes + 64 * 3 * count  # of the path that reads most
    p.restore()


@pytest.mark.parametrize("share", [0.0, 0.7])
@pytest.mark.parametrize("host", ["half", "least"])
@pytest.mark.parametrize("kind", [Branch, Loop])
def test_the_same_bits_within_the_hosts_budget(kind: type[nn.Module], host: str, share: float, scratch: Path) -> None:
    free = made(kind)
    before = {name: tensor.clone() for name, tensor in free.target.state_dict().items()}
    p = replanned(free, weights_of(free) // 2 if host == "half" else least_of(free, share), share)
    assert p.spills
    assert p.written_bytes > 0
    check_runs(p)
    assert all(torch.equal(tensor, before[name]) for name, tensor in p.target.state_dict().items())


def test_the_least_is_said_of_small_models_too() -> None:
    """Rings take whole pages: there all weights in memory may take less."""
    torch.manual_seed(1)
    free = parted(Small(), torch.randn(6, 32))
    with pytest.raises(InfeasibleBudget, match=r"of host memory: all weights\. Write") as caught:
        replanned(free, 1)
    assert caught.value.minimum_bytes == weights_of(free)
    assert not replanned(free, weights_of(free)).spills


def test_what_python_reads_is_in_memory() -> None:
    free = made(Branch)
    p = replanned(free, least_of(free))
    assert p.held is not None
    assert "scale" in p.held
    assert p.read_bytes > 0
    check_runs(p)
    with pytest.raises(InfeasibleBudget):
        replanned(free, least_of(free) - 1)


def test_where_all_weights_fit_nothing_is_read() -> None:
    free = made(Branch)
    p = replanned(free, weights_of(free))
    assert (p.spills, p.read_bytes, p.locked_bytes) == (False, 0, weights_of(free))
    check_runs(p)


def test_calls_that_were_not_explored_stay_within_the_hosts_budget() -> None:
    free = made(Branch)
    p = replanned(free, weights_of(free) // 2, 1.5)
    reference = copy.deepcopy(p.target).eval()
    m = p.build()
    for value in (rows(3), rows(20), rows(20, shift=1.0), rows()):
        with torch.no_grad():
            assert torch.equal(m(value), reference(value))
        assert m.report().locked_bytes <= (p.budget.host_bytes or 0)
    p.restore()


def test_plans_are_saved_and_loaded(tmp_path: Path) -> None:
    free = made(Branch)
    p = replanned(free, least_of(free))
    p.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json", p.target, inputs=(rows(),))
    assert isinstance(loaded, PartedPlan)
    assert loaded == p
    assert (loaded.held, loaded.locked_bytes, loaded.read_bytes) == (p.held, p.locked_bytes, p.read_bytes)
    data = json.loads((tmp_path / "plan.json").read_text())
    del data["decisions"]["held"]["scale"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match="I3: Python reads scale, which is on disk"):
        Plan.load(tmp_path / "plan.json", p.target, inputs=(rows(),))
    del data["decisions"]["held"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match=r"I1: .* nothing says which are on disk"):
        Plan.load(tmp_path / "plan.json", p.target, inputs=(rows(),))


def test_printing_says_what_comes_from_disk() -> None:
    free = made(Branch)
    text = str(replanned(free, least_of(free)))
    assert "\n  host      " in text
    assert " read in a call; " in text
