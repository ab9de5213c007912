"""`p.emit` of plans whose weights are elsewhere: on meta, in a checkpoint's folder, in another module."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import runtime
from planner import PackageError, Plan, PlannerError, plan
from tests.planner.toys import Mlp, planned, x


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "package"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    save_file(Mlp(hidden=64).state_dict(), path / "model.safetensors")
    return path


def meta_plan(device: str = "accounting", **options: Any) -> Plan:
    with torch.device("meta"):
        module = Mlp(hidden=64).eval()
    p = plan(module, "1MB", inputs=(x(),), device=device, **options)
    return p.replan(p.minimum_bytes)


def from_checkpoint(folder: Path) -> nn.Module:
    module = Mlp(hidden=64).eval()
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return module


@pytest.mark.parametrize("copy_", [True, False])
@pytest.mark.parametrize("device", ["accounting", "cpu"])
def test_weights_of_a_checkpoint_folder(checkpoint: Path, folder: Path, copy_: bool, device: str) -> None:
    meta_plan(device).emit(folder, checkpoint, copy=copy_)
    own = list(folder.glob("*.safetensors"))
    assert bool(own) == copy_
    wanted = from_checkpoint(checkpoint)(x())
    if copy_:
        shutil.rmtree(checkpoint)
    loaded = runtime.load(folder)
    assert torch.equal(loaded(x()), wanted)
    loaded.close()


def test_what_a_checkpoint_has_otherwise_is_written(checkpoint: Path, folder: Path) -> None:
    module = from_checkpoint(checkpoint)
    state = {name: value.double() if name == "up.weight" else value for name, value in module.state_dict().items()}
    save_file(state, checkpoint / "model.safetensors")
    meta_plan().emit(folder, checkpoint, copy=False)
    data = json.loads((folder / "plan.json").read_text())
    written = {name for name, entry in data["tensors"].items() if "crc32" in entry}
    assert written == {"up.weight"}
    loaded = runtime.load(folder)
    assert torch.equal(loaded(x()), module(x()))
    loaded.close()


def test_a_checkpoint_that_was_moved(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    meta_plan().emit(folder, checkpoint, copy=False)
    wanted = from_checkpoint(checkpoint)(x())
    shutil.copytree(checkpoint, tmp_path / "moved", copy_function=shutil.copyfile)
    shutil.rmtree(checkpoint)
    with pytest.raises(
        PackageError, match=r"model.safetensors.*the package has the tensor '.*' in it; runtime.load\(folder, checkp"
    ):
        runtime.load(folder)
    loaded = runtime.load(folder, checkpoint=tmp_path / "moved")
    assert torch.equal(loaded(x()), wanted)
    loaded.close()


def test_no_weights(folder: Path) -> None:
    with pytest.raises(PlannerError, match=r"the weight '.*' is on the meta device .*p.emit\(folder, weights=<module"):
        meta_plan().emit(folder)
    assert not folder.exists()
    with pytest.raises(PlannerError, match=r"copy=False refers to files of a checkpoint: say which"):
        planned(Mlp(), x()).emit(folder, copy=False)
    meta_plan().emit(folder, Mlp(hidden=64))
    assert folder.exists()


@pytest.mark.parametrize("device", ["accounting", "cpu"])
def test_of_a_plan_that_was_built_with_weights_from_elsewhere(checkpoint: Path, folder: Path, device: str) -> None:
    p = meta_plan(device)
    m = p.build(weights=checkpoint)
    with torch.no_grad():
        m.up.weight.mul_(2)  # as the module is now
    p.emit(folder)
    wanted = m(x())
    p.restore()
    loaded = runtime.load(folder)
    assert torch.equal(loaded(x()), wanted)
    loaded.close()
