"""Small language models that generate, for the tests of `GenerationPlan`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from planner import Machine, plan
from planner.generation import GenerationPlan

# Copies take longer than the arithmetic.
SLOW = replace(Machine.preset("rtx-4090"), name="slow link", link_latency_seconds=1e-7, launch_seconds=1e-7, link_bandwidth=5e8)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def llama(**changed: Any) -> LlamaForCausalLM:
    """Grouped heads: two queries share a key."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **changed})).eval()
    model.generation_config.eos_token_id = None  # as long as was asked for
    return model


def mistral(window: int) -> MistralForCausalLM:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window)).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt(batch: int = 1, tokens: int = 10) -> torch.Tensor:
    """Ids int64[batch, tokens], none of them special."""
    return torch.randint(3, SMALL["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(1))


def planned(model: Any, budget: int | str, ids: torch.Tensor, device: str = "accounting", **call: Any) -> GenerationPlan:
    """A plan that only streams: searching tilings takes longer than all else here."""
    options = {key: call.pop(key) for key in ("allow", "allow_cast", "keep", "machine") if key in call}
    options.setdefault("allow", ("offload",))
    p = plan(model, budget, method="generate", inputs=(ids,), kwargs=call, device=device, **options)
    assert isinstance(p, GenerationPlan)
    return p
