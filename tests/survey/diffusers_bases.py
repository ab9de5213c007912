"""What several tiny diffusion transformers have in common: configurations and inputs."""

from __future__ import annotations

from typing import Any

from tests.survey.spec import ONES, I, N, U

T = {"timestep": I(1000, 1)}
TEXT = {**T, "encoder_hidden_states": N(1, 6, 16)}
VIDEO = {"hidden_states": N(1, 4, 3, 8, 8), **TEXT}
FLUX: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
FLUX_IN = {
    "hidden_states": N(1, 16, 4),
    "encoder_hidden_states": N(1, 6, 16),
    "timestep": U(1),
    "img_ids": I(4, 16, 3),
    "txt_ids": I(1, 6, 3),
}
POOLED = {"pooled_projections": N(1, 8)}
WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
SD3: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "out_channels": 4,
    "pos_embed_max_size": 16,
}
DIT: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8}
SANA: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "sample_size": 8,
}
HUNYUAN_DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "hidden_size": 16,
    "cross_attention_dim": 16,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 4,
    "text_len": 4,
    "text_len_t5": 4,
}
HUNYUAN_DIT_IN = {
    "hidden_states": N(2, 4, 8, 8),
    "timestep": U(2),
    "encoder_hidden_states": N(2, 4, 16),
    "text_embedding_mask": ONES(2, 4),
    "encoder_hidden_states_t5": N(2, 4, 16),
    "text_embedding_mask_t5": ONES(2, 4),
    "image_meta_size": U(2, 6),
    "style": I(1, 2),
    "image_rotary_emb": [N(16, 8), N(16, 8)],
}
HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
HUNYUAN_IN = {
    "hidden_states": N(1, 4, 3, 4, 4),
    **TEXT,
    "encoder_attention_mask": ONES(1, 6),
    **POOLED,
    "guidance": I(1000, 1),
}
QWEN: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}
QWEN_IN = {
    "hidden_states": N(1, 16, 16),
    "encoder_hidden_states": N(1, 6, 16),
    "encoder_hidden_states_mask": ONES(1, 6),
    "timestep": U(1),
    "img_shapes": [(1, 4, 4)],
}
