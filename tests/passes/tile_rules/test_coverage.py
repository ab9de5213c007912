"""The operators of these families that real captures contain have rules, and the rules understand their calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import WanTransformer3DModel

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.probe import call_of
from passes.program import operator_name
from passes.tile_rules import Part, TileCall, Untileable, tile
from passes.tile_rules.base import rule_of
from planner.capture import capture
from tests.zoo import Example, bert, flux, llama, t5_encoder, unet, vae_decoder

# Of other families than those that are tested here: products, attention, convolutions, resampling, views; and what writes.
OTHERS = {
    "add_.Tensor", "cat", "chunk", "conv2d", "conv3d", "copy_", "expand", "flatten.using_ints", "linear", "matmul", "outer",
    "permute", "reshape", "split_with_sizes", "scaled_dot_product_attention", "select.int", "slice.Tensor", "stack",
    "transpose.int", "unbind.int", "unflatten.int", "unsqueeze", "upsample_nearest2d.vec", "view",
}  # fmt: skip
REASONS = ("normalises over", "accumulates over", "reduces over", "needs statistics over all", "puts something to the ends")


def wan() -> Example:
    module = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    states = {"hidden_states": torch.randn(1, 4, 2, 16, 16), "encoder_hidden_states": torch.randn(1, 12, 16)}
    return module.eval(), (), {**states, "timestep": torch.tensor([5]), "return_dict": False}


@pytest.mark.parametrize("example", [bert, flux, llama, t5_encoder, unet, vae_decoder, wan], ids=lambda f: f.__name__)
def test_captures_are_covered(example: Callable[[], Example]) -> None:
    module, args, kwargs = example()
    program = run_passes(capture(module, args, kwargs), CANONICALISE)
    found = 0
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = operator_name(node.target).removeprefix("aten.").removesuffix(".default")
        if name in OTHERS:
            continue
        assert rule_of(node.target) is not None, name
        call = call_of(node)
        reasons = refusals(TileCall(node.target, call.args, call.kwargs, call.outputs))
        assert all(reason.startswith(REASONS) for reason in reasons), f"{name}: {reasons}"
        assert len(reasons) < len(call.outputs[0].shape) or not call.outputs[0].shape, name
        found += 1
    assert found > 10


def refusals(call: TileCall) -> list[str]:
    """Why the first half of the first result cannot be had, for each dimension for which that is so."""
    reasons = []
    for dim, size in enumerate(call.outputs[0].shape):
        try:
            tile(call, Part(dim, 0, -(-size // 2)), *[None] * (len(call.outputs) - 1))
        except Untileable as refusal:
            reasons.append(str(refusal))
    return reasons
