"""Bytes that an operator allocates beyond its outputs while it runs: a declared table by device and operator.

Where the real device is at hand its operators are probed and this table is not asked. Where it is not (a plan for a GPU
that is elsewhere), fakes cannot tell: the fake `cuda` device of a CPU build takes the wrong kernel for attention and
RMS norm. So each operator that matters has a rule here with its source. `workspace_bytes` returns None where no rule is
declared; that never means zero, the caller then runs the operator on fakes and counts.

Every number is in bytes. CUDA rules round each buffer up to 512 B, as the caching allocator does
(`passes.cuda_allocator`), and say the most that is alive at one time. Sources are files of PyTorch 2.13 unless said
otherwise; `ATen/` is `aten/src/ATen/native/`. Inference only: nothing is kept for a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

import torch

from passes.attention_workspace import ATTENTION_SOURCE, attention_bytes
from passes.cuda_allocator import MIB
from passes.op_call import (
    HALF,
    OpCall,
    accumulate_bytes,
    arg,
    collapses,
    copy_unless,
    is_channels_last,
    is_contiguous,
    maybe_tensor_arg,
    rounded_sum,
    tensor_arg,
)
from passes.spec import TensorSpec
from runtime.errors import UnknownSize

__all__ = [
    "CUDNN_WORKSPACE_CAP_BYTES",
    "RULES",
    "OpCall",
    "WorkspaceRule",
    "cublas_workspace_bytes",
    "declare",
    "workspace_bytes",
]

CUDNN_WORKSPACE_CAP_BYTES = 64 * MIB
"""Most workspace that the runtime lets one cuDNN convolution have (it sets `CUDNN_CONV_WSCAP_DBG`, in MiB)."""


@dataclass(frozen=True)
class WorkspaceRule:
    """How many bytes `operator` allocates on `device` beyond its outputs, and where that was read.

    `confirmed` says whether it was measured on such a device; until then it was only read in the source.
    """

    operator: str
    device: str
    bytes: Callable[[OpCall], int]
    source: str
    confirmed: bool = False


RULES: dict[tuple[str, str], WorkspaceRule] = {}
"""The table, by (device, operator)."""

_Rule = Callable[[OpCall], int]


def declare(
    device: str, *operators: str, source: str, confirmed: bool = False, namespace: str = "aten"
) -> Callable[[_Rule], _Rule]:
    """Registers the decorated function as the rule of `operators` (names without the namespace in front) on `device`."""

    def register(rule: _Rule) -> _Rule:
        for name in operators:
            key = device, f"{namespace}.{name}"
            assert key not in RULES, f"two rules for {key}"
            RULES[key] = WorkspaceRule(key[1], device, rule, source, confirmed)
        return rule

    return register


def workspace_bytes(device: str, call: OpCall) -> int | None:
    """Bytes that `call` allocates beyond its outputs on `device` (`cuda`, `accounting`, `cpu`); None: no rule declared.

    Raises:
        UnknownSize: a rule needs something that the call does not say, such as the GPU's compute capability.
    """
    rule = RULES.get((device, str(call.target)))
    return None if rule is None else rule.bytes(call)


def cublas_workspace_bytes(capability: tuple[int, int]) -> int:
    """Bytes that cuBLAS holds for good once the first product ran, per handle and stream; cuBLASLt shares them.

    32 MiB on Hopper, else 8,519,680 (2 x 4,096 KiB + 8 x 16 KiB). Newer sources give Blackwell 32 MiB too, older ones
    do not; the larger is taken. Source: `aten/src/ATen/cuda/CublasHandlePool.cpp`; not confirmed on a device.
    """
    return 32 * MIB if capability[0] >= 9 else 8_519_680


# --- attention -------------------------------------------------------------------------------------------------------

declare("cuda", "scaled_dot_product_attention.default", source=ATTENTION_SOURCE)(attention_bytes)


# --- norms -----------------------------------------------------------------------------------------------------------


def _group_norm_fused(x: TensorSpec, groups: int, affine: bool) -> int:
    """Input made contiguous, fp32 statistics of a half input, and the scale and shift per channel of an affine norm."""
    rows, channels = x.shape[:2]
    acc = accumulate_bytes(x.dtype)
    total = copy_unless(is_contiguous(x), x)
    if x.dtype in HALF:
        total += rounded_sum(4 * rows * groups, 4 * rows * groups)
    if affine and prod(x.shape[2:]) != 1:
        total += rounded_sum(acc * rows * channels, acc * rows * channels)
    return total


@declare("cuda", "group_norm.default", source="ATen/group_norm.cpp, ATen/cuda/group_norm_kernel.cu")
def _group_norm(call: OpCall) -> int:
    """Mean and reciprocal deviation in the input's type, 2·N·G, on top of the fused part."""
    x, groups = tensor_arg(call, 0, "input"), arg(call, 1, "num_groups")
    if not isinstance(groups, int):
        raise UnknownSize(f"{call.target}: num_groups is {groups!r}, not a number")
    affine = arg(call, 2, "weight") is not None or arg(call, 3, "bias") is not None
    statistics = x.shape[0] * groups * x.dtype.itemsize
    return rounded_sum(statistics, statistics) + _group_norm_fused(x, groups, affine)


