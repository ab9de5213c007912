"""Pipelines as large as they are published, on meta: they plan, and take no memory."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline

from planner.frontends import diffusers as diffusers_frontend
from planner.frontends import transformers as transformers_frontend
from tests.pipelines.parts import PROMPT, flow, tokenizer

_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "projection_dim": 768,
}
_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def flux_dev(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, dict[str, Any]]:
    """FLUX.1-dev: a picture of 1024 x 1024 in 28 steps. The tokenizers are toys."""
    pipe = FluxPipeline(
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=diffusers_frontend.build("AutoencoderKL", _VAE, dtype),
        text_encoder=transformers_frontend.build("CLIPTextModel", _CLIP_L, dtype),
        tokenizer=tokenizer(77),
        text_encoder_2=transformers_frontend.build("T5EncoderModel", _T5_XXL, dtype),
        tokenizer_2=tokenizer(512),
        transformer=diffusers_frontend.build("FluxTransformer2DModel", {"guidance_embeds": True}, dtype),
    )
    return pipe, {"prompt": PROMPT, "height": 1024, "width": 1024, "num_inference_steps": 28}
