"""Frontends: a module built from a config is the one that the library loads, but for the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, WanTransformer3DModel
from torch import nn
from transformers import (
    ASTConfig,
    ASTModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ResNetConfig,
    ResNetModel,
    Speech2TextConfig,
    Speech2TextModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperModel,
    XLNetConfig,
    XLNetModel,
)

from planner import PlannerError, plan
from planner.frontends import diffusers as diffusers_frontend
from planner.frontends import transformers as transformers_frontend
from planner.recipes import meta_tensor

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_T5 = {"vocab_size": 99, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}


def bert() -> nn.Module:
    return BertModel(BertConfig(vocab_size=99, **_SMALL))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, num_key_value_heads=1, tie_word_embeddings=True, **_SMALL))


def t5_encoder() -> nn.Module:
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **_T5))


def wan() -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        in_channels=4,
        out_channels=4,
    )


def vae() -> nn.Module:
    return AutoencoderKL(block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [bert, llama, t5_encoder, wan, vae])
def test_built_is_loaded_but_for_weights(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    original: Any = make()
    original.save_pretrained(tmp_path)
    frontend: Any = diffusers_frontend if make in (wan, vae) else transformers_frontend
    loaded = frontend.load(tmp_path, type(original).__name__, dtype)
    built = frontend.build(type(original).__name__, frontend.config_of(original), dtype)

    def described(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (p.shape, p.dtype) for name, p in module.named_parameters()}  # tied ones once

    assert described(built) == described(loaded)
    assert all(p.is_meta for p in built.parameters())
    assert torch.get_default_dtype() == torch.float32
    held = dict(loaded.named_buffers())
    assert set(held) == {name for name, _ in built.named_buffers()}
    for name, buffer in built.named_buffers():
        assert torch.equal(buffer, held[name])
        assert buffer.dtype == held[name].dtype
    assert not built.training
    assert not loaded.training


def vit() -> nn.Module:
    return ViTModel(ViTConfig(image_size=32, patch_size=8, **_SMALL))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(**_T5))


def whisper() -> nn.Module:
    return WhisperModel(
        WhisperConfig(
            vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50, max_target_positions=20, pad_token_id=0,
            bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
        )
    )  # fmt: skip


def wav2vec() -> nn.Module:
    return Wav2Vec2Model(Wav2Vec2Config(vocab_size=99, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
                                        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), **_SMALL))  # fmt: skip


def resnet() -> nn.Module:
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"))


def spectrogram() -> nn.Module:
    return ASTModel(ASTConfig(max_length=24, num_mel_bins=16, patch_size=8, **_SMALL))


def speech() -> nn.Module:
    return Speech2TextModel(
        Speech2TextConfig(
            vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=64, max_target_positions=16, conv_channels=16,
            input_feat_per_channel=8,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (bert, {"input_ids": (1, 512)}),
        (llama, {"input_ids": (1, 512)}),
        (vit, {"pixel_values": (1, 3, 32, 32)}),
        (t5, {"input_ids": (1, 512), "decoder_input_ids": (1, 512)}),
        (whisper, {"input_features": (1, 80, 100), "decoder_input_ids": (1, 20)}),
        (wav2vec, {"input_values": (1, 16_000)}),
        (resnet, {"pixel_values": (1, 3, 224, 224)}),
        (spectrogram, {"input_values": (1, 24, 16)}),
        (speech, {"input_features": (1, 64, 8), "decoder_input_ids": (1, 16)}),
    ],
)
def test_inputs_from_the_config(make: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    module = make().eval()
    recipe = transformers_frontend.recipe(module)
    assert recipe is not None
    config = transformers_frontend.config_of(module)
    kwargs = recipe.make(recipe.resolve({}, config, "m"), config, torch.float32, meta_tensor)
    assert {k: tuple(v.shape) for k, v in kwargs.items() if isinstance(v, torch.Tensor)} == shapes
    assert plan(module, "1GB", kwargs=kwargs, machine="rtx-4090").peak_bytes > 0


def test_several_modalities_are_not_guessed() -> None:
    module = CLIPModel(CLIPConfig(text_config=_SMALL, vision_config={**_SMALL, "image_size": 32, "patch_size": 8}))
    assert transformers_frontend.recipe(module) is None


def pair() -> nn.Module:
    text = {**_SMALL, "vocab_size": 99, "max_position_embeddings": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**_SMALL, "image_size": 32, "patch_size": 8}))


def xlnet() -> nn.Module:
    """A model whose config knows nothing that helps: the library's own dummy inputs serve."""
    return XLNetModel(XLNetConfig(vocab_size=99, d_model=32, n_layer=1, n_head=2, d_inner=32))


@pytest.mark.parametrize("make", [bert, llama, vit, t5, whisper, wav2vec, pair, xlnet])
def test_models_are_planned_without_inputs(make: Any) -> None:
    p = plan(make().eval(), "1GB", device="accounting", allow=("offload",))
    assert p.peak_bytes > 0
    assert p.options.kwargs


def test_what_is_not_known_is_asked_for() -> None:
    with pytest.raises(PlannerError, match=r"method='get_input_embeddings', kwargs="):
        plan(bert().eval(), "1GB", method="get_input_embeddings")
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(vocab_size=99, **_SMALL),
            vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **_SMALL},
        )
    )
    with pytest.raises(PlannerError, match=r"LlavaForConditionalGeneration.*kwargs=.'input_ids'"):
        plan(llava.eval(), "1GB")
