"""Tiny pipelines run planned: the same pictures, within the budget, in the predicted bytes; afterwards they are as before."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from torch import nn

from planner import InfeasibleBudget, PlannerError, plan
from planner.frontends.diffusers_pipeline import components_of
from planner.pipeline_plan import PipelinePlan
from runtime.errors import InputError, ModuleUnusable, PlanFileError
from tests.pipelines import PIPELINES
from tests.pipelines.parts import PROMPT

# Floats that vary and programs that alternate; an encoder and a decoder of one component; methods beside forward.
QUICK = ("StableDiffusionControlNet", "FluxImg2Img", "KandinskyPrior")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PIPELINES]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionPipeline, "progress_bar", _no_bar)
        yield


class _NoBar:
    """In place of a progress bar, as an iterable and as a context."""

    def __init__(self, iterable: Any) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, n: int = 1) -> None:
        return None


def _no_bar(self: Any, iterable: Any = None, total: Any = None) -> Any:
    return _NoBar(iterable)


def _run(pipe: Any, call: dict[str, Any]) -> tuple[Any, ...]:
    output: tuple[Any, ...] = pipe(**call, generator=torch.Generator().manual_seed(3)).to_tuple()
    return output


def _equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


@dataclasses.dataclass(frozen=True)
class Planned:
    """A pipeline with its call, what it gives unplanned, and a plan of pure streaming for a large budget."""

    pipe: Any
    call: dict[str, Any]
    own: tuple[Any, ...]
    plan: PipelinePlan


def _planned(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Planned:
    pipe, call = PIPELINES[name]()
    for component in components_of(pipe).values():
        component.to(dtype)
    call = {**call, **more}
    own = _run(pipe, call)
    return Planned(pipe, call, own, plan(pipe, "1GB", call=call, device="accounting", machine="rtx-4090", allow=("offload",)))


planned = functools.cache(_planned)


def _measured(p: PipelinePlan, call: dict[str, Any]) -> tuple[tuple[Any, ...], int]:
    """What the built pipeline gives, and the bytes that were measured; it is restored afterwards."""
    pipe = p.build()
    try:
        return _run(pipe, call), p.report().peak_bytes
    finally:
        p.restore()


@pytest.mark.parametrize("share", ["half", "minimum", "everything"])
@pytest.mark.parametrize("name", EVERY)
def test_streaming_gives_the_same_bits_within_the_budget(name: str, share: str) -> None:
    case = planned(name)
    least, most = case.plan.minimum_bytes, case.plan.unplanned_bytes
    p = case.plan.replan({"half": max(least, most // 2), "minimum": least, "everything": most}[share])
    got, peak = _measured(p, case.call)
    assert _equal(got, case.own)
    assert peak == p.peak_bytes <= p.budget_bytes
    assert p.step_seconds >= p.bound_seconds * (1 - 1e-12) > 0


@pytest.mark.slow
@pytest.mark.parametrize("share", ["half", "minimum"])
@pytest.mark.parametrize("name", PIPELINES)
def test_all_rewrites_give_the_same_pictures(name: str, share: str) -> None:
    """Kandinsky in double precision: its decoder makes 4e-5 of what single precision rounds otherwise (8e-14 of double)."""
    double = name == "Kandinsky"
    case = _planned(name, dtype=torch.float64) if double else planned(name)
    p = plan(case.pipe, "1GB", call=case.call, device="accounting", machine="rtx-4090")
    p = p.replan(p.minimum_bytes if share == "minimum" else max(p.minimum_bytes, p.unplanned_bytes // 2))
    got, peak = _measured(p, case.call)
    for a, b in zip(got, case.own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12 if double else 1e-5, atol=1e-12 if double else 1e-5)
    assert peak <= p.peak_bytes <= p.budget_bytes


@pytest.mark.parametrize("name", QUICK)
def test_a_restored_pipeline_is_as_before(name: str) -> None:
    case = planned(name)
    before = _seen(case.pipe)
    p = case.plan.replan(case.plan.unplanned_bytes)
    assert p.build() is case.pipe
    p.restore()
    assert _seen(case.pipe) == before
    assert _equal(_run(case.pipe, case.call), case.own)


def _seen(pipe: Any) -> Any:
    """Classes, objects and where weights are."""
    modules = [(type(m), id(m), set(vars(m))) for c in components_of(pipe).values() for m in c.modules()]
    tensors = [(id(p), p.device) for c in components_of(pipe).values() for p in (*c.parameters(), *c.buffers())]
    return type(pipe), id(pipe), modules, tensors


@pytest.fixture
def built() -> Iterator[Planned]:
    """A planned Stable Diffusion at half of what it takes."""
    case = planned("StableDiffusion")
    p = case.plan.replan(case.plan.unplanned_bytes // 2)
    p.build()
    yield dataclasses.replace(case, plan=p)
    p.restore()


def test_components_are_what_they_were(built: Planned) -> None:
    pipe = built.pipe
    assert isinstance(pipe, StableDiffusionPipeline)
    assert isinstance(pipe.vae, AutoencoderKL)
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    assert pipe.unet.dtype == torch.float32
    assert pipe.device == pipe._execution_device == pipe.unet.device == torch.device("cpu")
    assert pipe.unet.config.cross_attention_dim == 16
    assert pipe.unet.to(torch.float32) is pipe.unet
    assert pipe.to("cpu") is pipe
    with pytest.raises(ModuleUnusable, match="restore"):
        pipe.unet.to(torch.float16)
    with pytest.raises(ModuleUnusable, match="restore"):
        pipe.unet.train()


def test_hooks_of_components_run(built: Planned) -> None:
    seen: list[Any] = []
    handle = built.pipe.unet.register_forward_hook(lambda module, args, output: seen.append(type(output[0])))
    got = _run(built.pipe, built.call)
    handle.remove()
    assert seen == [torch.Tensor] * 3
    assert _equal(got, built.own)


def test_it_saves_and_loads_like_any_pipeline(built: Planned, tmp_path: Path) -> None:
    built.pipe.unet.save_pretrained(tmp_path)
    again = type(built.pipe.unet).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), built.pipe.unet.parameters(), strict=True))


@pytest.mark.parametrize(
    "more",
    [
        {"output_type": "latent"},
        {"num_images_per_prompt": 2},
        {"guidance_scale": 1.0},
        pytest.param({"height": 48}, marks=pytest.mark.slow),
        pytest.param({"prompt": [PROMPT, "a dog"]}, marks=pytest.mark.slow),
        {"prompt": None, "prompt_embeds": torch.ones(1, 12, 16), "negative_prompt_embeds": torch.zeros(1, 12, 16)},
        {"num_inference_steps": 5},
    ],
    ids=str,
)
def test_other_calls_are_planned_when_they_come(more: dict[str, Any]) -> None:
    case = planned("StableDiffusion")
    call = {**case.call, **more}
    own = _run(case.pipe, call)
    p = case.plan.replan(case.plan.unplanned_bytes)
    got, peak = _measured(p, call)
    assert _equal(got, own)
    assert peak <= p.budget_bytes


def test_another_size_is_planned_once(built: Planned) -> None:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("vramplan"), "info", lambda text, *args: said.append(text % args))
        for words in (PROMPT, "a dog"):
            built.pipe(**{**built.call, "height": 24, "prompt": words})
        built.pipe(**built.call)
    assert said == ["StableDiffusionPipeline: a call that was not planned, planning again"]


def test_callbacks_see_and_change_latents(built: Planned) -> None:
    steps: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {"latents": given["latents"] * 0.5}

    call = {**built.call, "callback_on_step_end": callback}
    got = _run(built.pipe, call)
    built.plan.restore()
    assert steps == [0, 1, 2]
    assert _equal(got, _run(built.pipe, call))


def test_a_component_by_itself_runs_planned(built: Planned) -> None:
    picture = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    got = built.pipe.vae.encode(picture).latent_dist.mean
    report = built.plan.report()
    assert [phase.name for phase in report.phases] == ["vae.encode"]
    assert report.peak_bytes <= built.plan.budget_bytes
    built.plan.restore()
    assert torch.equal(got, built.pipe.vae.encode(picture).latent_dist.mean)


class _Adapter(nn.Module):
    """A linear layer with an adapter, as libraries for them put one in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x) + self.up(self.down(x))
        return result


