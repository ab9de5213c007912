"""Makes any transformers configuration tiny, by the names of its attributes."""

from __future__ import annotations

import contextlib
import re
from typing import Any

LAYERS = 2
# First pattern that matches the whole name decides; a callable gets the old value. Lists are done element by element.
_RULES: tuple[tuple[str, Any], ...] = (
    (r".*(vocab_size|vocab_size_per_layer_input|num_embeddings|codebook_size|n_words)$", lambda v: min(v, 128)),
    (r"rotary_dim", 8),
    (r".*num_groups$|.*groups$|group_norm_num_groups", lambda v: min(v, 4)),
    (r".*(qk_rope_head_dim|qk_nope_head_dim|rope_head_dim)", 8),
    (r".*(v_head_dim)", 8),
    (r".*(kv_lora_rank|q_lora_rank|lora_rank)", 16),
    (r".*(head_dim|d_kv|attention_head_size|kv_channels|d_head|key_length)", 8),
    (r".*(num_key_value_heads|num_kv_heads|kv_heads)", lambda v: min(v, 2)),
    (r"(n_group|topk_group|n_groups|mamba_n_groups|num_expert_group)", 1),
    (r".*(num_attention_heads|num_heads|n_heads?|attention_heads|heads|nhead|n_head|encoder_heads)", lambda v: min(v, 4)),
    (r".*(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts)", lambda v: min(v, 2)),
    (r".*(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_experts_.*)", lambda v: min(v, 4)),
    (r".*(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|mlp_dim|feedforward_dim|ffn_hidden_size|ff_dim)", 64),
    (r"max_window_layers|first_k_dense_replace|num_hash_layers", lambda v: min(v, 1)),
    (r".*(num_.*layers|n_layers?|_layers|layers|num_blocks|num_stages_layers|depth)$", lambda v: min(v, LAYERS)),
    (
        r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|projection_dim|model_dim|embedding_dim|emb_dim|hidden_channels)",
        32,
    ),
    (r"(dim|width|hidden_channels|conv_dim|output_dim|out_hidden_size|cross_attention_dim)", 32),
    (r".*(image_size|img_size|input_size)", lambda v: 32 if v <= 64 or v % 14 else 28),
    (r".*(max_position_embeddings|n_positions|max_sequence_length|n_ctx|max_seq_len|max_source_positions)", 128),
    (r"max_target_positions", 128),
    (r".*(sliding_window|attention_chunk_size|window_length)", 8),
    (r"num_mel_bins|n_mels|feature_size", lambda v: min(v, 16)),
)
_LISTS: tuple[tuple[str, Any], ...] = (
    (r".*(depths|layer_depths|layers|num_blocks)$", lambda i, v: 1),
    (r".*(num_heads|num_attention_heads|num_kv_heads)$", lambda i, v: min(v, 2 ** min(i, 1))),
    (r".*(hidden_sizes|embed_dims|embed_dim|hidden_size|dims|neck_hidden_sizes)$", lambda i, v: 16 * 2 ** min(i, 2)),
    (r".*(conv_dim)$", lambda i, v: 32),
)
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "no_rope_layers", "no_rope_layer_types")
_TOKENS = re.compile(r".*(token_id|token_index|_token_idx|_id)$")


def shrink(config: Any, overrides: dict[str, Any] | None = None) -> Any:
    """The same kind of configuration, tiny. `overrides` names attributes by path: {"vision_config.depth": 1}."""
    _shrink(config, set())
    for path, value in (overrides or {}).items():
        *owners, name = path.split(".")
        owner = config
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return config


def _shrink(config: Any, seen: set[int]) -> None:
    if id(config) in seen:
        return
    seen.add(id(config))
    before = dict(vars(config))
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _shrink(value, seen)
            continue
        new = _new_value(name, value)
        if new is not value:
            try:
                setattr(config, name, new)
            except (AttributeError, NotImplementedError, ValueError, TypeError):
                continue  # a read-only name of another attribute
    _layer_lists(config)
    _agree(config, before)


