"""Bytes that `scaled_dot_product_attention` allocates on CUDA beyond its output, for each of its kernels.

Which kernel a call takes is `passes.attention_backend`'s to say. Sources are files of PyTorch 2.13, `ATen/` being
`aten/src/ATen/native/`. No CUDA run has confirmed any of these figures yet: they were read in the source. Inference only:
nothing is kept for a backward pass.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch

from passes.attention_backend import attention_backend
from passes.op_call import HALF, OpCall, arg, capability_of, collapses, maybe_tensor_arg, rounded_sum, tensor_arg
from passes.spec import TensorSpec
from runtime.layout import align

ATTENTION_SOURCE = (
    "ATen/transformers/attention.cpp, cuda/attention.cu, cuda/sdp_utils.cpp, cuda/flash_attn/flash_api.cpp, "
    "cuda/mem_eff_attention/kernel_forward.h"
)

_MULTIPROCESSORS = {
    (8, 0): 108, (8, 6): 84, (8, 7): 16, (8, 9): 142, (9, 0): 132,
    (10, 0): 148, (10, 3): 160, (12, 0): 188, (12, 1): 48,
}  # fmt: skip
"""Multiprocessors of the largest chip of each compute capability (NVIDIA's data sheets)."""
_MOST_MULTIPROCESSORS = 192


def _qkv(call: OpCall) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    return tensor_arg(call, 0, "query"), tensor_arg(call, 1, "key"), tensor_arg(call, 2, "value")


@lru_cache(maxsize=4096)
def flash_splits(blocks: int, key_blocks: int, multiprocessors: int) -> int:
    """Into how many parts flash attention cuts the keys; `blocks` is batch x heads x blocks of 64 queries.

    The fewest parts whose last wave of blocks is nearly (85 %) as full as the best number of parts would have it; one
    if the blocks fill four fifths of the GPU already. Source: `num_splits_heuristic`,
    `ATen/transformers/cuda/flash_attn/flash_api.cpp`.
    """
    slots = 2 * multiprocessors
    if blocks >= 0.8 * slots:
        return 1
    filled: dict[int, float] = {}
    length = 0
    for parts in range(1, min(128, slots, key_blocks) + 1):
        previous, length = length, -(-key_blocks // parts)
        if length != previous:  # otherwise the same as one part fewer, and the last one empty
            waves = blocks * parts / slots
            filled[parts] = waves / -(-blocks * parts // slots)
    best = max(filled.values())
    return next(parts for parts, fill in filled.items() if fill >= 0.85 * best)


def _flash_bytes(call: OpCall) -> int:
    """Log-sum-exp 4·B·H·Sq, two random-state words, padded copies, and the partial results of split keys.

    A head dim that is not a multiple of 8 makes the output a view of a padded one; the padding of the output is counted
    here, but lives as long as the output does.
    """
    q, k, v = _qkv(call)
    batch, heads, queries, dim = q.shape
    padded = align(max(dim, v.shape[3]), 8)
    size = 4 * batch * heads * queries
    total = rounded_sum(size, 16, 8)
    if padded != dim:
        total += rounded_sum(*(each.numel // dim * padded * each.dtype.itemsize for each in (q, k, v)))
        total += rounded_sum(q.numel // dim * padded * q.dtype.itemsize) - rounded_sum(q.nbytes)
    if queries == 1 and heads > k.shape[1]:  # the groups of heads take the place of the queries
        queries, heads = heads // k.shape[1], k.shape[1]
        total += rounded_sum(q.nbytes, q.nbytes)
    key_rows = 256 if padded <= 64 else 128 if padded <= 128 else 64
    multiprocessors = _MULTIPROCESSORS.get(capability_of(call), _MOST_MULTIPROCESSORS)
    parts = flash_splits(batch * heads * -(-queries // 64), -(-k.shape[2] // key_rows), multiprocessors)
    if parts > 1:
        total += rounded_sum(parts * size, parts * size * align(padded, 32 if padded <= 128 else 64))
    return total


def _mask_bytes(mask: TensorSpec | None, dtype: torch.dtype) -> tuple[int, int]:
    """(most bytes while a mask is made ready, bytes that stay): bool becomes numbers, rows are padded to eights."""
    if mask is None:
        return 0, 0
    stays = peak = 0
    if mask.dtype == torch.bool:
        stays = rounded_sum(mask.numel * dtype.itemsize)
        peak = stays + rounded_sum(mask.numel, 1)  # the inverted mask and a scalar
        aligned = mask.shape[-1] % 8 == 0
    else:
        aligned = mask.stride[-1] == 1 and all(stride % 8 == 0 for stride in mask.stride[:-1])
    if not aligned:
        itemsize = dtype.itemsize if mask.dtype == torch.bool else mask.dtype.itemsize
        columns = mask.shape[-1]
        padded = rounded_sum(mask.numel // max(1, columns) * (columns // 8 + 1) * 8 * itemsize)
        peak, stays = max(peak, stays + padded), padded
    return peak, stays


def _efficient_bytes(call: OpCall) -> int:
    """The mask, and for half precision with values wider than 128 an fp32 accumulator of the output's shape."""
    q, _, v = _qkv(call)
    peak, stays = _mask_bytes(maybe_tensor_arg(call, 3, "attn_mask"), q.dtype)
    wide = q.dtype in HALF and v.shape[3] > 128
    return max(peak, stays + (rounded_sum(4 * prod(q.shape[:3]) * v.shape[3]) if wide else 0))


def _cudnn_bytes(call: OpCall) -> int:
    """What flash would take, plus the mask: without gradients cuDNN keeps no statistics, and its plan is small."""
    peak, stays = _mask_bytes(maybe_tensor_arg(call, 3, "attn_mask"), tensor_arg(call, 0, "query").dtype)
    return max(peak, stays + _flash_bytes(call))


def _math_bytes(call: OpCall) -> int:
    """Fp32 copies of half q, k and v; scaled q and k; up to 3 1/4 score matrices (softmax, its test for empty rows)."""
    q, k, v = _qkv(call)
    acc = max(4, q.dtype.itemsize)
    upcast = q.dtype in HALF
    rows, columns = q.shape[-2], k.shape[-2]
    (out,) = call.outputs
    batch = prod(out.shape[:-2])
    scores = batch * rows * columns
    keys, values = batch * columns * k.shape[-1] * acc, batch * columns * v.shape[-1] * acc
    base = rounded_sum(q.numel * acc) + (rounded_sum(*(each.numel * acc for each in (q, k, v))) if upcast else 0)
    if k.shape[:-2] != q.shape[:-2]:
        base += rounded_sum(keys, values)  # grouped heads repeated, or broadcast batches
    mask = maybe_tensor_arg(call, 3, "attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        base += rounded_sum(mask.numel * q.dtype.itemsize, mask.numel, 1)
    if arg(call, 5, "is_causal", False):
        base += rounded_sum(rows * columns, rows * columns, acc * rows * columns)
    ready = all(collapses(each.shape[:-2], each.stride[:-2]) for each in (q, k))
    score = rounded_sum(scores * acc, keys) + (0 if ready else rounded_sum(q.numel * acc, keys))
    softmax = rounded_sum(scores * acc, scores * acc, scores * acc, scores, batch * rows)
    last = rounded_sum(scores * acc) + (0 if collapses(v.shape[:-2], v.stride[:-2]) else rounded_sum(values))
    if upcast:
        last += rounded_sum(out.numel * acc, scores * q.dtype.itemsize)
    return base + max(score, softmax, last)


_BYTES = {"cudnn": _cudnn_bytes, "flash": _flash_bytes, "efficient": _efficient_bytes, "math": _math_bytes}


def attention_bytes(call: OpCall) -> int:
    """Bytes beyond the output of the kernel that the call takes, each buffer rounded.

    Raises:
        UnknownSize: the call does not say the compute capability, or an argument is no tensor of known size.
    """
    return _BYTES[attention_backend(call)](call)