def _with_adapter(unet: Any) -> Any:
    """Puts one in; gives what takes it out again."""
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    base = attention.to_q
    torch.manual_seed(0)
    attention.to_q = _Adapter(base).eval()
    return lambda: setattr(attention, "to_q", base)


def test_an_adapter_that_is_there_is_planned() -> None:
    case = planned("StableDiffusion")
    undo = _with_adapter(case.pipe.unet)
    try:
        own = _run(case.pipe, case.call)
        p = plan(case.pipe, case.plan.unplanned_bytes // 2, call=case.call, device="accounting", allow=("offload",))
        assert not _equal(own, case.own)
        assert _equal(_measured(p, case.call)[0], own)
    finally:
        undo()


def test_an_adapter_that_comes_later_is_never_left_out(built: Planned) -> None:
    undo = _with_adapter(built.pipe.unet)
    got = _run(built.pipe, built.call)
    assert built.plan.report().peak_bytes == built.plan.peak_bytes <= built.plan.budget_bytes
    assert any("to_q.up" in weight.name for weight in built.plan.parts["unet.forward"].program.weights.values())
    assert built.plan.restore() is built.pipe
    assert _equal(got, _run(built.pipe, built.call))
    undo()
    assert _equal(_run(built.pipe, built.call), built.own)


def test_an_adapter_that_does_not_fit_is_an_error() -> None:
    case = planned("StableDiffusion")
    p = case.plan.replan(case.plan.minimum_bytes)
    p.build()
    attention = case.pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    base = attention.to_q
    attention.to_q = nn.Sequential(base, nn.Linear(8, 40_000), nn.Linear(40_000, 8)).eval()
    try:
        with pytest.raises(PlannerError, match=r"children of unet.*changed(.|\n)*p = plan\(pipe, budget="):
            _run(case.pipe, case.call)
    finally:
        attention.to_q = base
        p.restore()
    assert _equal(_run(case.pipe, case.call), case.own)


def test_settings_of_components_are_followed() -> None:
    case = planned("StableDiffusion")
    p, more = case.plan.replan("2MB"), {**case.call, "num_images_per_prompt": 2}
    case.pipe.vae.disable_slicing()
    pipe = p.build()
    pipe.vae.enable_slicing()
    try:
        got = _run(pipe, more)
        assert p.restore() is pipe
        assert _equal(got, _run(pipe, more))
    finally:
        pipe.vae.disable_slicing()


def test_a_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    case = _planned("KandinskyPrior", latents=torch.zeros(1, 16))
    p = case.plan.replan(case.plan.minimum_bytes)
    p.save(tmp_path / "plan.json")
    again = PipelinePlan.load(tmp_path / "plan.json", case.pipe, call=case.call)
    assert again == p
    assert (again.peak_bytes, again.step_seconds) == (p.peak_bytes, p.step_seconds)
    assert str(again) == str(p)
    with pytest.raises(PlanFileError, match="call=dict"):  # the latents are in no file
        PipelinePlan.load(tmp_path / "plan.json", case.pipe)
    other = planned("StableDiffusion")
    with pytest.raises(PlanFileError, match="another model"):
        PipelinePlan.load(tmp_path / "plan.json", other.pipe, call=other.call)
    (tmp_path / "plan.json").write_text((tmp_path / "plan.json").read_text()[:-9])
    with pytest.raises(PlanFileError, match="damaged"):
        PipelinePlan.load(tmp_path / "plan.json", case.pipe, call=case.call)


def test_a_plain_call_is_in_the_file(tmp_path: Path) -> None:
    case = planned("KandinskyPrior")
    case.plan.save(tmp_path / "plan.json")
    assert PipelinePlan.load(tmp_path / "plan.json", case.pipe) == case.plan


def test_too_small_a_budget_says_what_is_possible() -> None:
    case = planned("StableDiffusion")
    least = case.plan.minimum_bytes
    with pytest.raises(InfeasibleBudget, match=rf"the least possible is .* \({least} B\), at (unet|vae)") as found:
        case.plan.replan(least - 1)
    assert found.value.minimum_bytes == least
    assert case.plan.replan(least).peak_bytes <= least


def test_calls_that_are_no_calls() -> None:
    case = planned("StableDiffusion")
    with pytest.raises(PlannerError, match="call=dict"):
        plan(case.pipe, "1GB")  # type: ignore[call-overload]
    with pytest.raises(PlannerError, match="call=dict"):
        plan(case.pipe, "1GB", call={"prompt": ""}, inputs=(1,))  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"call=.*KandinskyV22PriorPipeline.*(prompt|colour)"):
        plan(planned("KandinskyPrior").pipe, "1GB", call={"colour": 1})
    with pytest.raises(PlannerError, match="fails without a plan too"):
        plan(case.pipe, "1GB", call={})
    with pytest.raises(PlannerError, match="inputs="):
        plan(case.pipe.unet, "1GB", call={"prompt": ""})  # type: ignore[call-overload]


