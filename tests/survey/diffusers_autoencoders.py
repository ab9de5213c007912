"""Tiny autoencoders: `decode` and `encode` of each."""

from __future__ import annotations

from typing import Any

from tests.survey.spec import Entry, N, Random

_KL = {
    "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8, "latent_channels": 4,
}  # fmt: skip


def _both(kind: str, config: dict[str, Any], image: Random, latent: Random, variant: str = "", latent_name: str = "z", **more: Any) -> list[Entry]:
    """Encode and decode; `more` goes to decode."""
    return [
        Entry(kind, config, {"x": image, "return_dict": False}, "encode", variant),
        Entry(kind, config, {latent_name: latent, "return_dict": False, **more}, "decode", variant),
    ]


AUTOENCODERS: list[Entry] = [
    *_both("AutoencoderKL", _KL, N(1, 3, 16, 16), N(1, 4, 8, 8)),
    Entry("AutoencoderKL", _KL, {"sample": N(1, 3, 16, 16)}),
    *_both("AutoencoderKLFlux2", {**_KL, "latent_channels": 4}, N(1, 3, 16, 16), N(1, 4, 8, 8)),
    Entry(
        "AsymmetricAutoencoderKL",
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "down_block_out_channels": (16, 32), "norm_num_groups": 8,
         "up_block_types": ("UpDecoderBlock2D",) * 2, "up_block_out_channels": (16, 32), "layers_per_up_block": 1},
        {"sample": N(1, 3, 32, 32), "mask": N(1, 1, 32, 32)},
    ),
    *_both(
        "AutoencoderKLTemporalDecoder",
        {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2, "latent_channels": 4},
        N(2, 3, 16, 16), N(2, 4, 8, 8), num_frames=2,
    ),
    *_both(
        "AutoencoderTiny",
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 2),
         "num_decoder_blocks": (2, 1)},
        N(1, 3, 16, 16), N(1, 4, 8, 8), latent_name="x",
    ),
    Entry("VQModel", {**_KL, "latent_channels": 3},
          {"sample": N(1, 3, 16, 16)}),
    Entry("VQModel", {**_KL, "latent_channels": 3},
          {"h": N(1, 3, 8, 8), "return_dict": False}, "decode"),
    *_both(
        "AutoencoderDC",
        {"latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
         "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
         "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
         "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)), "upsample_block_type": "interpolate",
         "downsample_block_type": "conv", "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"},
        N(1, 3, 16, 16), N(1, 4, 8, 8),
    ),
    *_both(
        "AutoencoderKLAllegro",
        {"block_out_channels": (8, 8), "down_block_types": ("AllegroDownBlock3D",) * 2,
         "up_block_types": ("AllegroUpBlock3D",) * 2, "temporal_downsample_blocks": (True, False),
         "temporal_upsample_blocks": (True, False), "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 16},
        N(1, 3, 4, 16, 16), N(1, 4, 2, 8, 8),
    ),
    *_both(
        "AutoencoderKLCogVideoX",
        {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
         "sample_height": 16, "sample_width": 16},
        N(1, 3, 9, 16, 16), N(1, 4, 3, 2, 2),
    ),
    *_both(
        "AutoencoderKLCosmos",
        {"latent_channels": 4, "encoder_block_out_channels": (8, 8, 8), "decode_block_out_channels": (8, 8, 8), "resolution": 32,
         "attention_resolutions": (8,), "num_layers": 1, "patch_size": 2, "temporal_compression_ratio": 4,
         "spatial_compression_ratio": 4},
        N(1, 3, 9, 32, 32), N(1, 4, 3, 8, 8),
    ),
    *_both(
        "AutoencoderKLHunyuanVideo",
        {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
        N(1, 3, 9, 16, 16), N(1, 4, 3, 2, 2),
    ),
    *_both(
        "AutoencoderKLHunyuanImage",
        {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1,
         "spatial_compression_ratio": 2, "sample_size": 16, "scaling_factor": 0.5},
        N(1, 3, 16, 16), N(1, 4, 8, 8),
    ),
    *_both(
        "AutoencoderKLHunyuanImageRefiner",
        {"latent_channels": 4, "block_out_channels": (16, 16, 16), "layers_per_block": 1, "spatial_compression_ratio": 4,
         "temporal_compression_ratio": 2},
        N(1, 3, 5, 16, 16), N(1, 4, 3, 4, 4),
    ),
    *_both(
        "AutoencoderKLHunyuanVideo15",
        {"latent_channels": 4, "block_out_channels": (16, 16, 16), "layers_per_block": 1, "spatial_compression_ratio": 4,
         "temporal_compression_ratio": 2},
        N(1, 3, 5, 16, 16), N(1, 4, 3, 4, 4),
    ),
    *_both(
        "AutoencoderKLKVAE",
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2), "sample_size": 16},
        N(1, 3, 16, 16), N(1, 4, 8, 8),
    ),
    *_both(
        "AutoencoderKLKVAEVideo",
        {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2},
        N(1, 3, 5, 16, 16), N(1, 4, 3, 8, 8),
    ),
    *_both(
        "AutoencoderKLLTXVideo",
        {"latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8),
         "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1)},
        N(1, 3, 9, 32, 32), N(1, 8, 2, 1, 1),
    ),
    *_both(
        "AutoencoderKLLTX2Video",
        {"latent_channels": 8, "block_out_channels": (16, 32, 64, 128), "decoder_block_out_channels": (16, 32, 64),
         "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1)},
        N(1, 3, 9, 32, 32), N(1, 8, 2, 2, 2),
    ),
    *_both(
        "AutoencoderKLLTX2Audio",
        {"base_channels": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 4, "resolution": 32, "mel_bins": 16},
        N(1, 2, 16, 16), N(1, 4, 4, 8),
    ),
    *_both(
        "AutoencoderKLMagvit",
        {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4},
        N(1, 3, 9, 16, 16), N(1, 4, 3, 2, 2),
    ),
    *_both(
        "AutoencoderKLMochi",
        {"latent_channels": 4, "encoder_block_out_channels": (32, 32, 32, 32), "decoder_block_out_channels": (32, 32, 32, 32),
         "layers_per_block": (1, 1, 1, 1, 1), "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4},
        N(1, 3, 7, 32, 32), N(1, 4, 2, 4, 4),
    ),
    *_both(
        "AutoencoderKLQwenImage",
        {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        N(1, 3, 1, 16, 16), N(1, 4, 1, 2, 2),
    ),
    *_both(
        "AutoencoderKLWan",
        {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        N(1, 3, 9, 16, 16), N(1, 4, 3, 2, 2),
    ),
    *_both(
        "AutoencoderKLQwenImage21",
        {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1,
         "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        N(1, 4, 1, 16, 16), N(1, 4, 1, 2, 2),
    ),
    *_both(
        "AutoencoderOobleck",
        {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "channel_multiples": [1, 2], "decoder_channels": 8,
         "decoder_input_channels": 4},
        N(1, 2, 64), N(1, 4, 8),
    ),
    *_both(
        "AutoencoderVidTok",
        {"ch": 32, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1},
        N(1, 3, 17, 32, 32), N(1, 4, 5, 4, 4),
    ),
    *_both(
        "MMAudioVAE",
        {"mel_bins": 16, "latent_channels": 4, "hidden_channels": 32, "channel_multipliers": (1, 2), "layers_per_block": 1},
        N(1, 16, 16), N(1, 4, 8),
    ),
    Entry(
        "MMAudioVocoder",
        {"num_mels": 8, "upsample_initial_channel": 32, "upsample_rates": (4, 2), "upsample_kernel_sizes": (8, 4),
         "resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1, 3, 5),)},
        {"x": N(1, 8, 16)},
    ),
    Entry(
        "ConsistencyDecoderVAE",
        {"encoder_block_out_channels": (8, 8), "encoder_down_block_types": ("DownEncoderBlock2D",) * 2, "encoder_norm_num_groups": 4,
         "encoder_layers_per_block": 1, "decoder_block_out_channels": (8, 8), "decoder_norm_num_groups": 4,
         "decoder_layers_per_block": 1, "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
         "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2},
        {"sample": N(1, 3, 16, 16)},
    ),
    Entry(
        "AutoencoderRAE",
        {"encoder_hidden_size": 16, "encoder_patch_size": 4, "encoder_num_hidden_layers": 1, "decoder_hidden_size": 16,
         "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "patch_size": 4,
         "encoder_input_size": 16, "image_size": 16},
        {"z": N(1, 16, 4, 4)}, "decode",
    ),
    Entry("AutoencoderSAME", {"patch_size": 16, "encoder_channels": 16, "encoder_c_mults": (2,), "encoder_strides": (4,),
                              "encoder_transformer_depths": (1,), "latent_dim": 8, "dim_heads": 8},
          {"sample": N(1, 2, 1024)}),
    Entry("AutoencoderKLKVAEAudio", {"encoder_dim": 8, "encoder_rates": [2, 4], "latent_dim": 32, "codebook_dim": 8,
                                     "decoder_dim": 32, "decoder_rates": [4, 2], "attn_num_heads": 2}, {"sample": N(1, 1, 256)}),
]

AUTOENCODERS.append(Entry("VQModel", {**_KL, "latent_channels": 3}, {"x": N(1, 3, 16, 16), "return_dict": False}, "encode"))