@declare("cuda", "native_group_norm.default", source="ATen/group_norm.cpp, ATen/cuda/group_norm_kernel.cu")
def _native_group_norm(call: OpCall) -> int:
    """As `group_norm`, but mean and reciprocal deviation are outputs."""
    groups = arg(call, 6, "group")
    if not isinstance(groups, int):
        raise UnknownSize(f"{call.target}: group is {groups!r}, not a number")
    affine = arg(call, 1, "weight") is not None or arg(call, 2, "bias") is not None
    return _group_norm_fused(tensor_arg(call, 0, "input"), groups, affine)


@declare("cuda", "group_statistics.default", namespace="vramplan", source="ATen/cuda/Reduce.cuh, cuda/ReduceMomentKernel.cu")
def _group_statistics(call: OpCall) -> int:
    """Mean, variance, deviations and count per group in fp32, and what blocks of one reduction leave to each other.

    A block of 512 threads reduces 131,072 elements or more of one group, or there are no more blocks than the device holds
    at once, here taken to be 2,048; each leaves 16 B, and a counter of 4 B.
    """
    x, groups = tensor_arg(call, 0, "x"), arg(call, 1, "groups")
    if not isinstance(groups, int):
        raise UnknownSize(f"{call.target}: groups is {groups!r}, not a number")
    rows = x.shape[0] * groups
    statistics, blocks = rows * accumulate_bytes(x.dtype), rows + 2048 + x.numel // 131_072
    return rounded_sum(statistics, statistics, statistics, statistics, 16 * blocks, 4 * blocks)


def _norm_rows(call: OpCall) -> int:
    shape = arg(call, 1, "normalized_shape")
    if not isinstance(shape, list | tuple):
        raise UnknownSize(f"{call.target}: normalized_shape is {shape!r}, not a list of numbers")
    x = tensor_arg(call, 0, "input")
    return prod(x.shape[: len(x.shape) - len(shape)])


@declare("cuda", "layer_norm.default", source="ATen/layer_norm.cpp, ATen/cuda/layer_norm_kernel.cu")
def _layer_norm(call: OpCall) -> int:
    """Mean and reciprocal deviation per row in fp32, and a contiguous input."""
    x, statistics = tensor_arg(call, 0, "input"), _norm_rows(call) * accumulate_bytes(tensor_arg(call, 0, "input").dtype)
    return copy_unless(is_contiguous(x), x) + rounded_sum(statistics, statistics)


@declare("cuda", "native_layer_norm.default", "_fused_rms_norm.default", source="ATen/cuda/layer_norm_kernel.cu")
def _native_norm(call: OpCall) -> int:
    """A contiguous input; the statistics are outputs."""
    x = tensor_arg(call, 0, "input")
    return copy_unless(is_contiguous(x), x)


