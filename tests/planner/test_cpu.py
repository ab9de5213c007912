"""Plans for the `cpu` device: the default without CUDA, the disk as link, free RAM as budget."""

from dataclasses import replace

import pytest
import torch

from planner import Machine, plan
from tests.planner.toys import Mlp, x

X = x()


def mlp() -> torch.nn.Module:
    return Mlp().eval()


def test_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan(mlp(), "1GB", inputs=(X,)).device == "cpu"
    assert plan(mlp(), {"cpu": "1GB", "disk": "2GB"}, inputs=(X,)).budget.disk_bytes == 2_000_000_000
    assert plan(mlp(), "1GB", inputs=(X,), machine="cpu").device == "cpu"
    assert plan(mlp(), "1GB", inputs=(X,), machine="rtx-4090").device == "cuda"


def test_the_disk_is_the_link() -> None:
    machine = replace(Machine.preset("cpu"), disk_bandwidth=1e9)
    p = plan(mlp(), "1GB", inputs=(X,), machine=machine, device="cpu")
    assert p.machine.link_bandwidth == 1e9
    assert plan(mlp(), "1GB", inputs=(X,), machine=machine, device="accounting").machine == machine


def test_no_budget_is_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.api.free_ram_bytes", lambda: 123_456_789)
    assert plan(mlp(), None, inputs=(X,), device="cpu").budget_bytes == 123_456_789
