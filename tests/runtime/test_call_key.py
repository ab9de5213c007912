"""Which calls of a pipeline are one plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from runtime.call_key import call_key, named_call


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "a cat"}, {"prompt": "a dog that runs"}),
        ({"prompt": ["a", "b"]}, {"prompt": ["c", "d"]}),
        ({"height": 8}, {"height": 8, "generator": torch.Generator(), "callback_on_step_end": print, "latents": None}),
        ({"image": Image.new("RGB", (8, 8))}, {"image": Image.new("RGB", (8, 8), "red")}),
        ({"x": torch.zeros(2)}, {"x": torch.ones(2)}),
    ],
    ids=["words", "as many words", "what makes no difference", "a picture's values", "a tensor's values"],
)
def test_the_same_plan(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert call_key(one) == call_key(other)
    assert hash(call_key(one)) == hash(call_key(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "a"}, {"prompt": ["a", "b"]}),
        ({"height": 8}, {"height": 16}),
        ({"guidance_scale": 1.0}, {"guidance_scale": 2.0}),
        ({"output_type": "pt"}, {"output_type": "latent"}),
        ({"image": Image.new("RGB", (8, 8))}, {"image": Image.new("RGB", (8, 9))}),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2, dtype=torch.float64)}),
        ({"kw": {"scale": 0.5}}, {"kw": {"scale": 0.25}}),
    ],
    ids=["another number of words", "a size", "a scale", "a mode", "a picture's size", "a dtype", "within a mapping"],
)
def test_other_plans(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert call_key(one) != call_key(other)


def test_words_count_where_they_must() -> None:
    assert call_key({"prompt": "a"}, exact=True) != call_key({"prompt": "b"}, exact=True)


def test_arguments_by_name() -> None:
    def call(prompt: str, height: int = 8, **more: Any) -> None: ...

    assert named_call(call, ("a",), {"width": 2}) == {"prompt": "a", "width": 2}
    assert named_call(call, (), {"width": 2}) == {"width": 2}  # the call itself says what is missing
