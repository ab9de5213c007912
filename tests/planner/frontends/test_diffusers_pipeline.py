"""Dry runs of tiny pipelines beside real runs: the same calls in the same order, the same bytes, and nothing left changed."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import CLIPConfig, CLIPImageProcessorPil, LlamaConfig, LlamaForCausalLM

from planner.dry_run import record as record_any
from planner.dry_run_calls import DryRun, Phase
from planner.frontends.caches import register_containers
from planner.frontends.diffusers_pipeline import components_of, generated, record
from planner.outermost import Outermost, outermost_calls
from planner.pretend_device import PretendDevice
from runtime.errors import PlannerError
from tests.pipelines import PIPELINES
from tests.pipelines.full_size import flux_dev
from tests.pipelines.parts import PROMPT, SIDE

EVERY = pytest.mark.parametrize("name", PIPELINES)
_METHODS = ("encode", "decode", "post_process_latents", "get_text_features", "generate")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Real runs without progress bars, in the tests' own gradient mode."""
    before = DiffusionPipeline.progress_bar

    def silent(self: Any, iterable: Any = None, total: Any = None) -> Any:
        return before(_Silent(), iterable, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionPipeline, "progress_bar", silent)
        yield


class _Silent:
    _progress_bar_config = {"disable": True}


def _shape(tree: Any) -> list[Any]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [(tuple(leaf.shape), leaf.stride(), leaf.dtype) for leaf in leaves]


def _spied(pipe: Any, call: dict[str, Any]) -> tuple[list[Any], Any]:
    """A real run's calls of components, seen by other means than the dry run's (name, shapes in and out), and its output."""
    register_containers()
    names = {id(component): name for name, component in components_of(pipe).items()}
    seen: list[Any] = []
    depth = [0]

    def spy(original: Callable[..., Any], method: str) -> Callable[..., Any]:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in names or depth[0]:
                return original(self, *args, **kwargs)
            depth[0] += 1
            try:
                taken = _shape((args, kwargs))
                result = original(self, *args, **kwargs)
            finally:
                depth[0] -= 1
            seen.append((f"{names[id(self)]}.{method}", taken, _shape(result)))
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", spy(nn.Module.__call__, "forward"))
        for kind in {type(component) for component in components_of(pipe).values()}:
            for method in _METHODS:
                if hasattr(kind, method):
                    patch.setattr(kind, method, spy(getattr(kind, method), method))
        output = pipe(**call)
    return seen, output


def _recorded(run: DryRun) -> list[Any]:
    """The same of a dry run."""

    def shapes(leaves: Any) -> list[Any]:
        return _shape([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])

    calls = []
    for call in run.calls:
        outputs = [(leaf.shape, leaf.stride, leaf.dtype) for leaf in call.result_leaves if hasattr(leaf, "stride")]
        calls.append((call.name, shapes(tree_leaves(call.inputs())), outputs))
    return [calls[index] for index in run.sequence]


@dataclass(frozen=True)
class Dried:
    """A pipeline after a dry run and then a real one; states are those before and after the dry run."""

    pipe: Any
    call: dict[str, Any]
    run: DryRun
    states: tuple[Any, Any]
    real: list[Any]
    output: Any


@functools.cache
def dried(name: str) -> Dried:
    pipe, call = PIPELINES[name]()
    generator = torch.Generator().manual_seed(3)
    call = {**call, "generator": generator}

    def state() -> Any:
        generators = [g.tolist() for g in (torch.get_rng_state(), generator.get_state())]
        return random.getstate(), str(np.random.get_state()), generators, _state_of(pipe)

    before = state()
    run = record(pipe, call)
    states = before, state()
    real, output = _spied(pipe, call)
    return Dried(pipe, call, run, states, real, output)


@EVERY
def test_calls_are_those_of_a_real_run(name: str) -> None:
    run = dried(name).run
    assert _recorded(run) == dried(name).real
    assert run.is_certain
    assert [index for phase in run.phases for _ in range(phase.times) for index in phase.cycle] == list(run.sequence)


@EVERY
def test_nothing_is_left_changed(name: str) -> None:
    before, after = dried(name).states
    assert after == before
    untouched, call = PIPELINES[name]()
    output = untouched(**call, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(output.to_tuple(), dried(name).output.to_tuple(), strict=True))


@EVERY
def test_bytes_are_those_of_a_real_run(name: str) -> None:
    pipe, call, dry = dried(name).pipe, dried(name).call, dried(name).run
    device, seen = PretendDevice(), []

    def run_for_real(call: Outermost) -> Any:
        given = (call.args, call.kwargs)
        if call.method != "forward" and not _shape(given):
            return call.function(*call.args, **call.kwargs)
        between, held, arguments = device.take_peak(), device.held, device.bytes_of(given)
        with device.pause(), torch.no_grad():
            result = call.function(*call.args, **call.kwargs)
        device.answer(result)
        seen.append((held - arguments, arguments, between))
        device.take_peak()
        return result

    components = components_of(pipe)
    weights = [tensor for component in components.values() for tensor in (*component.parameters(), *component.buffers())]
    with outermost_calls(components, run_for_real), device:
        device.own(weights)
        pipe(**call)
        last = device.take_peak()
    assert [(step.held, step.arguments, step.between) for step in dry.steps] == seen
    assert dry.last == last


