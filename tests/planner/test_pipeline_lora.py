"""Adapters of peft on planned pipelines: loaded, set, fused, unloaded as the library does it, with the pictures of no plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from planner import PipelinePlan, plan
from tests.pipelines import PIPELINES

SLOW = pytest.mark.slow
KINDS = {"Flux": ("transformer", "joint_attention_kwargs"), "StableDiffusion": ("unet", "cross_attention_kwargs")}
LAYERS = {"transformer": ["to_q", "to_k"], "unet": ["to_q", "to_k"], "text_encoder": ["q_proj", "v_proj"]}

Call = dict[str, Any]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)


def picture_of(pipe: Any, call: Mapping[str, Any], **more: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(**{**call, **more}, generator=torch.Generator().manual_seed(3)).images)


def saved(kind: str, folder: Path, name: str, components: tuple[str, ...], seed: int = 1) -> Path:
    """Random adapters for these components in a checkpoint, as training writes one."""
    pipe, _ = PIPELINES[kind]()
    torch.manual_seed(seed)
    layers = {}
    for each in components:
        module = getattr(pipe, each)
        module.add_adapter(
            LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=LAYERS[each]), adapter_name=name
        )
        layers[f"{each}_lora_layers"] = get_peft_model_state_dict(module, adapter_name=name)
    pipe.save_lora_weights(folder / name, **layers)
    return folder / name


def planned(pipe: Any, call: Call) -> PipelinePlan:
    p = plan(pipe, "1GB", call=call, device="accounting", machine="rtx-4090", allow=("offload",))
    p = p.replan(p.unplanned_bytes // 2)
    p.build()
    return p


def operations(one: Path, two: Path) -> dict[str, Callable[[Any], Any]]:
    return {
        "load": lambda pipe: pipe.load_lora_weights(one, adapter_name="one"),
        "weigh": lambda pipe: pipe.set_adapters(["one"], [0.7]),
        "another": lambda pipe: pipe.load_lora_weights(two, adapter_name="two"),
        "both": lambda pipe: pipe.set_adapters(["one", "two"], [0.7, 0.3]),
        "disable": lambda pipe: pipe.disable_lora(),
        "enable": lambda pipe: pipe.enable_lora(),
        "delete": lambda pipe: pipe.delete_adapters("two"),
        "fuse": lambda pipe: pipe.fuse_lora(),
        "unfuse": lambda pipe: pipe.unfuse_lora(),
        "unload": lambda pipe: pipe.unload_lora_weights(),
    }


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("Flux", ("load", "weigh", "unload")),
        pytest.param("Flux", None, marks=SLOW),
        pytest.param("StableDiffusion", None, marks=SLOW),
    ],
)
def test_what_libraries_do_with_adapters_is_planned_again(kind: str, names: tuple[str, ...] | None, tmp_path: Path) -> None:
    component = KINDS[kind][0]
    do = operations(*(saved(kind, tmp_path, name, (component,), seed) for seed, name in enumerate(("one", "two"))))
    (pipe, call), (other, _) = PIPELINES[kind](), PIPELINES[kind]()
    p, before = planned(pipe, call), picture_of(other, call)
    assert torch.equal(picture_of(pipe, call), before)
    for name in names or do:
        do[name](pipe)
        do[name](other)
        wanted = picture_of(other, call)
        assert torch.equal(picture_of(pipe, call), wanted), name
        assert p.report().peak_bytes <= p.budget_bytes
    assert p.restore() is pipe
    assert torch.equal(picture_of(pipe, call), picture_of(other, call))


@pytest.mark.parametrize("kind", ["Flux", pytest.param("StableDiffusion", marks=SLOW)])
def test_a_scale_for_one_call(kind: str, tmp_path: Path) -> None:
    """The pipeline sets it on its text encoder around that one's call; a component finds its own among its arguments."""
    component, key = KINDS[kind]
    folder = saved(kind, tmp_path, "style", (component, "text_encoder"))
    (pipe, call), (other, _) = PIPELINES[kind](), PIPELINES[kind]()
    pipe.load_lora_weights(folder, adapter_name="style")
    other.load_lora_weights(folder, adapter_name="style")
    p = planned(pipe, call)
    whole, half = picture_of(other, call), picture_of(other, call, **{key: {"scale": 0.5}})
    assert not torch.equal(whole, half)
    for _ in range(2):
        assert torch.equal(picture_of(pipe, call), whole)
        assert torch.equal(picture_of(pipe, call, **{key: {"scale": 0.5}}), half)
        assert p.report().peak_bytes <= p.budget_bytes
    q = plan(pipe_of(kind, folder), p.budget_bytes, call={**call, key: {"scale": 0.5}}, device="accounting", allow=("offload",))
    assert torch.equal(picture_of(q.build(), call, **{key: {"scale": 0.5}}), half)


def pipe_of(kind: str, folder: Path) -> Any:
    pipe, _ = PIPELINES[kind]()
    pipe.load_lora_weights(folder, adapter_name="style")
    return pipe


def test_a_callback_that_weighs_adapters_anew(tmp_path: Path) -> None:
    """Between the steps of one call; each weight makes a program, and they are known in the next call."""

    def weigh(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        pipe.set_adapters(["style"], [0.25 if step == 0 else 1.0])
        return {}

    folder = saved("Flux", tmp_path, "style", ("transformer", "text_encoder"))
    (pipe, call), (other, _) = PIPELINES["Flux"](), PIPELINES["Flux"]()
    pipe.load_lora_weights(folder, adapter_name="style")
    other.load_lora_weights(folder, adapter_name="style")
    p = planned(pipe, call)
    whole, weighed = picture_of(other, call), picture_of(other, call, callback_on_step_end=weigh)
    assert not torch.equal(whole, weighed)
    assert p.runner is not None
    for _ in range(2):
        assert torch.equal(picture_of(pipe, call, callback_on_step_end=weigh), weighed)
        assert len(p.runner._members) == len(p.parts) + 1
        assert p.report().peak_bytes <= p.budget_bytes
        assert torch.equal(picture_of(pipe, call), whole)


def test_what_the_library_refuses_changes_nothing() -> None:
    pipe, call = PIPELINES["Flux"]()
    own, p = picture_of(pipe, call), planned(pipe, call)
    for action in (
        lambda: pipe.set_adapters(["nothing"]),
        lambda: pipe.load_lora_weights({"transformer.proj_out.weight": torch.ones(2, 16)}),
        lambda: pipe.transformer.add_adapter(object()),
    ):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            action()
        assert torch.equal(picture_of(pipe, call), own)
        assert p.report().peak_bytes <= p.budget_bytes
    pipe.fuse_lora()  # nothing is loaded
    assert torch.equal(picture_of(pipe, call), own)
