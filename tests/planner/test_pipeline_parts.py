"""Pipelines with components that cannot be captured whole: the same bits in the predicted bytes, whatever their Python does."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from planner import InfeasibleBudget, PlanFileError, PlannerError, UnknownSize, plan
from planner.host_budget import all_bytes, module_tensors
from planner.pipeline_plan import PipelinePlan
from runtime.origins import named_tensors
from tests.pipelines import PIPELINES

WHAT: dict[str, Any] = {"device": "accounting", "machine": "rtx-4090", "allow": ("offload",)}


class Gated(UNet2DConditionModel):
    """Goes on by a value; reads a parameter of its own."""

    fails = False

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.fails:
            self.conv_in(sample)
            raise RuntimeError("stop here")
        if sample.abs().mean() > 0.5:
            sample = sample * self.scale
        return super().forward(sample, *args, **kwargs)


class GatedText(CLIPTextModel):
    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        found = super().forward(input_ids, **kwargs)
        if found.last_hidden_state.sum() > 0:
            found.last_hidden_state = found.last_hidden_state * 2
        return found


class Keeping(Gated):
    """Holds a tensor from one call to the next."""

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.last = torch.cat([sample] * 16)
        return super().forward(sample, *args, **kwargs)


class Counting(Gated):
    """From its second call on it does what no run on its first state shows; counts in a buffer and in an attribute."""

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.turns = self.turns + 1
        self.seen += sample.shape[0]
        if self.turns > 1:
            self.conv_in(sample.repeat(1, 1, 4, 4))
        return super().forward(sample, *args, **kwargs)


def picture_of(pipe: Any, call: dict[str, Any]) -> Tensor:
    images: Tensor = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    return images


def made(kind: type = Gated, *, text: bool = False) -> tuple[Any, dict[str, Any], Tensor]:
    """A pipeline whose denoiser is of that kind, its call, and what it gives."""
    pipe, call = PIPELINES["StableDiffusion"]()
    torch.manual_seed(4)
    if kind is not UNet2DConditionModel:
        pipe.unet.__class__ = kind
        pipe.unet.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
    if kind is Counting:
        pipe.unet.turns = 0
        pipe.unet.register_buffer("seen", torch.zeros(300))
    if text:
        pipe.text_encoder.__class__ = GatedText
    own = picture_of(pipe, call)
    if kind is Counting:
        pipe.unet.turns = 0
        pipe.unet.seen.zero_()
    return pipe, call, own


Case = tuple[PipelinePlan, dict[str, Any], Tensor]


@functools.cache
def planned(which: str) -> Case:
    kind = UNet2DConditionModel if which == "text" else Gated
    pipe, call, own = made(kind, text="text" in which)
    return plan(pipe, "1GB", call=call, **WHAT), call, own


_BUILT: list[PipelinePlan] = []


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is printed, and nothing stays built, since tests share pipelines."""
    monkeypatch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)
    yield
    while _BUILT:
        _BUILT.pop().restore()


def built(p: PipelinePlan) -> Any:
    _BUILT.append(p)
    return p.build()