def _state_of(pipe: Any) -> Any:
    """Attributes of a pipeline, of its schedulers and of all its modules."""
    modules = {path: _plain(vars(m)) for c in components_of(pipe).values() for path, m in c.named_modules(prefix=str(id(c)))}
    return _plain(vars(pipe)), modules


def _plain(value: Any) -> Any:
    """Something that is equal as long as nothing in a value has changed, identities of modules and tensors included."""
    if isinstance(value, torch.Tensor):
        return id(value), value._version
    if isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if type(value).__module__.startswith("diffusers") and hasattr(value, "__dict__"):
        return type(value), _plain(vars(value))
    return repr(value)


@pytest.mark.parametrize("name", ["FluxImg2Img", "LTX", "QwenImage"])
def test_components_on_meta_give_the_same(name: str) -> None:
    real = dried(name).run
    pipe, call = PIPELINES[name]()
    for component in components_of(pipe).values():
        component.to("meta")
    meta = record(pipe, call)
    assert _recorded(meta) == _recorded(real)
    assert meta.steps == real.steps
    assert all(p.is_meta for component in components_of(pipe).values() for p in component.parameters())


def test_two_transformers_are_two_phases() -> None:
    run = dried("Wan2.2").run
    names = [tuple(run.calls[index].name for index in phase.cycle) for phase in run.phases]
    assert names == [("text_encoder.forward",), ("transformer.forward",), ("transformer_2.forward",), ("vae.decode",)]
    assert [phase.times for phase in run.phases] == [2, 4, 4, 1]


def test_a_controlnet_and_its_denoiser_take_turns() -> None:
    run = dried("StableDiffusionControlNet").run
    assert [run.calls[index].name for index in run.phases[1].cycle] == ["controlnet.forward", "unet.forward"]
    assert run.phases[1].times == 3
    assert run.varying_floats(run.phases[1].cycle[0]) == ("conditioning_scale",)
    assert [step.floats for step in run.steps_of(run.phases[1].cycle[0])] == [(1.0,), (0.0,), (0.0,)]


def test_prompts_of_two_lengths_are_one_cycle() -> None:
    run = dried("QwenImage").run
    assert Phase((2, 3), 3) in run.phases
    assert run.calls[2].component == run.calls[3].component == "transformer"


@pytest.mark.slow  # some five seconds
def test_flux_as_large_as_it_is_published() -> None:
    pipe, call = flux_dev()
    run = record(pipe, call)
    assert [(run.calls[phase.cycle[0]].name, phase.times) for phase in run.phases] == [
        ("text_encoder.forward", 1),
        ("text_encoder_2.forward", 1),
        ("transformer.forward", 28),
        ("vae.decode", 1),
    ]
    assert run.calls[-1].result_leaves[0].shape == (1, 3, 1024, 1024)
    assert run.held_beside(2).device_bytes < 10**6
    decoded = 3 * 1024 * 1024 * 2
    assert 3 * decoded < run.last.device_bytes < 5 * decoded


def test_a_cast_of_the_pipeline_shows() -> None:
    pipe, call = PIPELINES["StableDiffusionXL"]()
    pipe = StableDiffusionXLPipeline(**pipe.components, add_watermarker=False)
    for component in components_of(pipe).values():
        component.to(torch.float16)
    decode = record(pipe, {**call, "output_type": "np"}).calls[-1]
    assert (decode.name, decode.dtypes) == ("vae.decode", (torch.float32,))
    assert pipe.vae.dtype == torch.float16


def test_postprocessing_counts_on_the_device_until_it_leaves_it() -> None:
    pipe, call = PIPELINES["Flux"]()
    pictures, arrays = (record(pipe, {**call, "output_type": kind}) for kind in ("pt", "np"))
    decoded = 3 * SIDE * SIDE * 4
    others = pictures.steps[-1].held.device_bytes
    assert others + 2 * decoded <= pictures.last.device_bytes <= others + 4 * decoded
    assert arrays.last.device_bytes == pictures.last.device_bytes
    assert pictures.last.host_bytes < decoded <= arrays.last.host_bytes


@pytest.mark.parametrize(
    ("more", "shape"),
    [
        ({"num_images_per_prompt": 2}, (4, 4, 16, 16)),
        ({"guidance_scale": 1.0}, (1, 4, 16, 16)),
        ({"prompt": [PROMPT, "a dog"]}, (4, 4, 16, 16)),
        ({"output_type": "latent"}, (2, 4, 16, 16)),
        ({"height": 48}, (2, 4, 24, 16)),
    ],
    ids=str,
)
def test_other_calls(more: dict[str, Any], shape: tuple[int, ...]) -> None:
    pipe, call = PIPELINES["StableDiffusion"]()
    run = record(pipe, {**call, **more})
    unet = next(c for c in run.calls if c.component == "unet")
    assert unet.args[0].shape == shape
    assert ("vae" in run.components) == ("output_type" not in more)
    assert _recorded(run) == _spied(pipe, {**call, **more})[0]


