"""Tiny Stable Diffusion and Kandinsky pipelines: denoisers that are UNets, and a prior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.pipelines.parts import PROMPT, SIDE, built, clip, kl, mask, picture, tokenizer

_UNET: dict[str, Any] = {
    "sample_size": SIDE // 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_CALL: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "output_type": "pt"}
_SIZE: dict[str, Any] = {"height": SIDE, "width": SIDE}


def _sd(kind: type, **more: Any) -> Any:
    return built(
        kind,
        vae=kl(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=more.pop("unet", None) or UNet2DConditionModel(**_UNET),
        scheduler=more.pop("scheduler", None) or DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )


def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    return _sd(StableDiffusionPipeline), {**_CALL, **_SIZE}


def stable_diffusion_inpaint() -> tuple[Any, dict[str, Any]]:
    """The denoiser that takes latents, a mask and the masked picture."""
    pipe = _sd(StableDiffusionInpaintPipeline, unet=UNet2DConditionModel(**{**_UNET, "in_channels": 9}))
    return pipe, {**_CALL, **_SIZE, "image": picture(), "mask_image": mask()}


def stable_diffusion_controlnet() -> tuple[Any, dict[str, Any]]:
    """With a guidance that ends halfway: the scale of each step is a Python float."""
    config = {key: value for key, value in _UNET.items() if key not in ("up_block_types", "sample_size")}
    control = ControlNetModel(**config, conditioning_embedding_out_channels=(4, 8))
    pipe = _sd(StableDiffusionControlNetPipeline, controlnet=control)
    return pipe, {**_CALL, **_SIZE, "image": picture(), "control_guidance_end": 0.5}


def _xl(kind: type, **more: Any) -> Any:
    config = {
        **_UNET,
        "cross_attention_dim": 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 16,
        "use_linear_projection": True,
    }
    return built(
        kind,
        vae=kl(),
        text_encoder=clip(),
        text_encoder_2=clip(projection=16),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=UNet2DConditionModel(**config),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
        **more,
    )


def stable_diffusion_xl() -> tuple[Any, dict[str, Any]]:
    return _xl(StableDiffusionXLPipeline), {**_CALL, **_SIZE}


def stable_diffusion_xl_img2img() -> tuple[Any, dict[str, Any]]:
    return _xl(StableDiffusionXLImg2ImgPipeline), {**_CALL, "image": picture(), "strength": 0.7}


def _prior() -> dict[str, Any]:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    return {
        "prior": PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            embedding_dim=16,
            num_embeddings=77,
            additional_embeddings=4,
        ),
        "image_encoder": CLIPVisionModelWithProjection(vision),
        "text_encoder": clip(projection=16),
        "tokenizer": tokenizer(77),
        "scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
        ),
        "image_processor": CLIPImageProcessorPil(size=16, crop_size=16),
    }


def kandinsky_prior() -> tuple[Any, dict[str, Any]]:
    return built(KandinskyV22PriorPipeline, **_prior()), {**_CALL}


def kandinsky() -> tuple[Any, dict[str, Any]]:
    """A pipeline that calls two others, of the prior and of the decoder."""
    unet = UNet2DConditionModel(
        **{**_UNET, "block_out_channels": (32, 64), "cross_attention_dim": 32},
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        norm_type="spatial",
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=8,
    )
    prior = {f"prior_{name}": component for name, component in _prior().items()}
    pipe = built(KandinskyV22CombinedPipeline, unet=unet, scheduler=DDPMScheduler(), movq=movq, **prior)
    return pipe, {**_CALL, **_SIZE, "prior_num_inference_steps": 2}


LATENT: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "StableDiffusion": stable_diffusion,
    "StableDiffusionInpaint": stable_diffusion_inpaint,
    "StableDiffusionControlNet": stable_diffusion_controlnet,
    "StableDiffusionXL": stable_diffusion_xl,
    "StableDiffusionXLImg2Img": stable_diffusion_xl_img2img,
    "KandinskyPrior": kandinsky_prior,
    "Kandinsky": kandinsky,
}
