"""Budgets of host and disk as users meet them: errors, files, printing, checkpoints, casts, later calls, full disks."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import runtime
from passes.check_host import check_host
from planner import InfeasibleBudget, Plan, PlanFileError, plan
from planner.cli import main
from runtime.errors import CheckpointError, StoreError
from tests.planner.checkpoints import bert, call_of, saved
from tests.planner.routed import Branch, rows


class Layers(nn.Module):
    """Layers that are streamed, a buffer that is written, and a weight that no call reads."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(10)])
        self.unread = nn.Parameter(torch.randn(20_000))
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.layers(x) + self.calls.sum()  # type: ignore[no-any-return]


X = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
DEVICE, HOST = 160_000, 150_000


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(folder))
    return folder


def planned(module: nn.Module, host: int | str = HOST, **options: object) -> Plan:
    return plan(module, {"accounting": DEVICE, "cpu": host}, inputs=(X,), **options)  # type: ignore[arg-type]


def test_part_is_read_from_disk_and_everything_comes_back(scratch: Path) -> None:
    module, own = Layers().eval(), Layers().eval()
    own.load_state_dict(module.state_dict())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    p = planned(module)
    assert p.layout.host is not None
    assert p.layout.host.reads
    assert "unread" not in p.layout.host.held
    m = p.build()
    assert p.homes is not None
    file = next(scratch.glob("*/*.safetensors"))
    assert p.homes.scratch_bytes <= file.stat().st_size <= p.homes.scratch_bytes + 8192
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(m(X), own(X))
        report = m.report()
        assert report.peak_bytes == p.peak_bytes
        assert report.locked_bytes == check_host(p.emitted) <= HOST
        assert report.read_bytes == p.layout.host.read_bytes > 0
    p.restore()
    assert not list(scratch.iterdir())
    before["calls"] += 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_enough_memory_reads_nothing_and_writes_nothing(scratch: Path) -> None:
    module = Layers().eval()
    p = planned(module, "10MB")
    assert p.layout.host is not None
    assert not p.layout.host.reads
    m = p.build()
    m(X)
    assert not list(scratch.iterdir())
    assert m.report().locked_bytes == check_host(p.emitted) >= p.weight_bytes + 80_000
    assert p.step_seconds == p.replan(DEVICE).step_seconds
    p.restore()


def test_too_little_memory_says_the_least_and_whose(scratch: Path) -> None:
    module = Layers().eval()
    with pytest.raises(
        InfeasibleBudget, match=r"host budget 100 B .* of host memory: .* Write budget=\{\.\.\., 'cpu': "
    ) as caught:
        planned(module, 100)
    least = caught.value.minimum_bytes
    assert (caught.value.memory, caught.value.budget_bytes) == ("cpu", 100)
    with pytest.raises(InfeasibleBudget):
        planned(module, least - 1)
    p = planned(module, least)
    with torch.no_grad():
        expected = copy.deepcopy(module)(X)
        assert torch.equal(p.build()(X), expected)
    p.restore()


def test_too_little_disk_says_the_least_and_whose(scratch: Path) -> None:
    module = Layers().eval()
    with pytest.raises(
        InfeasibleBudget, match=r"disk budget 1\.00 KB .* the least possible beside 150 KB of host memory"
    ) as caught:
        plan(module, {"accounting": DEVICE, "cpu": HOST, "disk": 1000}, inputs=(X,))
    least = caught.value.minimum_bytes
    assert caught.value.memory == "disk"
    with pytest.raises(InfeasibleBudget):
        plan(module, {"accounting": DEVICE, "cpu": HOST, "disk": least - 1}, inputs=(X,))
    p = plan(module, {"accounting": DEVICE, "cpu": HOST, "disk": least}, inputs=(X,))
    p.build()(X)
    p.restore()


def test_a_disk_that_fills_up_leaves_nothing_and_the_module_as_it_was(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Layers().eval()
    before, place = module.state_dict(), module.unread.data_ptr()
    own, written = os.pwrite, iter(range(10**9))

    def full(fd: int, data: object, offset: int) -> int:
        if next(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return own(fd, data, offset)  # type: ignore[arg-type]

    p = planned(module)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match="No space left on device"):
        p.build()
    monkeypatch.undo()
    assert not list(scratch.iterdir())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.unread.data_ptr() == place
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(scratch))
    planned(module).build()(X)


def test_a_plan_file_keeps_what_is_where(scratch: Path, tmp_path: Path) -> None:
    module = Layers().eval()
    p = planned(module, repeats=3)
    p.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json", module)
    assert loaded == p
    assert loaded.layout == p.layout
    assert loaded.decisions.homes == p.decisions.homes
    assert str(loaded) == str(p)
    data = json.loads((tmp_path / "plan.json").read_text())
    del data["decisions"]["homes"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match="do not say what is there"):
        Plan.load(tmp_path / "plan.json", module)
    data["decisions"]["homes"] = {
        "held": ["nobody"],
        "tables": [],
        "other_bytes": 0,
        "slot_bytes": 4096,
        "slots": 4,
        "bounce": 2,
    }
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match="do not fit the program"):
        Plan.load(tmp_path / "plan.json", module)


def test_printing_says_what_the_host_holds_and_does_not_solve_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    p = planned(Layers().eval(), machine="rtx-4090")
    monkeypatch.setattr("planner.solve.tilings.Tilings.solve", lambda *a: pytest.fail("solved again"))
    text = str(p)
    assert re.search(r"host +150 KB, of which \d+ KB are taken, 24\.6 KB of them a ring of 6 slots", text)
    assert re.search(r"disk +\d+ KB read per step in \d+ reads", text)