def test_embeddings_in_place_of_a_prompt() -> None:
    pipe, call = PIPELINES["StableDiffusion"]()
    given = {"prompt": None, "prompt_embeds": torch.randn(1, 12, 16), "negative_prompt_embeds": torch.randn(1, 12, 16)}
    run = record(pipe, {**call, **given})
    assert run.components == ("unet", "vae")
    on_meta = {key: value if value is None else value.to("meta") for key, value in given.items()}
    assert _recorded(record(pipe, {**call, **on_meta})) == _recorded(run)
    # On the host until the pipeline moves them; those on another device are held there all the time.
    both = record(pipe, {**call, **on_meta}).steps[0].held.device_bytes - run.steps[0].held.device_bytes
    assert both == 2 * 12 * 16 * 4


def test_user_callbacks_are_not_called() -> None:
    pipe, call = PIPELINES["StableDiffusion"]()
    called: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        called.append(step)
        return kwargs

    run = record(pipe, {**call, "callback_on_step_end": callback})
    assert not called
    assert len(run.steps) == 6


def test_a_checker_that_goes_on_in_numpy_runs_for_real_on_made_up_values() -> None:
    pipe, call = PIPELINES["StableDiffusion"]()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=sizes, projection_dim=16)).eval()
    parts = {**pipe.components, "safety_checker": checker, "feature_extractor": CLIPImageProcessorPil(size=16, crop_size=16)}
    pipe = StableDiffusionPipeline(**parts)
    run = record(pipe, {**call, "output_type": "np"})
    assert run.calls[-1].name == "safety_checker.forward"
    assert run.calls[-1].by_values
    assert "on zeros" in str(run)


def test_the_table() -> None:
    text = str(dried("Wan2.2").run)
    assert max(map(len, text.splitlines())) <= 100
    assert "WanPipeline: 11 calls of text_encoder, transformer, transformer_2, vae" in text
    assert "    4 x  transformer_2.forward " in text


@pytest.mark.parametrize(
    ("kwargs", "shape", "steps"),
    [
        ({"max_new_tokens": 7}, (2, 12), 7),
        ({"max_length": 9}, (2, 9), 4),
        ({"max_new_tokens": 2, "num_return_sequences": 3, "do_sample": True}, (6, 7), 2),
    ],
    ids=str,
)
def test_generate_is_answered_with_all_that_it_may_give(kwargs: Any, shape: Any, steps: int) -> None:
    llama, ids = _llama(), torch.ones(2, 5, dtype=torch.int64)

    def run() -> None:
        assert llama.generate(input_ids=ids, **kwargs).shape == shape
        llama(input_ids=ids)

    dry = record_any("toy", {"llama": llama}, run, {}, open_ended=generated)
    assert [call.name for call in dry.calls] == ["llama.generate", "llama.forward"]
    assert dry.calls[0].most_steps == steps
    assert not dry.is_certain
    assert f"unknown, {steps} at most" in str(dry)
    assert llama.generate(input_ids=ids, **kwargs).shape == shape


def test_generate_without_ids_says_what_to_pass() -> None:
    llama = _llama()
    with pytest.raises(PlannerError, match="Pass what the pipeline makes of it"):
        record_any(
            "toy", {"llama": llama}, lambda: llama.generate(inputs_embeds=torch.ones(1, 3, 16)), {}, open_ended=generated
        )


def _llama() -> Any:
    """It has no token that ends a text."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_structured_results_keep_their_class() -> None:
    pipe, call = PIPELINES["FluxImg2Img"]()
    kinds: list[type] = []
    encode = type(pipe).__dict__.get("_encode_vae_image")
    assert encode is not None

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        kinds.append(type(self.vae.encode(kwargs["image"] if "image" in kwargs else args[0])))
        return encode(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe), "_encode_vae_image", spy)
        record(pipe, call)
    assert kinds == [AutoencoderKLOutput]


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(PlannerError, match="a pipeline of diffusers is wanted, got Linear"):
        record(nn.Linear(2, 2), {})


def test_an_error_of_the_pipeline_leaves_nothing() -> None:
    pipe, call = PIPELINES["StableDiffusion"]()
    before = _state_of(pipe)
    with pytest.raises(PlannerError, match="its own Python, ValueError: `height` and `width`"):
        record(pipe, {**call, "height": 33})
    assert _state_of(pipe) == before


def test_offloaded_components_are_refused() -> None:
    pipe, call = PIPELINES["StableDiffusion"]()
    pipe.unet._hf_hook = copy.copy(object)
    with pytest.raises(PlannerError, match="accelerate hook"):
        record(pipe, call)
    assert "_compiled_call_impl" not in vars(pipe.unet)
