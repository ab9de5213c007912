"""Which kernel `scaled_dot_product_attention` takes on CUDA: cuDNN's, flash, memory-efficient, or single operators (math).

PyTorch goes through its kernels in order and takes the first that does not refuse the call. What each of them asks is declared
here, one condition a line, with the function of PyTorch 2.13 that checks it: `ATen/native/transformers/cuda/sdp_utils.cpp` and
`ATen/native/transformers/sdp_utils_cpp.h` (its dense checks). Default settings (no kernel switched off, nothing deterministic),
no gradients, no nested tensors, NVIDIA. Read in the source: no CUDA run has confirmed a condition until it says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from passes.op_call import HALF, OpCall, arg, capability_of, maybe_tensor_arg, tensor_arg
from passes.spec import TensorSpec

Backend = Literal["cudnn", "flash", "efficient", "math"]
_OLDEST, _NEWEST = (8, 0), (12, 1)


@dataclass(frozen=True)
class AttentionCall:
    """What the choice depends on. Shapes `[batch, heads, tokens, dim]`; `capability` is that of the GPU."""

    q: TensorSpec
    k: TensorSpec
    v: TensorSpec
    mask: TensorSpec | None
    causal: bool
    grouped: bool
    dropout: float
    capability: tuple[int, int]

    @staticmethod
    def of(call: OpCall) -> AttentionCall:
        """Reads a call of `aten.scaled_dot_product_attention.default`.

        Raises:
            UnknownSize: the call does not say the compute capability, or an argument is no tensor of known size.
        """
        q, k, v = (tensor_arg(call, index, name) for index, name in enumerate(("query", "key", "value")))
        mask = maybe_tensor_arg(call, 3, "attn_mask")
        causal, grouped = bool(arg(call, 5, "is_causal", False)), bool(arg(call, 7, "enable_gqa", False))
        dropout = arg(call, 4, "dropout_p", 0.0)
        assert isinstance(dropout, (int, float))
        return AttentionCall(q, k, v, mask, causal, grouped, float(dropout), capability_of(call))

    @property
    def qkv(self) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
        return self.q, self.k, self.v

    @property
    def same_heads(self) -> bool:
        return self.q.shape[1] == self.k.shape[1] == self.v.shape[1]

    @property
    def alignment(self) -> int:
        """Elements of which the memory-efficient kernel wants whole multiples (`minimum_gemm_alignment`)."""
        tensor_cores = self.capability >= (8, 0) or (self.capability >= (7, 0) and self.q.dtype in HALF)
        return 16 // self.q.dtype.itemsize if tensor_cores else 1


@dataclass(frozen=True)
class Condition:
    """What a kernel asks, in words that follow `it takes`; the check in PyTorch's source; whether a CUDA run confirmed it."""

    text: str
    check: str
    holds: Callable[[AttentionCall], bool]
    confirmed: bool = False


def _mask_fits_cudnn(call: AttentionCall) -> bool:
    if call.mask is None:
        return True
    whole = (*call.q.shape[:3], call.k.shape[2])
    shape = call.mask.shape
    wanted = whole if len(shape) == 4 else whole[2:]
    return len(shape) in (2, 4) and all(n in (1, full) for n, full in zip(shape, wanted, strict=True))


def _heads_divide(call: AttentionCall) -> bool:
    return call.grouped and call.k.shape[1] == call.v.shape[1] and call.q.shape[1] % call.k.shape[1] == 0


def _dims_fit_cudnn(call: AttentionCall) -> bool:
    """Newer cuDNN takes up to 256 on Hopper; it is then counted as flash, whose bytes are the same here."""
    dim, value_dim = call.q.shape[3], call.v.shape[3]
    return (max(dim, value_dim) <= 128 or (dim, value_dim) == (192, 128)) and dim % 8 == value_dim % 8 == 0


_ALL = (
    Condition(
        "four dimensions [batch, heads, tokens, dim]", "check_tensor_shapes", lambda c: all(len(x.shape) == 4 for x in c.qkv)
    ),
    Condition("no empty tensors", "check_nonzero_sequence_lengths_dense", lambda c: all(x.numel for x in c.qkv)),
    Condition("one dtype of q, k and v", "check_tensor_dtype", lambda c: c.q.dtype == c.k.dtype == c.v.dtype),
    Condition(
        "one batch size",
        "check_batch_size_and_num_heads_dense",
        lambda c: c.q.shape[0] == c.k.shape[0] == c.v.shape[0],
    ),
    Condition(
        "masks whose last dimension is dense",
        "check_last_dim_stride_equals_1_dense",
        lambda c: c.mask is None or c.mask.stride[-1:] in ((), (1,)),
    ),
)
_HALVES = (
    Condition("float16 and bfloat16", "check_dtypes_low_precision", lambda c: c.q.dtype in HALF),
    Condition(
        "compute capabilities 8.0 to 12.1",
        "check_flash_attention_hardware_support, check_cudnn_hardware_support",
        lambda c: _OLDEST <= c.capability <= _NEWEST,
    ),
    Condition(
        "as many heads of k and v as of q, or a divisor of that with enable_gqa",
        "check_batch_size_and_num_heads_dense",
        lambda c: c.same_heads or _heads_divide(c),
    ),
    Condition(
        "dense rows of q, k and v",
        "check_last_dim_stride_equals_1_dense",
        lambda c: all(x.stride[3] == 1 or x.shape[3] == 1 for x in c.qkv),
    ),
)