def _agree(config: Any, before: dict[str, Any]) -> None:
    """Attributes that must fit each other."""

    def put(name: str, value: Any) -> None:
        if getattr(config, name, None) is not None and getattr(config, name) != value:
            with contextlib.suppress(AttributeError, ValueError, TypeError):
                setattr(config, name, value)

    for heads, pairs in (("num_attention_heads", "num_key_value_heads"), ("n_head", "n_head_kv"),
                         ("encoder_num_attention_heads", "encoder_num_key_value_heads"),
                         ("decoder_num_attention_heads", "decoder_num_key_value_heads")):  # fmt: skip
        if isinstance(before.get(heads), int) and before.get(heads) == before.get(pairs):
            put(pairs, getattr(config, heads))
    hidden = getattr(config, "hidden_size", None)
    if isinstance(getattr(config, "qk_rope_head_dim", None), int) and isinstance(
        getattr(config, "qk_nope_head_dim", None), int
    ):
        put("qk_head_dim", config.qk_rope_head_dim + config.qk_nope_head_dim)
    for expand, heads, dim in (("mamba_expand", "mamba_n_heads", "mamba_d_head"), ("expand", "num_heads", "head_dim"),
                               ("mamba_expand", "n_mamba_heads", "mamba_headdim")):  # fmt: skip
        if all(isinstance(getattr(config, n, None), int) for n in (expand, heads, dim)) and isinstance(hidden, int):
            put(dim, getattr(config, expand) * hidden // getattr(config, heads))
    if isinstance(getattr(config, "mamba_d_ssm", None), int):
        put("mamba_d_ssm", config.mamba_n_heads * config.mamba_d_head)
    _image(config)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(rope, dict):
        head = getattr(config, "head_dim", None) or (hidden or 32) // (getattr(config, "num_attention_heads", None) or 4)
        _sections(rope, int(head * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1)) // 2)


def _sections(rope: dict[str, Any], half: int) -> None:
    """Parts of a head for time, height and width."""
    for key, value in rope.items():
        if isinstance(value, dict):
            _sections(value, half)
        elif key == "mrope_section":
            rope[key] = [half - 2 * (half // 3), *[half // 3] * (len(value) - 1)] if len(value) == 3 else value


def _image(config: Any) -> None:
    """A picture of two patches a side, or what survives all the halvings of a pyramid."""
    patch = getattr(config, "patch_size", None)
    patch = patch if isinstance(patch, int) else 16
    pyramid = any(hasattr(config, n) for n in ("depths", "hidden_sizes", "embed_dims", "stage_channels"))
    if isinstance(getattr(config, "image_size", None), int):
        config.image_size = 64 if pyramid else max(2 * patch, 28)
        if not pyramid and config.image_size % patch:
            config.image_size = 2 * patch


def _new_value(name: str, value: Any) -> Any:
    if isinstance(value, bool) or name.startswith("_"):
        return value
    if isinstance(value, int):
        if _TOKENS.fullmatch(name):
            return value if 0 <= value < 100 else (value if value < 0 else 100 + value % 28)
        for pattern, rule in _RULES:
            if re.fullmatch(pattern, name):
                return rule(value) if callable(rule) else min(rule, value) if value > 0 else value
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        for pattern, rule in _LISTS:
            if re.fullmatch(pattern, name):
                return type(value)(rule(i, v) for i, v in enumerate(value))
    if name == "rope_parameters" and isinstance(value, dict):
        return value
    return value


def _layer_lists(config: Any) -> None:
    """Lists with an entry for each layer: the first of each kind, as many as there are layers now."""
    count = next((getattr(config, n) for n in ("num_hidden_layers", "num_layers", "n_layer") if hasattr(config, n)), None)
    if not isinstance(count, int):
        return
    for name in _LAYER_LISTS:
        value = getattr(config, name, None)
        if not isinstance(value, (list, tuple)) or len(value) <= count:
            continue
        kinds = list(dict.fromkeys(value))
        chosen = sorted((kinds + list(value))[:count], key=list(value).index) if kinds else []
        try:
            setattr(config, name, type(value)(chosen))
        except (AttributeError, ValueError, TypeError):
            continue


def without_cache(config: Any) -> None:
    """No key-value cache among the outputs."""
    for owner in nested(config):
        if hasattr(owner, "use_cache"):
            owner.use_cache = False


def nested(config: Any) -> list[Any]:
    """This configuration and all inside it."""
    found, queue = [], [config]
    while queue:
        current = queue.pop()
        if all(current is not other for other in found):
            found.append(current)
            queue += [v for v in vars(current).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    return found
