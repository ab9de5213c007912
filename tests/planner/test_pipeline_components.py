"""Helper methods of a planned pipeline's components work as before, or say what to run; nothing asked for is left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import CacheMixin, DiffusionPipeline, FirstBlockCacheConfig, FluxTransformer2DModel, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from planner import PipelinePlan, PlannerError, plan
from tests.pipelines import PIPELINES

Case = tuple[Any, dict[str, Any], torch.Tensor, PipelinePlan]


@pytest.fixture(scope="module")
def flux() -> Case:
    """A pipeline that calls its transformer within `cache_context`, its call, what it gives, and its plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)
        pipe, call = PIPELINES["Flux"]()
        own = picture_of(pipe, call)
        return pipe, call, own, plan(pipe, "1GB", call=call, device="accounting", machine="rtx-4090", allow=("offload",))


def picture_of(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    images: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    return images


@pytest.fixture
def built(flux: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)
    pipe, call, own, p = flux
    p = p.replan(p.unplanned_bytes // 2)
    p.build()
    yield pipe, call, own, p
    p.restore()
    assert torch.equal(picture_of(pipe, call), own)


@pytest.fixture
def replans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log says of planning again."""
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("vramplan"), "info", lambda text, *args: said.append(text % args))
    return said


def test_they_answer_as_on_the_device(built: Case, replans: list[str]) -> None:
    pipe, call, own, _ = built
    transformer = pipe.transformer
    for kind in (FluxTransformer2DModel, CacheMixin, PeftAdapterMixin, ModelMixin, nn.Module):
        assert isinstance(transformer, kind)
    assert transformer.config.num_layers == 1
    assert transformer.config["num_layers"] == 1
    assert (transformer.dtype, transformer.device) == (torch.float32, torch.device("cpu"))
    assert pipe.text_encoder.config.hidden_size == pipe.text_encoder.get_input_embeddings().weight.shape[1]
    assert pipe.text_encoder.dtype == pipe.vae.dtype == pipe.dtype == torch.float32
    assert pipe.vae.config.scaling_factor == pipe.vae.config["scaling_factor"]
    assert transformer.num_parameters() == sum(p.numel() for p in transformer.parameters())
    assert set(transformer.state_dict()) == {name for name, _ in transformer.named_parameters()}
    assert pipe.components["transformer"] is transformer
    assert torch.equal(picture_of(pipe, call), own)
    assert replans == []


def test_cache_contexts(built: Case, replans: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline enters one around every call of its transformer; a caller may, around one of the component alone."""
    pipe, call, own, p = built
    entered: list[str] = []
    context: Callable[..., Any] = CacheMixin.cache_context

    def noting(self: Any, name: str) -> Any:
        entered.append(name)
        return context(self, name)

    monkeypatch.setattr(CacheMixin, "cache_context", noting)
    p.restore()
    p.build()
    assert torch.equal(picture_of(pipe, call), own)
    assert entered == ["cond"] * p.calls_of("transformer.forward")
    with pipe.transformer.cache_context("mine"):
        assert entered[-1] == "mine"
        assert not pipe.transformer.is_cache_enabled
    assert torch.equal(picture_of(pipe, call), own)
    assert replans == []


def test_a_cache_that_is_enabled_later_is_no_silent_difference(flux: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)
    pipe, call, own, p = flux
    p = p.replan(p.unplanned_bytes // 2)
    p.build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    try:
        with pytest.raises(PlannerError, match=r"(?s)transformer_blocks\.0 .*disable_cache\(\).*p = plan\(pipe, budget="):
            picture_of(pipe, call)
        with pytest.raises(PlannerError, match=r"disable_cache\(\)"):
            plan(pipe, "1GB", call=call, device="accounting")
    finally:
        pipe.transformer.disable_cache()
        p.restore()
    assert torch.equal(picture_of(pipe, call), own)


def test_processors_that_are_exchanged_are_followed(built: Case, replans: list[str]) -> None:
    """`set_attn_processor` changes how the component computes: it is planned anew, not run as it was."""
    pipe, call, own, p = built
    before = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor({name: _Half() for name in before})
    try:
        got = picture_of(pipe, call)
        p.restore()
        assert torch.equal(got, picture_of(pipe, call))
        assert not torch.equal(got, own)
        assert any("planning and building again" in said for said in replans)
    finally:
        pipe.transformer.set_attn_processor(before)


class _Half:
    """Attention that adds nothing but half of what comes in."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, *_: Any, **__: Any) -> Any:
        if encoder_hidden_states is None:
            return hidden_states / 2
        return hidden_states / 2, encoder_hidden_states / 2
