"""The cases: full-size models for CUDA, two that a CPU can run, and small stand-ins of the former for `accounting`."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import nn

from planner.frontends import diffusers as diffusers_frontend
from planner.frontends import transformers as transformers_frontend
from planner.presets import Preset
from tests.benchmarks.bench import checkpoint
from tests.benchmarks.bench.work import Work, with_random_weights
from tests.pipelines.latent import stable_diffusion_xl
from tests.pipelines.parts import PROMPT, tokenizer

_BLOCKS: dict[str, Any] = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


@dataclass(frozen=True)
class Case:
    """One model and call, measured under several budgets.

    Attributes:
        name, title: for the command line and for people. device: "cuda" or "cpu", where it runs at full size.
        budgets: of device memory (on `cpu`: RAM). cast_budgets: those at which casts are allowed as well.
        make: the work; `small` asks for the stand-in. host_bytes: about what it takes of RAM, unplanned.
        burst: timed calls in a row, after one that is not timed, where calls follow each other; one alone otherwise.
        cold: whether weights are read from files: in each round there is then a call after the kernel forgot the files.
        rounds: how often the contenders take turns.
        skips: contenders that are left out, by the beginning of their names, and why.
        preset: that which the simulated table plans, with its sizes; None for the pipeline.
        pipeline, steps: whether it is one, and the steps of its call. decoder: whether an autoencoder decodes in it, `batch`
            pictures at once.
    """

    name: str
    title: str
    device: str
    budgets: tuple[str, ...]
    make: Callable[[bool], Work]
    host_bytes: int
    cast_budgets: tuple[str, ...] = ()
    burst: int = 1
    cold: bool = False
    rounds: int = 5
    skips: Mapping[str, str] = field(default_factory=dict)
    preset: tuple[str, dict[str, Any]] | None = None
    pipeline: bool = False
    steps: int = 1
    decoder: bool = False
    batch: int = 1


def _preset_work(
    name: str,
    sizes: dict[str, int],
    tiny: dict[str, Any],
    tiny_sizes: dict[str, int],
    repeats: int = 1,
    dtype: str | None = None,
) -> Callable[[bool], Work]:
    """The work of a preset; small: its config changed by `tiny`, in float32, which every CPU has kernels for."""

    def make(small: bool) -> Work:
        preset, wanted, given = Preset.load(name), dtype, sizes
        if small:
            preset = dataclasses.replace(preset, config={**preset.config, **tiny})
            wanted, given = "float32", tiny_sizes
        module = with_random_weights(preset.module(wanted))
        return Work(module, preset.inputs(module, drawer(), dtype=wanted, **given), preset.method, repeats=repeats)

    return make


def drawer() -> Callable[[tuple[int, ...], torch.dtype, int | None], torch.Tensor]:
    """Makes inputs, the same ones in every process."""
    generator = torch.Generator().manual_seed(1)

    def draw(shape: tuple[int, ...], dtype: torch.dtype, below: int | None) -> torch.Tensor:
        if not dtype.is_floating_point:
            return torch.randint(below or 2, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    return draw


def _t5_on_disk(small: bool) -> Work:
    folder = Path(tempfile.gettempdir(), "vramplan-benchmark-t5-small" if small else "vramplan-benchmark-t5")
    checkpoint.write(folder, checkpoint.SMALL if small else checkpoint.XL)
    ids = torch.randint(checkpoint.SMALL["vocab_size"], (1, 32), generator=torch.Generator().manual_seed(1))
    return Work(checkpoint.empty_model(folder), {"input_ids": ids}, folder=folder)


def _sdxl(small: bool) -> Work:
    """The pipeline with two text encoders, denoiser and autoencoder, and weights; small: a tiny one, in 2 steps."""
    pipe, call = stable_diffusion_xl() if small else sdxl_without_weights()
    side, steps, dtype = (16, 2, torch.float32) if small else (128, 10, torch.bfloat16)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            with_random_weights(part)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Work(pipe, {**call, "num_inference_steps": steps, "latents": latents, "output_type": "pt"})


def sdxl_without_weights() -> tuple[StableDiffusionXLPipeline, dict[str, Any]]:
    """SDXL in bfloat16, parameters on meta, and its call: 10 steps at 1024 x 1024. The tokenizers are toys."""
    dtype = torch.bfloat16
    big = {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "vocab_size": 49408,
        "projection_dim": 1280, "hidden_act": "gelu",
    }  # fmt: skip
    vae = {**Preset.load("sdxl-vae-decoder").config, "force_upcast": False}  # bfloat16 holds its values
    pipe = StableDiffusionXLPipeline(
        vae=diffusers_frontend.build("AutoencoderKL", vae, dtype),
        text_encoder=Preset.load("clip-l-text").module("bfloat16"),
        text_encoder_2=transformers_frontend.build("CLIPTextModelWithProjection", big, dtype),
        unet=Preset.load("sdxl-unet").module("bfloat16"),
        scheduler=EulerDiscreteScheduler(),
        tokenizer=tokenizer(77),
        tokenizer_2=tokenizer(77),
        add_watermarker=False,
    )
    return pipe, {"prompt": PROMPT, "height": 1024, "width": 1024, "num_inference_steps": 10}


_FLUX_SMALL = {
    "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 64,
    "pooled_projection_dim": 32, "axes_dims_rope": [8, 12, 12],
}  # fmt: skip
_UNET_SMALL = {
    "sample_size": 16, "block_out_channels": [32, 64], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 1], "attention_head_dim": [4, 8],
    "cross_attention_dim": 64, "projection_class_embeddings_input_dim": 176, "addition_time_embed_dim": 8,
    "layers_per_block": 1,
}  # fmt: skip
_T5_SMALL = {"vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 4, "num_heads": 4}
_WAN_SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 4, "text_dim": 32, "freq_dim": 32,
}  # fmt: skip
_ONE_MODEL = "of one model alone it is the model on the device: see the pipeline"
_BOTH = {"model-offload": _ONE_MODEL, "sequential": "of one model it is accelerate's cpu_offload"}
_ACTIVATIONS = "0.2 GB of weights: the peak is of activations, which it does not move"

CASES = (
    Case(
        "flux", "FLUX.1-dev's transformer, bf16, 1024 x 1024", "cuda", ("6GB", "8GB", "12GB", "16GB", "24GB"),
        _preset_work("flux1-dev", {}, _FLUX_SMALL, {"height": 128, "width": 128, "tokens": 16}, repeats=28),
        host_bytes=23_800_000_000, cast_budgets=("6GB", "12GB"), burst=4, rounds=3, skips=_BOTH, preset=("flux1-dev", {}),
    ),
    Case(
        "sdxl-unet", "SDXL's UNet, fp16, 1024 x 1024, batch 2", "cuda", ("2GB", "4GB", "6GB"),
        _preset_work("sdxl-unet", {}, _UNET_SMALL, {}, repeats=30),
        host_bytes=5_140_000_000, cast_budgets=("2GB",), burst=4, skips=_BOTH, preset=("sdxl-unet", {}),
    ),
    Case(
        "t5-xxl", "T5-XXL's encoder, bf16, 512 tokens", "cuda", ("4GB", "6GB", "8GB", "12GB"),
        _preset_work("t5-xxl-encoder", {}, _T5_SMALL, {"tokens": 64}),
        host_bytes=9_530_000_000, cast_budgets=("4GB",), skips=_BOTH, preset=("t5-xxl-encoder", {}),
    ),
    Case(
        "wan", "Wan2.1-14B's transformer, bf16, 832 x 480, 17 frames", "cuda", ("6GB", "8GB", "12GB", "16GB", "24GB"),
        _preset_work(
            "wan2.1-14b", {"height": 480, "width": 832, "frames": 17}, _WAN_SMALL,
            {"height": 32, "width": 32, "frames": 5, "tokens": 16}, repeats=50,
        ),
        host_bytes=28_600_000_000, cast_budgets=("8GB",), burst=2, rounds=3, skips=_BOTH,
        preset=("wan2.1-14b", {"height": 480, "width": 832, "frames": 17}),
    ),
    Case(
        "vae-1024", "AutoencoderKL's decoder (FLUX.1), bf16, two pictures of 1024 x 1024", "cuda", ("0.5GB", "1GB", "4GB"),
        _preset_work(
            "flux-vae-decoder", {"batch": 2, "height": 1024, "width": 1024}, _BLOCKS, {"batch": 2, "height": 64, "width": 64}
        ),
        host_bytes=170_000_000, skips=_BOTH, preset=("flux-vae-decoder", {"batch": 2, "height": 1024, "width": 1024}),
        decoder=True, batch=2,
    ),
    Case(
        "vae-2048", "AutoencoderKL's decoder (FLUX.1), bf16, 2048 x 2048", "cuda", ("1GB", "2GB", "4GB", "8GB"),
        _preset_work("flux-vae-decoder", {"height": 2048, "width": 2048}, _BLOCKS, {"height": 96, "width": 96}),
        host_bytes=170_000_000, skips=_BOTH, preset=("flux-vae-decoder", {"height": 2048, "width": 2048}), decoder=True,
    ),
    Case(
        "sdxl-pipeline", "A pipeline of SDXL's size, bf16, 1024 x 1024, 10 steps: seconds of a whole call", "cuda",
        ("4GB", "6GB", "8GB", "12GB"), _sdxl, host_bytes=7_000_000_000, rounds=3, pipeline=True, steps=10, decoder=True,
        skips={
            "disk-offload": "accelerate has it for one model, not for a pipeline",
            "cpu-offload": "of a pipeline it is diffusers' sequential offload",
            "device-map": "diffusers' device_map of a pipeline places whole components on several GPUs",
            "casts": "plans of pipelines are compared without casts here",
        },
    ),
    Case(
        "t5-disk", "T5 v1.1 XL's encoder, bf16, 2.45 GB read from a checkpoint folder, 32 tokens", "cpu",
        ("0.4GB", "0.8GB"), _t5_on_disk, host_bytes=2_450_000_000, cast_budgets=("0.8GB",), cold=True, rounds=2,
        skips=_BOTH,
    ),
    Case(
        "vae-512", "AutoencoderKL's decoder (SDXL), fp32, 512 x 512", "cpu", ("0.6GB", "0.8GB"),
        _preset_work("sdxl-vae-decoder", {"height": 512, "width": 512}, _BLOCKS, {"height": 64, "width": 64}, dtype="float32"),
        host_bytes=1_500_000_000, rounds=2, decoder=True,
        skips={**_BOTH, "disk-offload": _ACTIVATIONS, "device-map": _ACTIVATIONS, "group": _ACTIVATIONS},
    ),
)  # fmt: skip


def cases_for(device: str, names: list[str] | None = None) -> list[Case]:
    """The cases of a device, in their order; `accounting` runs the small stand-ins of all.

    Raises:
        SystemExit: there is no case of that name there.
    """
    here = [case for case in CASES if device == "accounting" or case.device == device]
    unknown = set(names or ()) - {case.name for case in here}
    if unknown:
        raise SystemExit(f"no case {sorted(unknown)[0]!r} on {device}; known there are {', '.join(c.name for c in here)}")
    return [case for case in here if not names or case.name in names]


def scratch_folder() -> Path:
    """Where contenders that offload to disk write: as large as the weights for each."""
    return Path(tempfile.mkdtemp(prefix="vramplan-bench-", dir=os.environ.get("VRAMPLAN_SCRATCH")))