@declare("cuda", "rms_norm.default", source="ATen/layer_norm.cpp, ATen/cuda/layer_norm_kernel.cu")
def _rms_norm(call: OpCall) -> int:
    """Reciprocal root per row in fp32; with a weight of another type than the input, single operators in fp32."""
    x, weight = tensor_arg(call, 0, "input"), maybe_tensor_arg(call, 2, "weight")
    acc = accumulate_bytes(x.dtype)
    rows = rounded_sum(_norm_rows(call) * acc)
    if weight is not None and weight.dtype != x.dtype:
        full = x.numel * acc
        return rows + rounded_sum(full, full, full)
    return copy_unless(is_contiguous(x), x) + rows


# --- products --------------------------------------------------------------------------------------------------------

_BLAS = "ATen/cuda/Blas.cpp, ATen/LinearAlgebra.cpp; cuBLAS's own workspace is reserved once: see cublas_workspace_bytes"


def _blas_copy(spec: TensorSpec) -> int:
    """Bytes of a copy of the matrices in `spec`, unless they are stored row by row or column by column."""
    rows, columns = spec.shape[-2:]
    down, across = spec.stride[-2:]
    by_rows = (across == 1 or columns == 1) and (down >= columns or rows == 1)
    by_columns = (down == 1 or rows == 1) and (across >= rows or columns == 1)
    return copy_unless(by_rows or by_columns, spec)


@declare("cuda", "mm.default", "bmm.default", source=_BLAS)
def _mm(call: OpCall) -> int:
    return _blas_copy(tensor_arg(call, 0, "self")) + _blas_copy(tensor_arg(call, 1, "mat2"))


@declare("cuda", "addmm.default", "baddbmm.default", source=_BLAS)
def _addmm(call: OpCall) -> int:
    """The bias is added by the epilogue or first copied into the output."""
    names = ("mat1", "mat2") if str(call.target) == "aten.addmm.default" else ("batch1", "batch2")
    return _blas_copy(tensor_arg(call, 1, names[0])) + _blas_copy(tensor_arg(call, 2, names[1]))


@declare("cuda", "linear.default", source="ATen/Linear.cpp; " + _BLAS)
def _linear(call: OpCall) -> int:
    """A copy of the input if its leading dimensions are no single one."""
    x = tensor_arg(call, 0, "input")
    if len(x.shape) < 2:
        return 0
    if len(x.shape) == 2:
        return _blas_copy(x)
    return copy_unless(collapses(x.shape[:-1], x.stride[:-1]) and x.stride[-1] == 1, x)


@declare("cuda", "matmul.default", source=_BLAS)
def _matmul(call: OpCall) -> int:
    """A copy of each operand that has to be broadcast over, or gathered from, several batch dimensions."""
    left, right = tensor_arg(call, 0, "self"), tensor_arg(call, 1, "other")
    if len(left.shape) < 2 or len(right.shape) < 2:
        return copy_unless(is_contiguous(left), left) + copy_unless(is_contiguous(right), right)
    batch = _broadcast(left.shape[:-2], right.shape[:-2])
    if len(right.shape) == 2 and len(left.shape) > 2:
        return copy_unless(collapses(left.shape[:-1], left.stride[:-1]), left) + _blas_copy(right)
    return _batched_copy(left, batch) + _batched_copy(right, batch)