@pytest.fixture
def replans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log says of planning again."""
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("vramplan"), "info", lambda text, *args: said.append(text % args))
    return said


@pytest.mark.parametrize("share", [0.0, 0.5, 2.0], ids=["least", "half", "all"])
@pytest.mark.parametrize("which", ["unet", "text", pytest.param("unet and text", marks=pytest.mark.slow)])
def test_the_same_bits_in_the_predicted_bytes(which: str, share: float, replans: list[str]) -> None:
    free, call, own = planned(which)
    assert set(free.opaque) == {f"{name}.forward" for name in ("unet", "text_encoder") if name.partition("_")[0] in which}
    p = free.replan(max(free.minimum_bytes, int(share * free.unplanned_bytes)))
    pipe = built(p)
    for _ in range(2):
        assert torch.equal(picture_of(pipe, call), own)
        assert p.report().peak_bytes == p.peak_bytes <= p.budget_bytes
    copied = p.report().copied_bytes
    assert copied <= 3 * 64 if share > 1 else copied > 3 * 64  # the parameter that Python reads comes for every call
    assert {phase.name for phase in p.report().phases} == {"text_encoder.forward", "unet.forward", "vae.decode"}
    p.restore()
    assert replans == []


def test_less_than_the_least_is_refused() -> None:
    free, _, _ = planned("unet")
    with pytest.raises(InfeasibleBudget, match="the least possible is") as caught:
        free.replan(free.minimum_bytes - 1)
    assert caught.value.minimum_bytes == free.minimum_bytes


def test_all_rewrites_give_the_same_pictures() -> None:
    pipe, call, own = made(text=True)
    p = plan(pipe, "1GB", call=call, device="accounting", machine="rtx-4090")
    for budget in (p.minimum_bytes, p.unplanned_bytes // 2):
        q = p.replan(max(budget, p.minimum_bytes))
        assert torch.allclose(picture_of(built(q), call), own, atol=1e-4)
        assert q.report().peak_bytes <= q.peak_bytes <= q.budget_bytes
        q.restore()


def test_a_restored_pipeline_is_as_before() -> None:
    free, call, own = planned("unet")
    root = free._analyses.root
    before = {name: (id(tensor), tensor.clone()) for name, tensor in named_tensors(root).items()}
    attributes = {path: set(vars(module)) for path, module in root.named_modules()}
    kinds = [type(module) for module in root.modules()]
    p = free.replan(free.minimum_bytes)
    picture_of(built(p), call)
    p.restore()
    after = named_tensors(root)
    assert all(id(after[name]) == number and torch.equal(after[name], value) for name, (number, value) in before.items())
    assert {path: set(vars(module)) for path, module in root.named_modules()} == attributes
    assert [type(module) for module in root.modules()] == kinds
    assert torch.equal(picture_of(free.target, call), own)


def test_an_error_in_its_python_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    free, call, own = planned("unet")
    p = free.replan(free.minimum_bytes)
    pipe = built(p)
    attributes = {path: set(vars(module)) for path, module in free._analyses.root.named_modules()}
    monkeypatch.setattr(Gated, "fails", True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop here"):
            picture_of(pipe, call)
    monkeypatch.setattr(Gated, "fails", False)
    assert torch.equal(picture_of(pipe, call), own)
    assert p.report().peak_bytes == p.peak_bytes
    assert {path: set(vars(module)) for path, module in free._analyses.root.named_modules()} == attributes
    p.restore()
    assert torch.equal(picture_of(free.target, call), own)


def test_another_size_is_explored_anew(replans: list[str]) -> None:
    free, call, _ = planned("unet")
    p = free.replan(2 * free.unplanned_bytes)
    larger = {**call, "height": 48}
    own = picture_of(p.target, larger)
    pipe = built(p)
    for _ in range(2):
        assert torch.equal(picture_of(pipe, larger), own)
        assert p.report().peak_bytes <= p.report().predicted_peak_bytes <= p.budget_bytes
    assert len(replans) == 1
    p.restore()


def test_the_component_by_itself_runs_in_parts() -> None:
    free, _, _ = planned("unet")
    p = free.replan(free.minimum_bytes)
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 12, 16, generator=generator)
    names = ("timestep_cond", "cross_attention_kwargs", "added_cond_kwargs")
    more: dict[str, Any] = {"encoder_hidden_states": text, **dict.fromkeys(names), "return_dict": False}
    own = p.target.unet(sample, torch.tensor(3), **more)[0]
    pipe = built(p)
    for _ in range(2):
        assert torch.equal(pipe.unet(sample, torch.tensor(3), **more)[0], own)
        assert p.report().peak_bytes <= p.budget_bytes
    with pytest.raises(PlannerError, match=r"unet\.forward is called as the pipeline does not call it.*spell the call"):
        pipe.unet(sample[:1], torch.tensor(3), **more)
    p.restore()


def test_what_its_python_keeps_counts_all_the_time() -> None:
    pipe, call, own = made(Keeping)
    del pipe.unet.last
    pipe.unet.last = None
    p = plan(pipe, "1GB", call=call, **WHAT)
    for budget in (p.minimum_bytes, p.unplanned_bytes):
        q = p.replan(budget)
        pipe = built(q)
        for _ in range(2):
            assert torch.equal(picture_of(pipe, call), own)
            assert q.report().peak_bytes <= q.peak_bytes <= q.budget_bytes
        q.restore()


@pytest.mark.parametrize("host", [None, "half"])
def test_what_no_explored_path_calls_is_planned_then(host: str | None, replans: list[str]) -> None:
    pipe, call, own = made(Counting)
    p = plan(pipe, "1GB", call=call, **WHAT)
    nbytes = all_bytes(module_tensors(p._analyses.root, None)) // 2
    p = p.replan({"accounting": p.unplanned_bytes, **({"cpu": nbytes} if host else {})})
    assert p.spills == (host is not None)
    pipe = built(p)
    assert torch.equal(picture_of(pipe, call), own)
    assert p.report().peak_bytes <= p.budget_bytes
    assert [line for line in replans if "no explored path" in line] == [
        "unet.conv_in is called as no explored path has called it; planning it"
    ]
    assert not host or p.report().locked_bytes <= nbytes
    turns = int(pipe.unet.turns)
    p.restore()
    assert turns == pipe.unet.turns == 3
    assert pipe.unet.seen.unique().tolist() == [6.0]  # three calls of two pictures


class Told(nn.Module):
    """Goes on in NumPy: nobody but the user knows how many bytes that takes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.inner(x).numpy() * 2)