def test_the_frontier_and_the_gap_know_of_the_disk() -> None:
    p = planned(Layers().eval(), machine="rtx-4090")
    free = p.replan(DEVICE)
    assert p.step_seconds > free.step_seconds
    assert p.bound_seconds >= free.bound_seconds
    assert p.bound.read_bytes > 0
    rows, others = p.frontier([DEVICE, 300_000]).rows, free.frontier([DEVICE, 300_000]).rows
    assert rows[0].step_seconds == p.step_seconds > (others[0].step_seconds or 0)
    assert all(row.step_seconds is not None and row.step_seconds >= row.bound_seconds for row in rows)
    assert p.gap.lp_seconds <= p.step_seconds


def test_the_shell_takes_budgets_by_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "p.json")
    code = main(["plan", "tests.planner.test_host_budget:made", "--budget", "accounting=160KB,cpu=150KB", "-o", out])
    assert code == 0
    assert "disk" in capsys.readouterr().out
    assert main(["show", out]) == 0
    assert "host      150 KB" in capsys.readouterr().out
    assert main(["plan", "tests.planner.test_host_budget:made", "--budget", "accounting=160KB,cpu=1KB", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["memory"] == "cpu"
    assert main(["plan", "tests.planner.test_host_budget:made", "--budget", "accounting=160KB,ram=1KB"]) == 2
    assert "unknown device 'ram'" in capsys.readouterr().err


def made() -> tuple[nn.Module, tuple[torch.Tensor], dict[str, object]]:
    return Layers().eval(), (X,), {}


def test_a_later_call_keeps_what_is_in_memory(scratch: Path) -> None:
    module, own = Layers().eval(), Layers().eval()
    own.load_state_dict(module.state_dict())
    p = planned(module)
    m = p.build()
    locked = []
    for count in (4, 7, 4, 2):
        x = torch.randn(count, 96)
        with torch.no_grad():
            assert torch.equal(m(x), own(x))
        locked.append(m.report().locked_bytes)
    assert max(locked) <= HOST
    p.restore()


def test_weights_written_in_place_are_read_again(scratch: Path) -> None:
    for repeats in (1, 3):
        module, own = Layers().eval(), Layers().eval()
        own.load_state_dict(module.state_dict())
        p = planned(module, repeats=repeats)
        m = p.build()
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(m(X), own(X))
                for one, other in zip(m.layers, own.layers, strict=True):  # type: ignore[call-overload]
                    one.weight.mul_(1.5)
                    other.weight.mul_(1.5)
            assert torch.equal(m(X), own(X))
        p.restore()
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), own.parameters(), strict=True))


def test_a_checkpoint_is_read_where_it_lies(tmp_path: Path, scratch: Path) -> None:
    module = saved(bert, tmp_path / "bert")
    _, kwargs = call_of(module)
    with torch.no_grad():
        expected = module(**kwargs).last_hidden_state
    free = plan(str(tmp_path / "bert"), "1GB", kwargs=kwargs, device="accounting")
    p = free.replan({"accounting": free.minimum_bytes + 20_000, "cpu": "60KB", "disk": 1})
    assert p.layout.host is not None
    assert p.layout.host.reads
    m = p.build()
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(m(**kwargs).last_hidden_state, expected)
        assert m.report().locked_bytes <= 60_000
        assert m.report().peak_bytes == p.peak_bytes
    assert not list(scratch.iterdir())
    with torch.no_grad():
        for ours, theirs in zip(m.parameters(), module.parameters(), strict=True):
            ours.mul_(2)
            theirs.mul_(2)
        assert torch.equal(m(**kwargs).last_hidden_state, module(**kwargs).last_hidden_state)
    next((tmp_path / "bert").glob("*.safetensors")).touch()
    with pytest.raises(CheckpointError):
        m(**kwargs)
    p.restore()


def test_casts_and_the_host(scratch: Path) -> None:
    """What is stored is read, and the originals go to disk too: nothing of them stays in memory."""
    module, x, budget = Layers(256).eval(), torch.randn(4, 256), {"accounting": 900_000, "cpu": 200_000}
    p = plan(module, budget, inputs=(x,), allow_cast="int8")
    assert p.decisions.tiling.casts
    assert p.layout.host is not None
    assert p.layout.host.reads
    m = p.build()
    with torch.no_grad():
        found = m(x)
    assert m.report().locked_bytes == check_host(p.emitted) <= 200_000
    p.restore()
    module.calls.zero_()
    again = plan(module, 10**9, inputs=(x,), device="accounting", allow_cast="int8")
    again = Plan(module, again.options, again._tilings, replace(p.decisions, homes=None))
    with torch.no_grad():
        assert torch.equal(again.build()(x), found)
    again.restore()


def test_an_emitted_package_reads_from_its_own_files(tmp_path: Path, scratch: Path) -> None:
    module, own = Layers().eval(), Layers().eval()
    own.load_state_dict(module.state_dict())
    p = planned(module)
    p.emit(tmp_path / "package")
    m = runtime.load(tmp_path / "package")
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(m(X), own(X))
        report = m.report()
        assert report.peak_bytes == p.peak_bytes
        assert report.locked_bytes <= HOST
        assert report.read_bytes > 0
    assert not list(scratch.iterdir())
    m.close()


def test_small_parts_have_all_weights_in_memory() -> None:
    """Their rings would take more (larger ones: `test_parted_host`)."""
    module, x = Branch().eval(), rows()
    with pytest.raises(InfeasibleBudget, match=r"of host memory: all weights\.") as caught:
        plan(module, {"accounting": "1GB", "cpu": 100}, inputs=(x,))
    least = caught.value.minimum_bytes
    p = plan(module, {"accounting": "1GB", "cpu": least}, inputs=(x,))
    m = p.build()
    m(x)
    assert m.report().locked_bytes <= least
    p.restore()
