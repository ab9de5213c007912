"""What attention takes in a tile on CUDA: of its kernels some copy all keys and values, however few the queries are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from passes.attention_workspace import attention_bytes
from passes.op_call import OpCall
from passes.spec import TensorSpec
from passes.tile_rules import Part, TileCall

_NAMES = ("query", "key", "value", "attn_mask")


def attention_tile_bytes(call: TileCall, needs: Sequence[Part | None], part: Part, capability: tuple[int, int] | None) -> int:
    """Workspace bytes of the part of a `scaled_dot_product_attention` that needs those parts of its tensors.

    A tile may take another kernel than the whole: of a causal one those behind the first tile have a mask
    (`passes.tile_rules.attention`), and the last of them looks at all keys; that is what is given.

    Raises:
        UnknownSize: there is no compute capability.
    """
    cut = dict(zip(_NAMES, (_part_of(s, need) for s, need in zip(call.tensors, needs, strict=True)), strict=False))
    causal, made = bool(call.arg("is_causal")), 0
    if causal and part.dim == len(call.output.shape) - 2 and part.size < call.output.shape[part.dim]:
        causal = False
        cut["key"], cut["value"] = call.tensors[1:3]
        rows, columns = cut["query"].shape[-2], cut["key"].shape[-2]
        cut["attn_mask"] = TensorSpec((rows, columns), (columns, 1), torch.bool)
        made = 2 * rows * columns  # ones, of which a triangle is kept
    kwargs: dict[str, Any] = {"is_causal": causal, "enable_gqa": bool(call.arg("enable_gqa"))}
    output = _part_of(call.output, part)
    return made + attention_bytes(OpCall(call.target, (), {**cut, **kwargs}, (output,), capability))


def _part_of(spec: TensorSpec, part: Part | None) -> TensorSpec:
    if part is None:
        return spec
    shape = tuple(part.size if dim == part.dim else size for dim, size in enumerate(spec.shape))
    stride = spec.stride
    if spec.stride == tuple(prod(spec.shape[dim + 1 :]) for dim in range(len(spec.shape))):
        stride = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))  # made in the tile, most likely
    return replace(spec, shape=shape, stride=stride)
