"""Feed-forward and attention of long sequences, in tiles of tokens and queries: exact, in less than whole operators need."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn
from torch.nn import functional

from tests.properties.tiled import Subject, error_of, finish, normal, tile_counts

EXACT = 1e-12
LONG = 75_000  # tokens of a video, or of a picture of 4,400 pixels squared


def rotary(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.logspace(0, -4, width // 2, dtype=torch.float64)
    return angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1)


def flux(tokens: int) -> Subject:
    """A joint block: picture and text attend to each other, each has its own feed-forward."""
    text = min(64, tokens // 4)
    block = finish(FluxTransformerBlock(16, 2, 8))
    given = {
        "hidden_states": normal(1, tokens - text, 16), "encoder_hidden_states": normal(1, text, 16, seed=2),
        "temb": normal(1, 16, seed=3), "image_rotary_emb": rotary(tokens, 8),
    }  # fmt: skip
    return Subject(block, (), given)


def wan(tokens: int) -> Subject:
    """Attention of a video to itself and to a text, then the feed-forward."""
    block = finish(WanTransformerBlock(16, 48, 2, cross_attn_norm=True))
    tables = tuple(table[None, :, None] for table in rotary(tokens, 8))
    given = {
        "hidden_states": normal(1, tokens, 16), "encoder_hidden_states": normal(1, 32, 16, seed=2),
        "temb": normal(1, 6, 16, seed=3), "rotary_emb": tables,
    }  # fmt: skip
    return Subject(block, (), given)


class Scores(nn.Module):
    """Attention by hand, as older models have it, whose scores are by far the largest value."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return functional.softmax(scores, -1) @ v


BLOCKS: dict[str, Any] = {"flux": flux, "wan": wan}


@pytest.mark.parametrize("tokens", [1500, pytest.param(LONG, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_less_than_it_needs_whole(name: str, tokens: int) -> None:
    subject = BLOCKS[name](tokens)
    untiled = subject.plan(allow=("offload",))
    p = subject.plan(untiled.minimum_bytes * 6 // 7)
    assert tile_counts(p)
    assert error_of(subject.run(p), subject.whole()) <= EXACT


@pytest.mark.parametrize("tokens", [400, pytest.param(6000, marks=pytest.mark.slow)])
def test_scores_are_never_there_as_a_whole(tokens: int) -> None:
    q, k, v = (normal(1, 2, tokens, 8, seed=seed) for seed in (1, 2, 3))
    subject = Subject(Scores().eval(), (q, k, v))
    scores = 2 * tokens * tokens * 8
    p = subject.plan(scores // 4)
    assert subject.plan(allow=("offload",)).minimum_bytes > scores
    assert error_of(subject.run(p), subject.whole()) <= EXACT
