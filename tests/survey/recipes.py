"""Random inputs for a transformers model, by the names of its forward's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS = 2, 12


def candidates(model: nn.Module, extra: dict[str, Callable[[torch.Generator], Any]] | None = None) -> list[list[str]]:
    """Sets of arguments worth trying, most telling first."""
    parameters = inspect.signature(model.forward).parameters
    required = [
        n
        for n, p in parameters.items()
        if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    main = getattr(model, "main_input_name", "input_ids")
    base = [*required, *([main] if main in parameters and main not in required else [])]
    if not base:
        base = [next(iter(parameters))]
    out = [base]
    for more in (
        ["decoder_input_ids"],
        ["input_ids"],
        ["visual_feats", "visual_pos"],
        ["future_values", "future_time_features"],
        ["input_ids", "qformer_input_ids", "decoder_input_ids"],
        ["pixel_values"],
        ["input_ids", "pixel_values"],
        ["attention_mask"],
        ["decoder_input_ids", "attention_mask"],
        ["input_ids", "input_features"],
        ["bbox"],
    ):
        more = [m for m in more if m in parameters and m not in base]
        if more and [*base, *more] not in out:
            out.append([*base, *more])
    if "decoder_input_ids" in parameters and getattr(model.config, "is_encoder_decoder", False):
        out.sort(key=lambda names: "decoder_input_ids" not in names)
    return out


def make_inputs(model: nn.Module, names: list[str], seed: int) -> dict[str, Any]:
    """Values for these arguments: the same shapes for every seed."""
    g = torch.Generator().manual_seed(seed)
    kwargs = {name: _value(model.config, name, g, names) for name in names}
    return {k: v for k, v in kwargs.items() if v is not None}


def _find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes, here or in a nested configuration."""
    queue = [config]
    while queue:
        current = queue.pop(0)
        for name in names:
            value = getattr(current, name, None)
            if value is not None:
                return value
        queue += [v for v in vars(current).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    return default


def _side(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        return int(value.get("height", value.get("shortest_edge", 32))), int(value.get("width", value.get("shortest_edge", 32)))
    if isinstance(value, (list, tuple)):
        return int(value[-2]) if len(value) > 1 else int(value[0]), int(value[-1])
    return int(value), int(value)


def _value(config: Any, name: str, g: torch.Generator, asked: list[str]) -> Any:
    if name in ("input_ids", "decoder_input_ids", "text_input_ids", "q_input_ids"):
        vocab = _find(config, "vocab_size", default=99)
        return torch.randint(3, min(vocab, 99), (BATCH, TOKENS), generator=g)
    if name in ("attention_mask", "decoder_attention_mask"):
        return torch.ones(BATCH, TOKENS, dtype=torch.int64)
    if name in ("pixel_values", "pixel_values_videos", "pixel_values_images", "images", "pixel_values_low_res"):
        return _pixels(config, g)
    if name == "input_features":
        return _normal(g, BATCH, _find(config, "num_mel_bins", "n_mels", "feature_size", default=16), 256)
    if name in ("input_values", "audio_values", "input_audio"):
        channels = _find(config, "audio_channels") or (1 if _find(config, "codebook_size") else None)
        return _normal(g, BATCH, channels, 1920) if channels else _normal(g, BATCH, 1920)
    if name == "bbox":
        return torch.sort(torch.randint(0, 100, (BATCH, TOKENS, 4), generator=g))[0]
    if name == "hidden_states" and "grid_thw" in asked:
        patch, depth = _find(config, "patch_size", default=14), _find(config, "temporal_patch_size", default=1)
        channels = _find(config, "in_channels", "in_chans", "num_channels", default=3)
        return _normal(g, 16, channels * depth * patch * patch)
    if name in ("inputs_embeds", "hidden_states"):
        return _normal(g, BATCH, TOKENS, _find(config, "hidden_size", "d_model", default=32))
    if name in ("grid_thw", "image_grid_thw", "target_sizes"):
        return torch.tensor([[1, 4, 4]])
    if name == "noise_embeds":
        return _normal(g, BATCH, TOKENS, _find(config, "hidden_size", default=32))
    if name in ("query_embeds", "visual_feats"):
        return _normal(g, BATCH, 4, _find(config, "visual_feat_dim", "hidden_size", default=32))
    if name == "visual_pos":
        return torch.rand(BATCH, 4, 4, generator=g)
    if name == "qformer_input_ids":
        return torch.randint(3, 99, (BATCH, 4), generator=g)
    if name in ("past_values", "past_observed_mask", "future_values"):
        length = config.prediction_length if name == "future_values" else config.context_length + max(config.lags_sequence)
        return torch.ones(BATCH, length) if "mask" in name else _normal(g, BATCH, length)
    if name in ("past_time_features", "future_time_features"):
        length = (
            config.prediction_length if name == "future_time_features" else config.context_length + max(config.lags_sequence)
        )
        return _normal(g, BATCH, length, config.num_time_features)
    if name == "input_features_mask":
        return torch.ones(BATCH, 256, dtype=torch.bool)
    return None


def _pixels(config: Any, g: torch.Generator) -> Tensor:
    height, width = _side(_find(config, "image_size", "img_size", default=64))
    channels = _find(config, "num_channels", "in_channels", "in_chans", default=3)
    frames = _find(config, "num_frames")
    shape = (BATCH, frames, channels, height, width) if frames else (BATCH, channels, height, width)
    return _normal(g, *shape)


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)
