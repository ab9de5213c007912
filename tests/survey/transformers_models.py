"""transformers' architectures: every base model of `MODEL_MAPPING_NAMES` whose tiny configuration builds and runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from tests.survey.recipes import candidates, make_inputs
from tests.survey.run import Case, Subject
from tests.survey.shrink import shrink, without_cache

LARGEST = 30_000_000
# What names alone do not tell: attributes of the configuration, by model type.
_RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": lambda: transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    ),
}
_LAST = {
    **_RESNET,
    "backbone_config": lambda: transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1], out_features=["stage4"]
    ),
}
_SERIES = {"prediction_length": 4, "context_length": 8, "num_time_features": 2, "lags_sequence": [1, 2]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "detr": _LAST,
    "conditional_detr": _LAST,
    "dab-detr": _LAST,
    "table-transformer": _LAST,
    "deformable_detr": _RESNET,
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": 99, "pad_token_id": 1, "position_embedding_type": "rotary"},
    "flaubert": {"n_layers": 2},
    "xlm": {"n_layers": 2},
    "bit": {"num_groups": 4},
    "mobilebert": {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "levit": {"key_dim": [8, 8, 8]},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "convbert": {"embedding_size": 32},
    "nemotron": {"num_key_value_heads": 4},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
}


# Language models with their head and their cache among the outputs, besides the base models without.
WITH_CACHE = (
    "bart",
    "bloom",
    "cohere2",
    "deepseek_v3",
    "falcon",
    "falcon_mamba",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "llama",
    "llama4_text",
    "mamba",
    "mamba2",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "smollm3",
    "stablelm",
    "starcoder2",
    "t5",
    "whisper",
    "xlstm",
)


def cases() -> list[Case]:
    """One case for each model type, and for some one more with cache."""
    transformers.logging.set_verbosity_error()
    plain = [Case(kind, "transformers", functools.partial(make, kind)) for kind in MODEL_MAPPING_NAMES]
    return plain + [Case(f"{kind}+cache", "transformers", functools.partial(make, kind, True)) for kind in WITH_CACHE]


def _class(kind: str, head: bool) -> Any:
    names: Any = MODEL_MAPPING_NAMES[kind]
    if head:
        names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(kind) or names
    return getattr(transformers, names if isinstance(names, str) else names[0])


def make(kind: str, use_cache: bool = False) -> Subject:
    """The tiny model of this type with the first set of arguments that it takes.

    With `use_cache` the language model with its head, whose outputs hold the keys and values.

    Raises:
        whatever building or running it raises.
    """
    cls = _class(kind, use_cache)
    overrides = {name: value() if callable(value) else value for name, value in OVERRIDES.get(kind, {}).items()}
    config = shrink(CONFIG_MAPPING[kind](), overrides)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters, not tiny: its configuration needs overrides")
    module = redraw(cls(config).eval())
    if not use_cache:
        for child in module.modules():
            if hasattr(child, "config"):
                without_cache(child.config)
    return Subject(module, _inputs(module))


def redraw(module: nn.Module) -> nn.Module:
    """Adds noise to every weight: libraries start biases at zero and norms at one, which would hide a lost weight."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dtype.is_floating_point:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.02)
    return module


def _inputs(module: nn.Module) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Tensor]]]:
    first: Exception | None = None
    for names in candidates(module):
        try:
            with torch.no_grad():
                module(**make_inputs(module, names, 1))
        except Exception as error:  # noqa: BLE001 - a guess at the arguments that the model refuses in its own way
            first = first or error
            continue
        return lambda seed, names=names: ((), make_inputs(module, names, seed))
    assert first is not None
    raise first
