"""Tiny pipelines for videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import LlamaConfig, LlamaModel

from tests.pipelines.parts import PROMPT, built, clip, flow, t5, tokenizer

_CALL: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "output_type": "pt", "height": 16, "width": 16}


def cogvideox() -> tuple[Any, dict[str, Any]]:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=16,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        sample_height=16,
        sample_width=16,
    )
    pipe = built(
        CogVideoXPipeline,
        tokenizer=tokenizer(77),
        text_encoder=t5(),
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )
    return pipe, {**_CALL, "num_frames": 9, "max_sequence_length": 16}


def _wan(**more: Any) -> Any:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    }
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    second = WanTransformer3DModel(**config) if "boundary_ratio" in more else None
    return built(
        WanPipeline,
        tokenizer=tokenizer(77),
        text_encoder=t5(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=WanTransformer3DModel(**config),
        transformer_2=second,
        **more,
    )


def wan() -> tuple[Any, dict[str, Any]]:
    return _wan(), {**_CALL, "num_frames": 5, "max_sequence_length": 16}


def wan_2_2() -> tuple[Any, dict[str, Any]]:
    """Two transformers: one for the noisy steps, one for the others."""
    return _wan(boundary_ratio=0.875), {**_CALL, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 4}


def ltx() -> tuple[Any, dict[str, Any]]:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe = built(
        LTXPipeline,
        scheduler=flow(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer(77),
        transformer=transformer,
    )
    return pipe, {**_CALL, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
        guidance_embeds=True,
    )
    llama = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    vae = AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    pipe = built(
        HunyuanVideoPipeline,
        text_encoder=LlamaModel(llama),
        tokenizer=tokenizer(77),
        transformer=transformer,
        vae=vae,
        scheduler=flow(shift=7.0),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(77),
    )
    template = {"template": "describe {}", "crop_start": 1}
    return pipe, {**_CALL, "num_frames": 5, "prompt_template": template, "max_sequence_length": 16}


VIDEOS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "CogVideoX": cogvideox,
    "Wan": wan,
    "Wan2.2": wan_2_2,
    "LTX": ltx,
    "HunyuanVideo": hunyuan_video,
}