def _broadcast(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that two shapes that fit each other broadcast to."""
    pairs = zip_longest(reversed(left), reversed(right), fillvalue=1)
    return tuple(b if a == 1 else a for a, b in pairs)[::-1]


def _batched_copy(spec: TensorSpec, batch: tuple[int, ...]) -> int:
    pad = len(batch) - len(spec.shape[:-2])
    shape, stride = (1,) * pad + spec.shape[:-2], (0,) * pad + spec.stride[:-2]
    stride = tuple(s if n == full else 0 for n, s, full in zip(shape, stride, batch, strict=True))
    if collapses(batch, stride):
        return _blas_copy(spec)
    return rounded_sum(prod(batch) * prod(spec.shape[-2:]) * spec.dtype.itemsize)


_LEAF = "leaf: one addmm/mm on a flattened view; under a dispatch mode linear would decompose differently"
_UPSAMPLE = "ATen/native/cpu/UpSampleKernel.cpp: straight into the output; fakes of symbolic size decompose into index tensors"


@declare("accounting", "linear.default", source=_LEAF)
@declare("cpu", "linear.default", source=_LEAF)
@declare("accounting", "upsample_nearest2d.vec", "upsample_bilinear2d.vec", "upsample_nearest1d.vec", source=_UPSAMPLE)
@declare("cpu", "upsample_nearest2d.vec", "upsample_bilinear2d.vec", "upsample_nearest1d.vec", source=_UPSAMPLE)
def _nothing_beyond_the_output(call: OpCall) -> int:
    return 0


# --- convolutions ----------------------------------------------------------------------------------------------------

_TRANSPOSED = ("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")


@declare(
    "cuda",
    *(f"conv{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "padding")),
    "convolution.default",
    *_TRANSPOSED,
    source="assumption: cuDNN takes the first plan that fits its cap (ATen/cudnn/Conv_v8.cpp); no plan is taken to "
    "need more than the matrix of an explicit im2col plus weight and output in another layout",
)
def _convolution(call: OpCall) -> int:
    """min(cap, im2col + output + weight), plus ATen's own copies that give input and weight one layout."""
    x, weight = tensor_arg(call, 0, "input"), tensor_arg(call, 1, "weight")
    (out,) = call.outputs
    spatial = len(weight.shape) - 2
    transposed = str(call.target).removeprefix("aten.") in _TRANSPOSED
    if str(call.target) == "aten.convolution.default":
        transposed = bool(arg(call, 6, "transposed", False))
    unfolded = out.numel // max(1, prod(out.shape[-spatial:])) * prod(x.shape[-spatial:]) if transposed else 0
    if not transposed:
        unfolded = x.numel // max(1, prod(x.shape[-spatial:])) * prod(out.shape[-spatial:])
    im2col = unfolded * prod(weight.shape[2:]) * x.dtype.itemsize
    plan = min(CUDNN_WORKSPACE_CAP_BYTES, max(im2col, x.nbytes) + weight.nbytes + out.nbytes)
    return rounded_sum(plan) + _convolution_copies(x, weight)


def _convolution_copies(x: TensorSpec, weight: TensorSpec) -> int:
    """Input and weight in one layout: channels-last if either of the two is that (and not contiguous as well)."""
    channels_last = any(is_channels_last(each) and not is_contiguous(each) for each in (x, weight))
    fits = is_channels_last if channels_last else is_contiguous
    return sum(copy_unless(fits(each), each) for each in (x, weight))


# --- the rest --------------------------------------------------------------------------------------------------------

_SMOOTH = ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")


@declare("cuda", "softmax.int", "_softmax.default", source="ATen/cuda/SoftMax.cu: statistics stay in registers")
def _softmax(call: OpCall) -> int:
    """A contiguous input, and the input in the requested type where that is not the fused half to float."""
    x, dtype = tensor_arg(call, 0, "self"), arg(call, 2, "dtype")
    total = copy_unless(is_contiguous(x), x)
    if isinstance(dtype, torch.dtype) and dtype != x.dtype and not (x.dtype in HALF and dtype == torch.float32):
        total += rounded_sum(x.numel * dtype.itemsize)
    return total


@declare("cuda", "embedding.default", source="ATen/Embedding.cpp: index_select straight into the output")
def _embedding(call: OpCall) -> int:
    indices = tensor_arg(call, 1, "indices")
    return copy_unless(is_contiguous(indices), indices)


@declare("cuda", "cat.default", source="ATen/cuda/Shape.cu: copies straight into the output")
def _cat(call: OpCall) -> int:
    return 0


@declare(
    "cuda",
    *(f"upsample_nearest{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "vec")),
    *(f"_upsample_nearest_exact{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "vec")),
    *(f"upsample_{kind}.{overload}" for kind in _SMOOTH for overload in ("default", "vec")),
    source="ATen/cuda/UpSample*.cu: weights are computed in place",
)
def _upsample(call: OpCall) -> int:
    """A contiguous input, unless it is channels-last already."""
    x = tensor_arg(call, 0, "self" if "self" in call.kwargs else "input")
    return copy_unless(is_contiguous(x) or is_channels_last(x), x)
