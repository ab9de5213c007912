"""Small real models with random weights: each builds `(module in eval mode, args, kwargs)`, float32, always the same.

Weights are redrawn after construction, so that every one of them matters: libraries start biases at zero and norms at
one, which would hide a weight that was lost or exchanged.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

__all__ = ["ZOO", "Example", "bert", "flux", "llama", "lstm", "t5_encoder", "unet", "vae_decoder", "vit"]

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def bert() -> Example:
    """BERT, 4 layers, hidden 64, with an attention mask that hides two tokens."""
    config = BertConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
    )
    module, g = _finish(BertModel(config), seed=1)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, -2:] = 0
    return module, (), {"input_ids": _ids(g, 512, 2, 16), "attention_mask": mask}


def t5_encoder() -> Example:
    """T5 encoder: one embedding under two names, gated GELU, relative position bias shared by all blocks."""
    config = T5Config(vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=4, num_heads=4, feed_forward_proj="gated-gelu")
    module, g = _finish(T5EncoderModel(config), seed=2)
    return module, (), {"input_ids": _ids(g, 512, 2, 20)}


def unet() -> Example:
    """A denoiser with two resolutions, skip connections and cross attention."""
    module = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    module, g = _finish(module, seed=3)
    args = (_normal(g, 1, 4, 16, 16), torch.tensor([7]), _normal(g, 1, 8, 32))
    return module, args, {"return_dict": False}


def flux() -> Example:
    """A FLUX transformer: two double and two single blocks, rotary positions, guidance."""
    module = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    module, g = _finish(module, seed=4)
    rows, columns = 4, 4
    image = torch.zeros(rows * columns, 3)
    image[:, 1] = torch.arange(rows).repeat_interleave(columns)
    image[:, 2] = torch.arange(columns).repeat(rows)
    kwargs = {
        "hidden_states": _normal(g, 1, rows * columns, 16),
        "encoder_hidden_states": _normal(g, 1, 6, 32),
        "pooled_projections": _normal(g, 1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": image,
        "txt_ids": torch.zeros(6, 3),
        "guidance": torch.tensor([3.5]),
        "return_dict": False,
    }
    return module, (), kwargs


def vae_decoder() -> Example:
    """The decoder of an AutoencoderKL: three resolutions and the attention of its middle block."""
    module = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    ).decoder
    module, g = _finish(module, seed=5)
    return module, (_normal(g, 1, 4, 8, 8),), {}


class _Lstm(nn.Module):
    """Tokens [B, T, 32] to scores [B, T, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 64, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def lstm() -> Example:
    """A two-layer bidirectional LSTM with a linear head."""
    module, g = _finish(_Lstm(), seed=6)
    return module, (_normal(g, 2, 9, 32),), {}


def llama() -> Example:
    """A Llama decoder without cache: grouped queries, rotary positions, SwiGLU."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    module, g = _finish(LlamaModel(config), seed=7)
    return module, (), {"input_ids": _ids(g, 512, 2, 12), "use_cache": False}


def vit() -> Example:
    """A vision transformer on 32 by 32 images in patches of 8."""
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=8
    )
    module, g = _finish(ViTModel(config), seed=8)
    return module, (), {"pixel_values": _normal(g, 2, 3, 32, 32)}


ZOO: dict[str, Callable[[], Example]] = {
    "bert": bert,
    "t5_encoder": t5_encoder,
    "unet": unet,
    "flux": flux,
    "vae_decoder": vae_decoder,
    "lstm": lstm,
    "llama": llama,
    "vit": vit,
}


@torch.no_grad()
def _finish(module: nn.Module, seed: int) -> tuple[nn.Module, torch.Generator]:
    """Redraw every parameter: matrices of variance 1/fan-in, norm weights near one, biases near zero."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if p.ndim > 1:
            p.copy_(noise / math.sqrt(p[0].numel()))
        else:
            p.copy_(noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))
    return module.eval(), g


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


def _ids(g: torch.Generator, vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=g)