def test_a_cast_while_it_runs_is_refused() -> None:
    pipe, call = PIPELINES["StableDiffusionXL"]()
    pipe.to(torch.float16)
    with pytest.raises(PlannerError, match=r"pipe\.vae\.to\(torch\.float32\)"):
        plan(pipe, "1GB", call=call, device="accounting")


def test_meta_components_take_their_weights_at_the_build() -> None:
    case = planned("KandinskyPrior")
    pipe, call = PIPELINES["KandinskyPrior"]()
    for component in components_of(pipe).values():
        component.to("meta")
    p = plan(pipe, case.plan.unplanned_bytes, call=call, device="accounting", machine="rtx-4090", allow=("offload",))
    with pytest.raises(PlannerError, match="meta"):
        p.build()
    p.build(weights=case.pipe)
    try:
        got = _run(pipe, call)
    finally:
        p.restore()
    assert _equal(got, case.own)
    assert all(parameter.is_meta for component in components_of(pipe).values() for parameter in component.parameters())


def test_building_twice_is_an_error(built: Planned) -> None:
    with pytest.raises(PlannerError, match="built already"):
        built.plan.build()


def test_the_printed_plan(golden: Callable[[str, str], None]) -> None:
    case = planned("StableDiffusionControlNet")
    golden("plan_pipeline", str(case.plan.replan("450KB")))
