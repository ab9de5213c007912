"""Calibration: scratch that only the allocator sees, measured once, kept, and never guessed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from passes import calibrate
from passes.calibrate import Calibrator, cache_file, environment, free_ram_bytes
from passes.probe import Prober
from planner import plan
from runtime.allocations import AllocationTrace
from runtime.errors import UnknownSize
from tests.passes.programs import canonical

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    calibrate._known.cache_clear()


def node_of(module: nn.Module, *args: Any, target: str) -> fx.Node:
    program = canonical(module.eval(), *args)
    return next(n for n in program.ops() if str(n.target) == target)


def conv3d() -> fx.Node:
    return node_of(nn.Conv3d(8, 16, 3), torch.randn(1, 8, 8, 8, 8), target="aten.conv3d.default")


def test_scratch_of_kernels_is_seen() -> None:
    im2col = 8 * 27 * 6**3 * 4
    assert Prober("cpu").cost(conv3d()).workspace_bytes == 0  # all that fakes know
    assert Prober("cpu", calibrator=Calibrator(None)).cost(conv3d()).workspace_bytes >= im2col


@pytest.mark.parametrize(
    ("module", "args", "target"),
    [
        (nn.Linear(30, 70).to(torch.bfloat16), (torch.randn(5, 30).to(torch.bfloat16),), "aten.linear.default"),
        (nn.LSTM(8, 16), (torch.randn(5, 2, 8), (torch.ones(1, 2, 16), torch.ones(1, 2, 16))), "aten.lstm.input"),
        (nn.Embedding(10, 4), (torch.tensor([3, 9]),), "aten.embedding.default"),
        (nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last), (torch.randn(1, 8, 9, 9),), "aten.conv2d.default"),
    ],
)
def test_it_is_what_the_operator_takes(module: nn.Module, args: tuple[Any, ...], target: str) -> None:
    cost = Prober("cpu", calibrator=Calibrator(None)).cost(node_of(module, *args, target=target))
    with torch.no_grad(), AllocationTrace() as trace:
        result = module(*args)
    del result
    assert cost.workspace_bytes == trace.peak_bytes - sum(cost.output_bytes)


def test_each_distinct_call_runs_once_and_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "w.json"
    first = Calibrator(file)
    known = Prober("cpu", calibrator=first).cost(conv3d())
    Prober("cpu", calibrator=first).cost(conv3d())
    assert first.runs == 1
    first.save()
    calibrate._known.cache_clear()
    second = Calibrator(file)
    assert Prober("cpu", calibrator=second).cost(conv3d()) == known
    assert second.runs == 0
    ((name, nbytes),) = json.loads(file.read_text())["workspace_bytes"].items()
    assert name.startswith("aten.conv3d.default|")
    assert nbytes == known.workspace_bytes


def test_another_environment_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calibrator = Calibrator(None)
    Prober("cpu", calibrator=calibrator).cost(conv3d())
    monkeypatch.setattr(calibrate, "environment", lambda: (*environment(), "another"))
    Prober("cpu", calibrator=calibrator).cost(conv3d())
    assert calibrator.runs == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 0, "workspace_bytes": {"a": 1}}', '{"version": 1}'])
def test_a_damaged_file_is_written_anew(tmp_path: Path, content: str) -> None:
    file = tmp_path / "w.json"
    file.write_text(content)
    calibrator = Calibrator(file)
    Prober("cpu", calibrator=calibrator).cost(conv3d())
    calibrator.save()
    assert len(json.loads(file.read_text())["workspace_bytes"]) == 1


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    calibrator = Calibrator(tmp_path / "file" / "w.json")
    Prober("cpu", calibrator=calibrator).cost(conv3d())
    calibrator.save()


def test_where_results_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
    assert cache_file() == tmp_path / "workspace-v1.json"
    monkeypatch.delenv("VRAMPLAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "vramplan" / "workspace-v1.json"


def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "free_ram_bytes", lambda: 10_000)
    with pytest.raises(UnknownSize, match=r"aten\.conv3d\.default takes at least \d+ bytes and this machine has 10000 free"):
        Prober("cpu", calibrator=Calibrator(None)).cost(conv3d())
    assert free_ram_bytes() > 10_000


def test_operators_that_refuse_zeros_get_other_data() -> None:
    class Divides(nn.Module):
        def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x) + torch.remainder(n, n)

    args = (torch.eye(4), torch.full((4,), 2))
    p = plan(Divides().eval(), "1GB", inputs=args, device="cpu")
    assert torch.equal(p.build()(*args), torch.eye(4))


def test_an_operator_that_runs_on_no_made_up_data_has_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise RuntimeError("only on Sundays")

    monkeypatch.setattr(calibrate, "_run", refuse)
    with pytest.raises(UnknownSize, match=r"aten\.conv3d\.default cannot be run without its data \(only on Sundays\)"):
        Prober("cpu", calibrator=Calibrator(None)).cost(conv3d())


def test_traces_that_lack_events_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    leave, seen = AllocationTrace.__exit__, []

    def lossy(self: AllocationTrace, *error: object) -> None:
        leave(self, *error)
        seen.append(self)
        if len(seen) in (1, 3):
            self.peak_bytes, self.end_bytes = 0, -64

    honest = Prober("cpu", calibrator=Calibrator(None)).cost(conv3d())
    calibrate._known.cache_clear()
    monkeypatch.setattr(AllocationTrace, "__exit__", lossy)
    assert Prober("cpu", calibrator=Calibrator(None)).cost(conv3d()) == honest
    assert len(seen) == 4


def test_random_numbers_are_not_used_up() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(4)

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    plan(Noise().eval(), "1GB", inputs=(torch.ones(4),), device="cpu")
    assert torch.equal(torch.rand(2), expected)
