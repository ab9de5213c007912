"""Operator calls on specs: shared by the tests of declared workspaces and of the choice of attention kernels."""

from __future__ import annotations

import torch

from passes.op_call import OpCall
from passes.spec import TensorSpec
from passes.workspace import workspace_bytes

MIB = 2**20
F16, BF16, F32, F64, BOOL = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool
ADA, TURING, HOPPER = (8, 9), (7, 5), (9, 0)


def spec(*shape: int, dtype: torch.dtype = F32, stride: tuple[int, ...] | None = None, offset: int = 0) -> TensorSpec:
    """A contiguous spec unless `stride` says otherwise."""
    return TensorSpec(shape, stride or torch.empty(shape, device="meta").stride(), dtype, offset)


def nhwc(*shape: int, dtype: torch.dtype = F32) -> TensorSpec:
    return spec(*shape, dtype=dtype, stride=torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride())


def cuda(target: object, *args: object, out: tuple[TensorSpec, ...] = (), **kwargs: object) -> int | None:
    return workspace_bytes("cuda", OpCall(target, args, kwargs, out, ADA))


def sdpa(
    q: TensorSpec,
    k: TensorSpec | None = None,
    v: TensorSpec | None = None,
    mask: TensorSpec | None = None,
    gpu: tuple[int, int] | None = ADA,
    **kwargs: object,
) -> OpCall:
    k = k or q
    v = v or k
    out = spec(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    return OpCall(torch.ops.aten.scaled_dot_product_attention.default, (q, k, v, mask), kwargs, (out,), gpu)


def rounded(*sizes: int) -> int:
    return sum((size + 511) // 512 * 512 for size in sizes)
