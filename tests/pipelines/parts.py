"""What tiny pipelines are made of: tokenizers made on the spot, text encoders, autoencoders, pictures."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

PROMPT = "a cat that looks at the sea"
SIDE = 32
_WORDS = f"<pad> </s> <unk> {PROMPT} dog describe in".split()


def tokenizer(length: int = 12) -> PreTrainedTokenizerFast:
    """Words to numbers; a prompt ends with `</s>`, and is padded with `<pad>`, which is 0."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(_WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=length
    )


def t5(hidden: int = 16) -> T5EncoderModel:
    config = T5Config(vocab_size=32, d_model=hidden, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config)


def clip(hidden: int = 16, *, projection: int | None = None) -> Any:
    """A text encoder of CLIP; with a projection of the pooled output to so many numbers."""
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projection or hidden,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def kl(channels: int = 4, **config: Any) -> AutoencoderKL:
    """An autoencoder for pictures, which halves their sides once."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=SIDE,
        **config,
    )


def flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


def picture(side: int = SIDE) -> Image.Image:
    return Image.linear_gradient("L").resize((side, side)).convert("RGB")


def mask(side: int = SIDE) -> Image.Image:
    return picture(side).convert("L").point(lambda value: 255 if value > 127 else 0)


def built(kind: type, /, **components: Any) -> Any:
    """The pipeline with these components in eval mode, always with the same random weights, none of them zero or one."""
    generator = torch.Generator().manual_seed(0)
    for component in components.values():
        if isinstance(component, nn.Module):
            _redraw(component.eval(), generator)
    return kind(**components)


@torch.no_grad()
def _redraw(module: nn.Module, generator: torch.Generator) -> None:
    """Matrices of variance 1/fan-in, norm weights near one, biases near zero."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))