# In the order in which PyTorch asks them (`priority_order`).
CONDITIONS: dict[Backend, tuple[Condition, ...]] = {
    "cudnn": (
        Condition(
            "compute capabilities 9.x and 10.x first, where cuDNN is newer than 9.15.1 (that of the wheels is taken to be)",
            "check_prefer_cudnn_attention",
            lambda c: c.capability[0] in (9, 10),
        ),
        *_ALL,
        *_HALVES,
        Condition("masks of two or four dimensions that fit the scores", "check_attn_mask_shape", _mask_fits_cudnn),
        Condition("dropout of whole sixteenths", "check_cudnn_dropout", lambda c: (16 * c.dropout).is_integer()),
        Condition(
            "head dims of at most 128, or 192 with 128 of v, all multiples of 8", "check_cudnn_tensor_shapes", _dims_fit_cudnn
        ),
        Condition("more than one key", "check_cudnn_tensor_shapes", lambda c: c.k.shape[2] != 1),
    ),
    "flash": (
        *_ALL,
        *_HALVES,
        Condition("no mask", "check_for_attn_mask", lambda c: c.mask is None),
        Condition(
            "one head dim of at most 256",
            "check_head_dim_size_flash",
            lambda c: c.q.shape[3] == c.k.shape[3] == c.v.shape[3] <= 256,
        ),
        Condition(
            "as many queries as keys where it is causal",
            "check_flash_causal_non_square_seqlens",
            lambda c: not c.causal or c.q.shape[2] == c.k.shape[2],
        ),
    ),
    "efficient": (
        *_ALL,
        Condition(
            "float16, float32 and, from compute capability 8.0 on, bfloat16",
            "can_use_mem_efficient_attention",
            lambda c: c.q.dtype in (torch.float16, torch.float32, *((torch.bfloat16,) if c.capability >= (8, 0) else ())),
        ),
        Condition(
            "compute capabilities 5.0 to 12.1",
            "check_mem_efficient_hardware_support",
            lambda c: (5, 0) <= c.capability <= _NEWEST,
        ),
        # Newer sources give it grouped heads too; math takes more.
        Condition("as many heads of k and v as of q", "check_batch_size_and_num_heads_dense", lambda c: c.same_heads),
        Condition(
            "dense rows of q, k and v", "check_last_dim_stride_equals_1_dense", lambda c: all(x.stride[3] == 1 for x in c.qkv)
        ),
        Condition(
            "head dims of whole 16 B from compute capability 8.0 on, and for half precision from 7.0 on",
            "check_head_dim_size_mem_efficient",
            lambda c: c.q.shape[3] == c.k.shape[3] and c.q.shape[3] % c.alignment == c.v.shape[3] % c.alignment == 0,
        ),
        Condition(
            "q, k and v that begin at whole 16 B, from compute capability 8.0 on",
            "check_data_ptr_alignment_mem_efficient",
            lambda c: c.capability < (8, 0) or all(x.offset % c.alignment == 0 for x in c.qkv),
        ),
    ),
    "math": (),
}


def attention_backend(call: OpCall) -> Backend:
    """The kernel that a call of `scaled_dot_product_attention` takes on CUDA.

    Where cuDNN is older than PyTorch wants it to be, the next in line takes the call; its bytes are no more than those declared
    for cuDNN (but for a mask and grouped heads at once).

    Raises:
        UnknownSize: the call does not say the compute capability, or an argument is no tensor of known size.
    """
    seen = AttentionCall.of(call)
    return next(backend for backend in CONDITIONS if _refusal(backend, seen) is None)


def why_not(call: OpCall) -> dict[Backend, str]:
    """What each kernel that PyTorch asks before the chosen one takes and this call is not, in their order.

    Raises:
        UnknownSize: as `attention_backend`.
    """
    seen = AttentionCall.of(call)
    reasons: dict[Backend, str] = {}
    for backend in CONDITIONS:
        refused = _refusal(backend, seen)
        if refused is None:
            break
        reasons[backend] = f"it takes {refused.text}"
    return reasons


def _refusal(backend: Backend, call: AttentionCall) -> Condition | None:
    return next((condition for condition in CONDITIONS[backend] if not condition.holds(call)), None)
