"""Folders of whole pipelines: planned without weights, built from where these lie; damaged ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from planner import CheckpointError, PlannerError, plan
from planner.frontends.diffusers_pipeline import components_of
from planner.pipeline_plan import PipelinePlan
from runtime.origins import has_no_bytes
from tests.pipelines import PIPELINES


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], torch.Tensor]:
    """A folder, a call, and what the pipeline itself gives."""
    pipe, call = PIPELINES["StableDiffusion"]()
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    pipe.save_pretrained(folder)
    pipe._progress_bar_config = {"disable": True}
    return folder, call, picture_of(pipe, call)


def picture_of(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    images: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    return images


def modules(pipe: Any) -> list[nn.Module]:
    return list(components_of(pipe).values())


@pytest.mark.parametrize("device", ["accounting", "cpu"])
def test_a_folder_gives_what_its_pipeline_gives(
    saved: tuple[Path, dict[str, Any], torch.Tensor], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, call, own = saved
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(tmp_path))
    p = plan(folder, "1GB", call=call, device=device, allow=("offload",))
    assert isinstance(p, PipelinePlan)
    p = p.replan(max(p.minimum_bytes, p.unplanned_bytes // 2))
    pipe = p.target
    assert all(has_no_bytes(t) for module in modules(pipe) for t in module.parameters())
    assert p.build() is pipe
    assert torch.equal(picture_of(pipe, call), own)
    assert p.report().peak_bytes <= p.budget_bytes
    p.restore()
    assert all(has_no_bytes(t) for module in modules(pipe) for t in module.parameters())


def test_what_has_no_weights_is_the_folders_own(saved: tuple[Path, dict[str, Any], torch.Tensor]) -> None:
    folder, call, _ = saved
    pipe = plan(str(folder), "1GB", call=call, device="accounting").target
    whole = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is type(whole)
    assert pipe.scheduler.config == whole.scheduler.config
    assert pipe.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert {name: type(value) for name, value in pipe.components.items()} == {
        name: type(value) for name, value in whole.components.items()
    }


def test_saved_and_loaded(saved: tuple[Path, dict[str, Any], torch.Tensor], tmp_path: Path) -> None:
    folder, call, own = saved
    p = plan(folder, "1GB", call=call, device="accounting", allow=("offload",), dtype="float32")
    p = p.replan(p.minimum_bytes)
    p.save(tmp_path / "sd.plan.json")
    assert str(folder) not in (tmp_path / "sd.plan.json").read_text()
    loaded = PipelinePlan.load(tmp_path / "sd.plan.json", folder)
    assert loaded.code == p.code
    assert torch.equal(picture_of(loaded.build(), call), own)
    loaded.restore()


def test_a_file_that_changed_since_it_was_planned(saved: tuple[Path, dict[str, Any], torch.Tensor], tmp_path: Path) -> None:
    _, call, _ = saved
    pipe, _ = PIPELINES["StableDiffusion"]()
    pipe.save_pretrained(tmp_path / "sd")
    p = plan(tmp_path / "sd", "1GB", call=call, device="accounting")
    file = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match=r"unet/diffusion_pytorch_model\.safetensors"):
        p.build()
    with pytest.raises(CheckpointError, match=r"unet/diffusion_pytorch_model\.safetensors"):
        plan(tmp_path / "sd", "1GB", call=call, device="accounting")


def test_indexes_that_cannot_be_used(saved: tuple[Path, dict[str, Any], torch.Tensor], tmp_path: Path) -> None:
    _, call, _ = saved
    pipe, _ = PIPELINES["StableDiffusion"]()
    pipe.save_pretrained(tmp_path / "sd")
    index = tmp_path / "sd" / "model_index.json"
    good = json.loads(index.read_text())
    for bad, words in (
        ("{", "cannot be read"),
        ("{}", "names no class of a pipeline"),
        (json.dumps({**good, "unet": ["diffusers", "UNet9D"]}), "has UNet9D of diffusers as its unet, which is not installed"),
    ):
        index.write_text(bad)
        with pytest.raises(PlannerError, match=words):
            plan(tmp_path / "sd", "1GB", call=call, device="accounting")


def test_the_call_is_needed(saved: tuple[Path, dict[str, Any], torch.Tensor]) -> None:
    folder, _, _ = saved
    with pytest.raises(PlannerError, match=r"is a pipeline: say what it is called with, plan\(pipe, budget, call=dict"):
        plan(folder, "1GB", device="accounting")
