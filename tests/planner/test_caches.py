"""Key-value caches and VAE distributions among the outputs of a planned module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import BartConfig, BartModel, DynamicCache, LlamaConfig, LlamaModel, MistralConfig, MistralModel
from transformers.cache_utils import EncoderDecoderCache

from planner import plan
from runtime.errors import PlannerError

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _tokens() -> Tensor:
    return torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(0))


def _half(module: Any, method: str = "forward", **kwargs: Any) -> tuple[Any, Any]:
    """What eager gives and what a plan in half of the memory gives; the measured peak is the predicted one."""
    with torch.no_grad():
        wanted = getattr(module, method)(**kwargs)
    whole = plan(module, "1GB", kwargs=kwargs, method=method, device="accounting")
    made = whole.replan(max(whole.minimum_bytes, whole.unplanned_bytes // 2))
    built = made.build()
    found = getattr(built, method)(**kwargs)
    assert built.report().peak_bytes == made.peak_bytes
    return wanted, found


def _same(wanted: Any, found: Any) -> bool:
    """Every attribute of every layer."""
    pairs = zip(wanted.layers, found.layers, strict=True)
    for a, b in pairs:
        assert type(a) is type(b)
        assert vars(a).keys() == vars(b).keys()
        for name, value in vars(a).items():
            other = vars(b)[name]
            if not (torch.equal(value, other) if isinstance(value, Tensor) else value == other):
                return False
    return True


def test_a_cache_among_the_outputs() -> None:
    module = LlamaModel(LlamaConfig(**_SMALL)).eval()
    wanted, found = _half(module, input_ids=_tokens())
    assert torch.equal(wanted.last_hidden_state, found.last_hidden_state)
    assert isinstance(found.past_key_values, DynamicCache)
    assert _same(wanted.past_key_values, found.past_key_values)
    assert found.past_key_values.get_seq_length() == 6


def test_a_sliding_window() -> None:
    wanted, found = _half(MistralModel(MistralConfig(**_SMALL, sliding_window=4)).eval(), input_ids=_tokens())
    assert _same(wanted.past_key_values, found.past_key_values)


def test_a_returned_cache_goes_on_in_eager() -> None:
    module = LlamaModel(LlamaConfig(**_SMALL)).eval()
    wanted, found = _half(module, input_ids=_tokens())
    with torch.no_grad():
        ahead = [module(_tokens()[:, :1], past_key_values=out.past_key_values).last_hidden_state for out in (wanted, found)]
    assert torch.equal(*ahead)


def test_caches_of_encoder_and_decoder() -> None:
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=16,
    )  # fmt: skip
    wanted, found = _half(BartModel(config).eval(), input_ids=_tokens(), decoder_input_ids=_tokens())
    assert isinstance(found.past_key_values, EncoderDecoderCache)
    assert found.past_key_values.is_updated == wanted.past_key_values.is_updated
    assert _same(wanted.past_key_values.self_attention_cache, found.past_key_values.self_attention_cache)
    assert _same(wanted.past_key_values.cross_attention_cache, found.past_key_values.cross_attention_cache)


def test_a_cache_that_is_passed_in() -> None:
    module = LlamaModel(LlamaConfig(**_SMALL)).eval()
    with pytest.raises(PlannerError, match=r"a DynamicCache, which the model grows .*past_key_values=None"):
        plan(module, "1GB", kwargs={"input_ids": _tokens(), "past_key_values": DynamicCache()}, device="accounting")


def test_the_distribution_of_a_vae() -> None:
    module = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    wanted, found = _half(module, "encode", x=torch.randn(1, 3, 8, 8))
    a, b = wanted.latent_dist, found.latent_dist
    assert type(a) is type(b)
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("parameters", "mean", "logvar", "std", "var"))
    assert torch.equal(a.sample(torch.Generator().manual_seed(1)), b.sample(torch.Generator().manual_seed(1)))
