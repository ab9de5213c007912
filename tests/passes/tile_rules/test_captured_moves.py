"""What real models say of views and moved elements: every such call of theirs is tiled, or refused with a reason."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from passes.program import tensors_of
from passes.tile_rules import Part, Untileable
from passes.tile_rules.base import RULES
from planner.capture import capture
from tests.passes.tile_rules.harness import check_tiles
from tests.passes.tile_rules.moves import check_parts
from tests.survey.diffusers_autoencoders import AUTOENCODERS
from tests.survey.diffusers_images import IMAGES
from tests.survey.diffusers_models import make

MODELS = [
    pytest.param("AutoencoderDC.decode", marks=pytest.mark.slow),
    pytest.param("AutoencoderKLCogVideoX.decode", marks=pytest.mark.slow),
    "AutoencoderKLWan.decode",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
]
MOVES = {
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel",
    "permute", "transpose", "t", "numpy_T", "mT", "movedim", "moveaxis", "swapaxes", "swapdims", "squeeze", "unsqueeze",
    "expand", "expand_as", "broadcast_to", "broadcast_tensors", "repeat", "tile", "view_as_real", "view_as_complex",
    "real", "imag", "slice", "narrow", "select", "split", "split_with_sizes", "chunk", "unbind", "tensor_split",
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "pad", "constant_pad_nd",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold",
}  # fmt: skip


@functools.cache
def moves_of(name: str) -> dict[str, tuple[fx.Node, tuple[Any, ...], dict[str, Any]]]:
    """The calls of a model that only move elements, one of each kind: the node and its arguments with their fake tensors."""
    subject = make(next(entry for entry in (*AUTOENCODERS, *IMAGES) if entry.name == name))
    args, kwargs = subject.inputs(1)
    if name == "AutoencoderKLWan.decode":  # counts its convolutions as it runs; its decoder without a cache does not
        program = capture(subject.module.decoder, (kwargs["z"],))
    else:
        program = capture(subject.module, args, kwargs, subject.method)
    found: dict[str, tuple[fx.Node, tuple[Any, ...], dict[str, Any]]] = {}
    for node in program.ops():
        if getattr(node.target, "_overloadpacket", None) and node.target._schema.name.removeprefix("aten::") in MOVES:
            args_, kwargs_ = tree_map_only(fx.Node, lambda n: n.meta["val"], (tuple(node.args), dict(node.kwargs)))
            found.setdefault(repr((node.target, args_, kwargs_)), (node, args_, kwargs_))
    return found


def real(fake: torch.Tensor) -> torch.Tensor:
    """Random values of the same shape, strides and type."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(fake.shape, fake.stride(), strict=True))
    values = torch.randint(-9, 9, (span,)).to(fake.dtype)
    return values.as_strided(fake.shape, fake.stride())


@pytest.mark.parametrize("name", MODELS)
def test_every_call_is_tiled_or_refused(name: str) -> None:
    tiled = 0
    for node, args, kwargs in moves_of(name).values():
        assert node.target in RULES, f"{name}: no rule for {node.target}"
        outputs = tensors_of(node)
        args, kwargs = tree_map_only(torch.Tensor, real, (args, kwargs))
        for dim, size in enumerate(outputs[0].shape):
            for start, stop in ((0, (size + 1) // 2), (size // 2, size), (size // 3, size // 3 + 1)):
                try:
                    if any(isinstance(t, torch.Tensor) and t.is_complex() for t in (*args, *outputs)):  # has no numbers
                        check_tiles(node.target, args, dim, [start, stop], kwargs)
                    else:
                        check_parts(node.target, args, [Part(dim, start, stop)] + [None] * (len(outputs) - 1), kwargs)
                    tiled += 1
                except Untileable:
                    pass
    assert tiled
