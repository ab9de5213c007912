"""Folders as the libraries save them, of small models: what the tests of checkpoints plan."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

logging.disable_progress_bar()

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
T5: dict[str, Any] = {"vocab_size": 99, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}


def llama(tied: bool = True) -> nn.Module:
    config = LlamaConfig(vocab_size=99, num_key_value_heads=1, tie_word_embeddings=tied, max_position_embeddings=16, **SIZES)
    return LlamaForCausalLM(config)


def llama_untied() -> nn.Module:
    return llama(tied=False)


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **T5))


def bert() -> nn.Module:
    return BertModel(BertConfig(vocab_size=99, max_position_embeddings=16, **SIZES))


def bert_with_head() -> nn.Module:
    return BertForMaskedLM(BertConfig(vocab_size=99, max_position_embeddings=16, **SIZES))


def clip_text() -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(vocab_size=99, max_position_embeddings=16, **SIZES))


def vae() -> nn.Module:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, sample_size=32,
    )  # fmt: skip


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


def wan() -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2, in_channels=4,
        out_channels=4,
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (llama, llama_untied, t5, bert, bert_with_head, clip_text, vae, unet, flux, wan)
}


def saved(make: Callable[[], nn.Module], folder: Path, shard: str = "20KB", **options: Any) -> Any:
    """The model in eval mode, saved by its library in shards; weights that start as zeros or ones are random too."""
    model: Any = make().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=shard, **options)
    return model


def loaded(kind: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The library's own model of a folder, in eval mode; given a model, of its class.

    Its weights lie in memory of their own: over a mapped file they start at any byte, where MKL gives other bits.
    """
    kind = type(kind) if isinstance(kind, nn.Module) else kind
    keyword = "dtype" if hasattr(kind, "main_input_name") else "torch_dtype"
    model = kind.from_pretrained(folder, **{keyword: dtype}, **options).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def call_of(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """A call with real inputs: the method, keyword arguments."""
    kind, tokens = type(model).__name__, torch.arange(2 * 8).view(2, 8) % 99
    dtype = Counter(p.dtype for p in model.parameters()).most_common(1)[0][0]

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)

    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "LlamaForCausalLM": ("forward", {"input_ids": tokens, "use_cache": False}),
        "T5ForConditionalGeneration": ("forward", {"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False}),
        "AutoencoderKL": ("decode", {"z": noise(1, 4, 4, 4)}),
        "UNet2DConditionModel": (
            "forward",
            {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": noise(2, 5, 32)},
        ),
        "FluxTransformer2DModel": (
            "forward",
            {
                "hidden_states": noise(1, 6, 16), "encoder_hidden_states": noise(1, 5, 32), "pooled_projections": noise(1, 32),
                "timestep": noise(1), "img_ids": torch.ones(6, 3), "txt_ids": torch.ones(5, 3), "guidance": noise(1),
            },
        ),
        "WanTransformer3DModel": (
            "forward",
            {"hidden_states": noise(1, 4, 2, 4, 4), "timestep": torch.tensor([3]), "encoder_hidden_states": noise(1, 5, 32)},
        ),
    }  # fmt: skip
    return calls.get(kind, ("forward", {"input_ids": tokens}))


def outputs(model: Any, method: str, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(getattr(model, method)(**kwargs)) if isinstance(leaf, torch.Tensor)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], name: str = "model") -> None:
    """The folder's weights changed, in one file."""
    state = change(state_of(folder))
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file(state, folder / f"{name}.safetensors", {"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
