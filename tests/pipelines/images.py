"""Tiny pipelines for pictures whose denoisers are transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.pipelines.parts import PROMPT, SIDE, built, clip, flow, kl, picture, t5, tokenizer

_CALL: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "output_type": "pt"}
_SIZE: dict[str, Any] = {"height": SIDE, "width": SIDE}


def stable_diffusion_3() -> tuple[Any, dict[str, Any]]:
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    pipe = built(
        StableDiffusion3Pipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=kl(shift_factor=0.1),
        text_encoder=clip(projection=16),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(projection=16),
        tokenizer_2=tokenizer(77),
        text_encoder_3=t5(32),
        tokenizer_3=tokenizer(77),
    )
    return pipe, {**_CALL, **_SIZE, "max_sequence_length": 16}


def _flux(kind: type) -> Any:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return built(
        kind,
        scheduler=flow(use_dynamic_shifting=True),
        vae=kl(shift_factor=0.1),
        text_encoder=clip(),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(77),
        transformer=transformer,
    )


def flux() -> tuple[Any, dict[str, Any]]:
    return _flux(FluxPipeline), {**_CALL, **_SIZE, "max_sequence_length": 16}


def flux_img2img() -> tuple[Any, dict[str, Any]]:
    call = {**_CALL, **_SIZE, "max_sequence_length": 16, "image": picture(), "strength": 0.7}
    return _flux(FluxImg2ImgPipeline), call


def pixart_sigma() -> tuple[Any, dict[str, Any]]:
    """Guidance with a negative prompt; the transformer says the variance too."""
    transformer = PixArtTransformer2DModel(
        sample_size=SIDE // 2,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    pipe = built(
        PixArtSigmaPipeline,
        tokenizer=tokenizer(77),
        text_encoder=t5(),
        vae=kl(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    return pipe, {**_CALL, **_SIZE, "max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False}


def sana() -> tuple[Any, dict[str, Any]]:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=SIDE // 2,
        patch_size=1,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    gemma = Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    pipe = built(
        SanaPipeline,
        tokenizer=tokenizer(77),
        text_encoder=Gemma2Model(gemma),
        vae=vae,
        transformer=transformer,
        scheduler=flow(shift=7.0),
    )
    call = {
        "complex_human_instruction": None,
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
    }
    return pipe, {**_CALL, **_SIZE, **call}


def qwen_image() -> tuple[Any, dict[str, Any]]:
    """Two calls of the transformer in each step: guidance with prompts of different lengths."""
    text = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 14,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=20,
        video_token_id=21,
        vision_start_token_id=22,
        vision_end_token_id=23,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    pipe = built(
        QwenImagePipeline,
        scheduler=flow(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer(256),
        transformer=transformer,
    )
    return pipe, {**_CALL, **_SIZE, "negative_prompt": "a dog", "true_cfg_scale": 2.0, "max_sequence_length": 64}


def aura_flow() -> tuple[Any, dict[str, Any]]:
    transformer = AuraFlowTransformer2DModel(
        sample_size=SIDE // 2,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    pipe = built(
        AuraFlowPipeline, tokenizer=tokenizer(77), text_encoder=t5(), vae=kl(), transformer=transformer, scheduler=flow()
    )
    return pipe, {**_CALL, **_SIZE, "max_sequence_length": 16}


IMAGES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "StableDiffusion3": stable_diffusion_3,
    "Flux": flux,
    "FluxImg2Img": flux_img2img,
    "PixArtSigma": pixart_sigma,
    "Sana": sana,
    "QwenImage": qwen_image,
    "AuraFlow": aura_flow,
}
