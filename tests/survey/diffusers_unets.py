"""Tiny UNets, ControlNets and adapters."""

from __future__ import annotations

from typing import Any

from tests.survey.spec import ONES, Entry, I, N, U

_UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_TEXT = {"timestep": I(1000, 1), "encoder_hidden_states": N(2, 6, 16)}
_SDXL = {
    **_UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
}
_ADDED = {"added_cond_kwargs": {"text_embeds": N(2, 16), "time_ids": N(2, 6)}}
_CONTROL = {k: v for k, v in _UNET.items() if k != "up_block_types"}

UNETS: list[Entry] = [
    Entry(
        "UNet1DModel",
        {"block_out_channels": (8, 8, 16), "sample_size": 32, "in_channels": 2, "out_channels": 2, "extra_in_channels": 16},
        {"sample": N(2, 2, 32), "timestep": I(10, 1)},
    ),
    Entry(
        "UNet2DModel",
        {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        {"sample": N(2, 3, 16, 16), "timestep": I(1000, 1)},
    ),
    Entry("UNet2DConditionModel", _UNET, {"sample": N(2, 4, 16, 16), **_TEXT}),
    Entry("UNet2DConditionModel", _SDXL, {"sample": N(2, 4, 16, 16), **_TEXT, **_ADDED}, variant="sdxl"),
    Entry(
        "UNet2DConditionModel",
        {
            **_UNET,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "resnet_time_scale_shift": "scale_shift",
        },
        {"sample": N(2, 4, 16, 16), **_TEXT},
        variant="simple",
    ),
    Entry(
        "UNet3DConditionModel",
        {
            **_UNET,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "attention_head_dim": 8,
        },
        {"sample": N(1, 4, 3, 8, 8), "timestep": I(1000, 1), "encoder_hidden_states": N(1, 6, 16)},
    ),
    Entry(
        "UNetMotionModel",
        {
            **{k: v for k, v in _UNET.items() if k != "attention_head_dim"},
            "num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "motion_num_attention_heads": 2,
        },
        {"sample": N(1, 4, 3, 8, 8), "timestep": I(1000, 1), "encoder_hidden_states": N(1, 6, 16)},
    ),
    Entry(
        "I2VGenXLUNet",
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "num_attention_heads": 2,
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        {
            "sample": N(1, 4, 2, 16, 16),
            "timestep": I(1000, 1),
            "fps": I(30, 1),
            "image_latents": N(1, 4, 2, 16, 16),
            "image_embeddings": N(1, 16),
            "encoder_hidden_states": N(1, 6, 16),
        },
    ),
    Entry(
        "UNetSpatioTemporalConditionModel",
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "num_attention_heads": 4,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "sample_size": 16,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        {"sample": N(1, 2, 8, 16, 16), "timestep": I(1000, 1), "encoder_hidden_states": N(1, 1, 16), "added_time_ids": N(1, 3)},
    ),
    Entry(
        "Kandinsky3UNet",
        {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "encoder_hid_dim": 16,
            "time_embedding_dim": 16,
            "groups": 4,
            "attention_head_dim": 8,
        },
        {
            "sample": N(1, 4, 16, 16),
            "timestep": I(1000, 1),
            "encoder_hidden_states": N(1, 6, 16),
            "encoder_attention_mask": ONES(1, 6),
        },
    ),
    Entry(
        "StableCascadeUNet",
        {
            "block_out_channels": (16, 32),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "conditioning_dim": 16,
            "clip_text_pooled_in_channels": 8,
            "clip_text_in_channels": 8,
            "clip_image_in_channels": 8,
            "clip_seq": 2,
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "switch_level": (False,),
        },
        {
            "sample": N(1, 4, 8, 8),
            "timestep_ratio": U(1),
            "clip_text_pooled": N(1, 1, 8),
            "clip_text": N(1, 4, 8),
            "clip_img": N(1, 1, 8),
        },
    ),
    Entry(
        "UVit2DModel",
        {
            "hidden_size": 16,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 16,
            "vocab_size": 20,
            "codebook_size": 16,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "sample_size": 8,
        },
        {
            "input_ids": I(16, 1, 8, 8),
            "encoder_hidden_states": N(1, 4, 16),
            "pooled_text_emb": N(1, 16),
            "micro_conds": N(1, 5),
        },
    ),
    Entry("T2IAdapter", {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 4}, {"x": N(1, 3, 16, 16)}),
    Entry(
        "T2IAdapter",
        {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 4, "adapter_type": "light_adapter"},
        {"x": N(1, 3, 16, 16)},
        variant="light",
    ),
    Entry(
        "ControlNetModel",
        {**_CONTROL, "conditioning_embedding_out_channels": (8, 8)},
        {"sample": N(2, 4, 16, 16), **_TEXT, "controlnet_cond": N(2, 3, 32, 32)},
    ),
    Entry(
        "ControlNetModel",
        {**_CONTROL, "conditioning_embedding_out_channels": (8, 8)},
        {"sample": N(2, 4, 16, 16), **_TEXT, "controlnet_cond": N(2, 3, 32, 32), "guess_mode": True},
        variant="guess",
    ),
    Entry(
        "ControlNetUnionModel",
        {
            **_CONTROL,
            "conditioning_embedding_out_channels": (8, 8),
            "num_control_type": 2,
            "num_trans_channel": 8,
            "num_trans_head": 2,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
        {
            "sample": N(2, 4, 16, 16),
            **_TEXT,
            "controlnet_cond": [N(2, 3, 32, 32)],
            "control_type": U(2, 2),
            "control_type_idx": [0],
            **_ADDED,
        },
    ),
    Entry(
        "SparseControlNetModel",
        {
            **{k: v for k, v in _CONTROL.items() if k != "attention_head_dim"},
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "conditioning_embedding_out_channels": (8, 8),
            "motion_num_attention_heads": 2,
        },
        {
            "sample": N(1, 4, 2, 8, 8),
            "timestep": I(1000, 1),
            "encoder_hidden_states": N(1, 6, 16),
            "controlnet_cond": N(1, 4, 2, 8, 8),
            "conditioning_mask": N(1, 1, 2, 8, 8),
        },
    ),
    Entry(
        "UNetControlNetXSModel",
        {
            "block_out_channels": (16, 32),
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "norm_num_groups": 8,
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "ctrl_block_out_channels": (8, 16),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 4,
            "ctrl_conditioning_embedding_out_channels": (8, 8),
        },
        {
            "sample": N(1, 4, 16, 16),
            "timestep": I(1000, 1),
            "encoder_hidden_states": N(1, 6, 16),
            "controlnet_cond": N(1, 3, 32, 32),
        },
    ),
]