def test_bytes_that_depend_on_values_are_told(tmp_path: Path) -> None:
    pipe, call, _ = made()
    pipe.unet.conv_out = Told(pipe.unet.conv_out).eval()
    own = picture_of(pipe, call)
    with pytest.raises(UnknownSize, match=r"opaque_bytes=\{'conv_out'.*leave unet out of the pipeline"):
        plan(pipe, "1GB", call=call, **WHAT)
    p = plan(pipe, "1GB", call=call, opaque_bytes={"unet.conv_out": "40kB"}, **WHAT)
    p = p.replan(p.minimum_bytes)
    assert torch.equal(picture_of(built(p), call), own)
    assert p.report().peak_bytes <= p.peak_bytes <= p.budget_bytes
    p.save(tmp_path / "plan.json")
    p.restore()
    assert PipelinePlan.load(tmp_path / "plan.json", pipe) == p


def test_plans_are_saved_and_loaded(tmp_path: Path) -> None:
    free, call, own = planned("unet")
    p = free.replan(free.unplanned_bytes // 2)
    p.save(tmp_path / "plan.json")
    loaded = PipelinePlan.load(tmp_path / "plan.json", p.target)
    assert loaded == p
    assert str(loaded) == str(p)
    assert torch.equal(picture_of(built(loaded), call), own)
    assert loaded.report().peak_bytes == p.peak_bytes
    loaded.restore()
    other, _ = PIPELINES["StableDiffusion"]()
    with pytest.raises(PlanFileError):
        PipelinePlan.load(tmp_path / "plan.json", other)


def test_ram_budgets_hold() -> None:
    pipe, call, own = made()
    p = plan(pipe, "1GB", call=call, device="cpu", allow=("offload",))
    p = p.replan((p.minimum_bytes + p.unplanned_bytes) // 2)
    assert torch.equal(picture_of(built(p), call), own)
    assert p.report().peak_bytes <= p.peak_bytes <= p.budget_bytes
    p.restore()


@pytest.mark.parametrize("share", ["half", "least"])
def test_weights_come_from_disk_within_the_hosts_budget(share: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those that Python reads itself."""
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(tmp_path))
    free, call, own = planned("unet")
    device = free.minimum_bytes if share == "least" else free.unplanned_bytes
    with pytest.raises(InfeasibleBudget, match="64 B of weights that Python reads") as caught:
        free.replan({"accounting": device, "cpu": 1})
    host = caught.value.minimum_bytes
    if share == "half":
        host = max(host, all_bytes(module_tensors(free._analyses.root, None)) // 2)
    p = free.replan({"accounting": device, "cpu": host})
    assert p.spills
    assert p.held is not None
    assert "unet.scale" in p.held
    count = sum(len(part.program.weights) for part in p.parts.values())
    pipe = built(p)
    for _ in range(2):
        assert torch.equal(picture_of(pipe, call), own)
        report = p.report()
        assert report.peak_bytes == p.peak_bytes <= p.budget_bytes
        assert 0 < report.locked_bytes <= (p.locked_bytes or 0) <= host
        assert p.read_bytes <= report.read_bytes < p.read_bytes + 64 * 3 * count
    if share == "half":
        other, z = {**call, "height": 48}, torch.randn(1, 4, 16, 16)
        pictures, decoded = picture_of(pipe, other), pipe.vae.decode(z, return_dict=False)[0]
        assert p.report().locked_bytes <= host
        p.restore()
        assert torch.equal(picture_of(pipe, other), pictures)
        assert torch.equal(pipe.vae.decode(z, return_dict=False)[0], decoded)


def test_a_file_that_has_on_disk_what_python_reads(tmp_path: Path) -> None:
    free, _, _ = planned("unet")
    nbytes = all_bytes(module_tensors(free._analyses.root, None))
    p = free.replan({"accounting": max(free.minimum_bytes, free.unplanned_bytes // 2), "cpu": nbytes // 2})
    p.save(tmp_path / "plan.json")
    assert PipelinePlan.load(tmp_path / "plan.json", p.target) == p
    data = json.loads((tmp_path / "plan.json").read_text())
    del data["held"]["unet.scale"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match=r"I3: the Python of a component reads unet\.scale, which is on disk"):
        PipelinePlan.load(tmp_path / "plan.json", p.target)


def test_host_budgets_hold_all_weights() -> None:
    free, call, own = planned("unet")
    nbytes = all_bytes(module_tensors(free._analyses.root, None))
    p = free.replan({"accounting": free.minimum_bytes, "cpu": nbytes})
    assert torch.equal(picture_of(built(p), call), own)
    p.restore()


def test_it_says_what_it_does() -> None:
    free, _, _ = planned("unet")
    text = str(free.replan(free.minimum_bytes))
    assert "in parts  unet.forward, whose own Python runs: " in text
    assert "sample.abs().mean() > 0.5" in " ".join(text.split())
    assert "\n    + unet.up_blocks.1.forward " in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_changed_component_is_planned_again() -> None:
    pipe, call, _ = made()
    p = plan(pipe, "1GB", call=call, **WHAT)
    pipe = built(p)
    before = picture_of(pipe, call)
    pipe.unet.conv_out = nn.Sequential(pipe.unet.conv_out, nn.Tanh()).eval()
    changed = picture_of(pipe, call)
    assert not torch.equal(changed, before)
    p.restore()
    assert torch.equal(picture_of(pipe, call), changed)


def test_values_of_weights_that_python_reads_are_followed() -> None:
    pipe, call, _ = made()
    other = copy.deepcopy(pipe.unet)
    p = plan(pipe, "1GB", call=call, **WHAT)
    p = p.replan(p.minimum_bytes)
    pipe = built(p)
    picture_of(pipe, call)
    with torch.no_grad():
        pipe.unet.scale.mul_(2.0)
        other.scale.mul_(2.0)
    changed = picture_of(pipe, call)
    p.restore()
    pipe.unet = other
    assert torch.equal(picture_of(pipe, call), changed)
