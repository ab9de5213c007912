"""Presets: the published models, their calls, and errors for sizes that they cannot take."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from passes.spec import TensorSpec
from planner import Machine, PlannerError, plan
from planner.presets import Preset, frontend, model_dtype
from planner.recipes import Recipe, RecipeError, random_tensor

# Millions of parameters, as the publishers state them.
PUBLISHED = {
    "sd15-unet": 859.5, "sdxl-unet": 2567, "flux1-dev": 11_900, "t5-xxl-encoder": 4762, "clip-l-text": 123.06,
    "llama-3.1-8b": 8030, "wan2.1-14b": 14_288, "cogvideox-5b": 5570, "sd-vae-decoder": 83.65, "sdxl-vae-decoder": 83.65,
    "flux-vae-decoder": 83.82, "wan-vae-decoder": 126.9,
}  # fmt: skip
# A budget for an RTX 4090 that every preset's default call fits.
FEASIBLE = {"wan-vae-decoder": "12GB"}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_names() -> None:
    assert set(Preset.names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_is_the_published_model(name: str) -> None:
    preset = Preset.load(name)
    module, args, kwargs = preset.build()
    assert parameters(module) == preset.parameters
    assert preset.parameters / 1e6 == pytest.approx(PUBLISHED[name], rel=1e-3)
    assert not any(child.training for child in module.modules())
    assert all(p.is_meta for p in module.parameters())
    assert not any(b.is_meta for b in module.buffers())
    assert {p.dtype for p in module.parameters()} <= {model_dtype(preset.dtype), torch.float32}
    inspect.signature(getattr(module, preset.method)).bind(*args, **kwargs)
    leaves = [leaf for _, leaf in tree_flatten_with_path(kwargs)[0] if isinstance(leaf, torch.Tensor)]
    assert leaves
    assert all(leaf.is_meta for leaf in leaves)


@pytest.mark.parametrize(
    ("name", "millions"), [("sd-vae-decoder", 49.49), ("sdxl-vae-decoder", 49.49), ("flux-vae-decoder", 49.55)]
)
def test_decoders_alone(name: str, millions: float) -> None:
    module: Any = Preset.load(name).module()
    assert parameters(module.decoder) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_config_has_no_unknown_keys(name: str) -> None:
    """Libraries ignore a key that is misspelt."""
    preset = Preset.load(name)
    module = preset.module()
    known = set(frontend(preset.library).config_of(module)) | {"rope_theta", "rope_scaling"}  # transformers renames those
    assert set(preset.config) <= known
    if preset.library == "diffusers":
        assert set(preset.config) <= set(inspect.signature(type(module).__init__).parameters)


def test_inputs(golden: Callable[[str, str], None]) -> None:
    lines = []
    for name in Preset.names():
        preset = Preset.load(name)
        module, _, kwargs = preset.build()
        sizes = ", ".join(f"{size} {value}" for size, value in preset.sizes(module).items())
        lines.append(f"{name}: {type(module).__name__}.{preset.method}, {sizes}")
        for path, leaf in tree_flatten_with_path(kwargs)[0]:
            lines.append(f"  kwargs{keystr(path)} = {TensorSpec.of(leaf) if isinstance(leaf, torch.Tensor) else leaf}")
    golden("preset_inputs", "\n".join(lines))


def test_sizes_and_dtype_change_the_call() -> None:
    module, _, kwargs = Preset.load("sd15-unet").build(batch=1, height=256, width=None, dtype="bfloat16")
    assert kwargs["sample"].shape == (1, 4, 32, 64)
    assert kwargs["sample"].dtype == torch.bfloat16
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    _, _, kwargs = Preset.load("wan2.1-14b").build(frames=5)
    assert kwargs["hidden_states"].shape == (1, 16, 2, 60, 104)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("sd15-unet", {"height": 500}, "height must be a multiple of 8, not 500; write height=496 or height=504"),
        ("sd15-unet", {"height": 7}, "height must be a multiple of 8, not 7; write height=8"),
        ("sd15-unet", {"batch": 0}, "batch must be a positive integer, not 0"),
        ("sd15-unet", {"batch": True}, "batch must be a positive integer, not True"),
        ("sd15-unet", {"batch": 1.0}, "batch must be a positive integer, not 1.0"),
        ("sd15-unet", {"frames": 3}, "has no size 'frames'; its sizes are batch, height, width, tokens"),
        ("sd15-unet", {"heigth": 512}, "no size 'heigth'; did you mean height?"),
        ("wan2.1-14b", {"frames": 80}, "frames must be a multiple of 4 plus 1, not 80; write frames=77 or frames=81"),
        ("wan2.1-14b", {"frames": 3}, "write frames=1 or frames=5"),
        ("wan2.1-14b", {"height": 488}, "height must be a multiple of 16, not 488"),
        ("clip-l-text", {"tokens": 78}, "tokens is at most 77, not 78; write tokens=77"),
    ],
)
def test_refuses_sizes(name: str, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Preset.load(name).build(**sizes)
    assert name in str(caught.value)
    assert message in str(caught.value)


def test_refuses_names_and_dtypes() -> None:
    with pytest.raises(PlannerError, match=r"no preset is called 'sdxl'; did you mean 'sdxl-unet' or 'sdxl-vae-decoder'"):
        Preset.load("sdxl")
    with pytest.raises(PlannerError, match="known are sd15-unet"):
        Preset.load("zzz")
    with pytest.raises(PlannerError, match="dtype 'int8' is none of float16"):
        Preset.load("clip-l-text").build(dtype="int8")
    with pytest.raises(PlannerError, match="did you mean UNet2DConditionModel"):
        frontend("diffusers").build("UNet2DConditonModel", {}, torch.float32)
    with pytest.raises(PlannerError, match="no model class 'Lama"):
        frontend("transformers").build("LamaForCausalLM", {}, torch.float32)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sizes": {"depth": 3}}, "the size 'depth'"),
        ({"sizes": {"height": {"step": 8}}}, "needs a default"),
        ({"inputs": {"x": {"shape": [1], "dtyp": "int64"}}}, "unknown field or dtype (dtyp)"),
        ({"inputs": {"x": {"shape": [1], "dtype": "int3"}}}, "unknown field or dtype (int3)"),
        ({"inputs": {"x": 3}}, "the input 'x' is 3"),
        ({"inputs": {"pair": [{"shape": [1]}, 4]}}, "the input 1 is 4"),
    ],
)
def test_refuses_damaged_recipes(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(table, "here")
    assert message in str(caught.value)


def test_a_default_is_never_above_the_most() -> None:
    recipe = Recipe.parse({"sizes": {"tokens": {"default": 512, "most": "limit"}}}, "here")
    assert recipe.resolve({}, {"limit": 77}, "m") == {"tokens": 77}


def test_random_inputs_respect_their_bounds() -> None:
    ids = random_tensor((1000,), torch.int64, 7)
    assert ids.min() >= 0
    assert ids.max() == 6
    assert random_tensor((3,), torch.int64, None).tolist() == [0, 0, 0]
    assert random_tensor((3,), torch.bool, None).all()
    assert random_tensor((3,), torch.bfloat16, None).dtype == torch.bfloat16


def test_small_presets_plan() -> None:
    module, args, kwargs = Preset.load("clip-l-text").build()
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, machine="rtx-4090")
    again = plan(module, p.minimum_bytes, inputs=args, kwargs=kwargs, machine="rtx-3060")
    assert p.replan(p.minimum_bytes, machine="rtx-3060") == again
    assert p.replan(p.minimum_bytes, machine=Machine.preset("rtx-3060")) == again
    assert p.replan(p.minimum_bytes) != again
    module, args, kwargs = Preset.load("sd-vae-decoder").build(height=64, width=128)
    assert plan(module, "1GB", inputs=args, kwargs=kwargs, method="decode", machine="rtx-4090").minimum_bytes < 10**9


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_plans_within_half_a_minute(name: str) -> None:
    """Processor seconds of a plan from nothing: what two idle cores need at most, however busy they are now."""
    preset = Preset.load(name)
    module, args, kwargs = preset.build()
    started = time.process_time()
    p = plan(module, FEASIBLE.get(name, "6GB"), inputs=args, kwargs=kwargs, method=preset.method, machine="rtx-4090")
    seconds = time.process_time() - started
    print(f"{name}: planned in {seconds:.1f} s; {p!r}, {p.step_seconds:.3g} s, {p.step_seconds / p.bound_seconds:.2f} x bound")
    assert seconds < 30
