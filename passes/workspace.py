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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, zip_longest
from math import prod

import torch

from passes.cuda_allocator import MIB, round_bytes
from passes.spec import TensorSpec
from runtime.errors import UnknownSize
from runtime.layout import align

CUDNN_WORKSPACE_CAP_BYTES = 64 * MIB
"""Most workspace that the runtime lets one cuDNN convolution have (it sets `CUDNN_CONV_WSCAP_DBG`, in MiB)."""

_HALF = (torch.float16, torch.bfloat16)
_MULTIPROCESSORS = {
    (8, 0): 108, (8, 6): 84, (8, 7): 16, (8, 9): 142, (9, 0): 132,
    (10, 0): 148, (10, 3): 160, (12, 0): 188, (12, 1): 48,
}  # fmt: skip
"""Multiprocessors of the largest chip of each compute capability (NVIDIA's data sheets)."""
_MOST_MULTIPROCESSORS = 192


@dataclass(frozen=True)
class OpCall:
    """One operator call on specs. `target` prints as the operator's name, as in `aten.mm.default`."""

    target: object
    args: tuple[object, ...]
    kwargs: Mapping[str, object] = field(default_factory=dict)
    outputs: tuple[TensorSpec, ...] = ()
    machine_capability: tuple[int, int] | None = None


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


def declare(device: str, *operators: str, source: str, confirmed: bool = False) -> Callable[[_Rule], _Rule]:
    """Registers the decorated function as the rule of `operators` (names without the `aten.` in front) on `device`."""

    def register(rule: _Rule) -> _Rule:
        for name in operators:
            key = device, f"aten.{name}"
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


# --- arguments and layouts -------------------------------------------------------------------------------------------


def _arg(call: OpCall, index: int, name: str, default: object = None) -> object:
    if name in call.kwargs:
        return call.kwargs[name]
    return call.args[index] if index < len(call.args) else default


def _tensor(call: OpCall, index: int, name: str) -> TensorSpec:
    value = _arg(call, index, name)
    if not isinstance(value, TensorSpec):
        raise UnknownSize(f"{call.target}: argument {name!r} is {value!r}, not a tensor of known size")
    return value


def _maybe_tensor(call: OpCall, index: int, name: str) -> TensorSpec | None:
    return None if _arg(call, index, name) is None else _tensor(call, index, name)


def _capability(call: OpCall) -> tuple[int, int]:
    if call.machine_capability is None:
        raise UnknownSize(f"{call.target}: the kernel depends on the GPU; say its compute capability, as in (8, 9)")
    return call.machine_capability


def _sum(*sizes: int) -> int:
    """Bytes of buffers that are alive together, each rounded as the CUDA allocator rounds."""
    return sum(round_bytes(size) for size in sizes)


def _accumulate_bytes(dtype: torch.dtype) -> int:
    """Bytes per element of the type that CUDA kernels accumulate `dtype` in."""
    return 8 if dtype == torch.float64 else 4


def _dense(spec: TensorSpec, order: tuple[int, ...]) -> bool:
    """Whether the elements lie without gaps, dimensions from the outermost to the innermost in `order`."""
    expected = 1
    for dim in reversed(order):
        if spec.shape[dim] != 1 and spec.stride[dim] != expected:
            return spec.numel == 0
        expected *= spec.shape[dim]
    return True


def _contiguous(spec: TensorSpec) -> bool:
    return _dense(spec, tuple(range(len(spec.shape))))


def _channels_last(spec: TensorSpec) -> bool:
    return len(spec.shape) in (4, 5) and _dense(spec, (0, *range(2, len(spec.shape)), 1))


def _collapses(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether all dimensions can be viewed as one."""
    dims = [(n, s) for n, s in zip(shape, stride, strict=True) if n != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(dims))


def _copy_unless(fits: bool, spec: TensorSpec) -> int:
    return 0 if fits else _sum(spec.nbytes)


# --- attention -------------------------------------------------------------------------------------------------------


def attention_backend(call: OpCall) -> str:
    """The kernel that `scaled_dot_product_attention` takes on CUDA: `cudnn`, `flash`, `efficient` or `math`.

    The order and the conditions are those of `ATen/transformers/cuda/sdp_utils.cpp` at default settings without
    gradients. cuDNN comes first on Hopper and Blackwell servers, if newer than 9.15.1 (which the wheels of 2.13 are
    taken to be); its bytes are at least those of the kernel next in line, so that an
    older one is covered (but for a mask and grouped heads at once). Grouped heads are not given to `efficient`: only
    newer sources do that, and `math` takes more.

    Raises:
        UnknownSize: the call does not say the compute capability.
    """
    capability = _capability(call)
    q, k, v = _qkv(call)
    mask = _maybe_tensor(call, 3, "attn_mask")
    if len(q.shape) != 4 or len(k.shape) != 4 or len(v.shape) != 4 or 0 in (*q.shape, *k.shape, *v.shape):
        return "math"
    if not (q.dtype == k.dtype == v.dtype and q.shape[0] == k.shape[0] == v.shape[0]):
        return "math"
    dim, value_dim = q.shape[3], v.shape[3]
    same_heads = q.shape[1] == k.shape[1] == v.shape[1]
    grouped = k.shape[1] == v.shape[1] and q.shape[1] % k.shape[1] == 0 and bool(_arg(call, 7, "enable_gqa", False))
    rows_lie_dense = all(each.stride[3] == 1 or each.shape[3] == 1 for each in (q, k, v))
    half = q.dtype in _HALF and capability >= (8, 0)
    mask_fits = mask is None or mask.stride[-1] == 1
    fusable = half and (same_heads or grouped) and rows_lie_dense
    dims_fit_cudnn = max(dim, value_dim) <= 128 and dim % 8 == value_dim % 8 == 0 and k.shape[2] != 1
    if fusable and mask_fits and dims_fit_cudnn and capability[0] in (9, 10):
        return "cudnn"
    square = q.shape[2] == k.shape[2] or not _arg(call, 5, "is_causal", False)
    if fusable and mask is None and square and dim == k.shape[3] == value_dim <= 256:
        return "flash"
    if same_heads and mask_fits and _efficient_takes(q, k, v, capability):
        return "efficient"
    return "math"


def _qkv(call: OpCall) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    return _tensor(call, 0, "query"), _tensor(call, 1, "key"), _tensor(call, 2, "value")


def _efficient_takes(q: TensorSpec, k: TensorSpec, v: TensorSpec, capability: tuple[int, int]) -> bool:
    """Whether the memory-efficient kernel takes them: type, unit strides, head dims and offsets (16 B aligned)."""
    dtypes = (torch.float16, torch.float32, *((torch.bfloat16,) if capability >= (8, 0) else ()))
    if q.dtype not in dtypes or capability < (5, 0) or any(each.stride[3] != 1 for each in (q, k, v)):
        return False
    tensor_cores = capability >= (8, 0) or (capability >= (7, 0) and q.dtype in _HALF)
    alignment = 16 // q.dtype.itemsize if tensor_cores else 1
    if capability >= (8, 0) and any(each.offset % alignment for each in (q, k, v)):
        return False
    return q.shape[3] == k.shape[3] and q.shape[3] % alignment == 0 and v.shape[3] % alignment == 0


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
    total = _sum(size, 16, 8)
    if padded != dim:
        total += _sum(*(each.numel // dim * padded * each.dtype.itemsize for each in (q, k, v)))
        total += _sum(q.numel // dim * padded * q.dtype.itemsize) - _sum(q.nbytes)
    if queries == 1 and heads > k.shape[1]:  # the groups of heads take the place of the queries
        queries, heads = heads // k.shape[1], k.shape[1]
        total += _sum(q.nbytes, q.nbytes)
    key_rows = 256 if padded <= 64 else 128 if padded <= 128 else 64
    multiprocessors = _MULTIPROCESSORS.get(_capability(call), _MOST_MULTIPROCESSORS)
    parts = flash_splits(batch * heads * -(-queries // 64), -(-k.shape[2] // key_rows), multiprocessors)
    if parts > 1:
        total += _sum(parts * size, parts * size * align(padded, 32 if padded <= 128 else 64))
    return total


def _mask_bytes(mask: TensorSpec | None, dtype: torch.dtype) -> tuple[int, int]:
    """(most bytes while a mask is made ready, bytes that stay): bool becomes numbers, rows are padded to eights."""
    if mask is None:
        return 0, 0
    stays = peak = 0
    if mask.dtype == torch.bool:
        stays = _sum(mask.numel * dtype.itemsize)
        peak = stays + _sum(mask.numel, 1)  # the inverted mask and a scalar
        aligned = mask.shape[-1] % 8 == 0
    else:
        aligned = mask.stride[-1] == 1 and all(stride % 8 == 0 for stride in mask.stride[:-1])
    if not aligned:
        itemsize = dtype.itemsize if mask.dtype == torch.bool else mask.dtype.itemsize
        columns = mask.shape[-1]
        padded = _sum(mask.numel // max(1, columns) * (columns // 8 + 1) * 8 * itemsize)
        peak, stays = max(peak, stays + padded), padded
    return peak, stays


def _efficient_bytes(call: OpCall) -> int:
    """The mask, and for half precision with values wider than 128 an fp32 accumulator of the output's shape."""
    q, _, v = _qkv(call)
    peak, stays = _mask_bytes(_maybe_tensor(call, 3, "attn_mask"), q.dtype)
    wide = q.dtype in _HALF and v.shape[3] > 128
    return max(peak, stays + (_sum(4 * prod(q.shape[:3]) * v.shape[3]) if wide else 0))


def _cudnn_bytes(call: OpCall) -> int:
    """What flash would take, plus the mask: without gradients cuDNN keeps no statistics, and its plan is small."""
    peak, stays = _mask_bytes(_maybe_tensor(call, 3, "attn_mask"), _tensor(call, 0, "query").dtype)
    return max(peak, stays + _flash_bytes(call))


def _math_bytes(call: OpCall) -> int:
    """Fp32 copies of half q, k and v; scaled q and k; up to 3 1/4 score matrices (softmax, its test for empty rows)."""
    q, k, v = _qkv(call)
    acc = max(4, q.dtype.itemsize)
    upcast = q.dtype in _HALF
    rows, columns = q.shape[-2], k.shape[-2]
    (out,) = call.outputs
    batch = prod(out.shape[:-2])
    scores = batch * rows * columns
    keys, values = batch * columns * k.shape[-1] * acc, batch * columns * v.shape[-1] * acc
    base = _sum(q.numel * acc) + (_sum(*(each.numel * acc for each in (q, k, v))) if upcast else 0)
    if k.shape[:-2] != q.shape[:-2]:
        base += _sum(keys, values)  # grouped heads repeated, or broadcast batches
    mask = _maybe_tensor(call, 3, "attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        base += _sum(mask.numel * q.dtype.itemsize, mask.numel, 1)
    if _arg(call, 5, "is_causal", False):
        base += _sum(rows * columns, rows * columns, acc * rows * columns)
    ready = all(_collapses(each.shape[:-2], each.stride[:-2]) for each in (q, k))
    score = _sum(scores * acc, keys) + (0 if ready else _sum(q.numel * acc, keys))
    softmax = _sum(scores * acc, scores * acc, scores * acc, scores, batch * rows)
    last = _sum(scores * acc) + (0 if _collapses(v.shape[:-2], v.stride[:-2]) else _sum(values))
    if upcast:
        last += _sum(out.numel * acc, scores * q.dtype.itemsize)
    return base + max(score, softmax, last)


_ATTENTION = {"cudnn": _cudnn_bytes, "flash": _flash_bytes, "efficient": _efficient_bytes, "math": _math_bytes}


@declare(
    "cuda",
    "scaled_dot_product_attention.default",
    source="ATen/transformers/attention.cpp, cuda/attention.cu, cuda/sdp_utils.cpp, cuda/flash_attn/flash_api.cpp, "
    "cuda/mem_eff_attention/kernel_forward.h",
)
def _attention(call: OpCall) -> int:
    return _ATTENTION[attention_backend(call)](call)


# --- norms -----------------------------------------------------------------------------------------------------------


def _group_norm_fused(x: TensorSpec, groups: int, affine: bool) -> int:
    """Input made contiguous, fp32 statistics of a half input, and the scale and shift per channel of an affine norm."""
    rows, channels = x.shape[:2]
    acc = _accumulate_bytes(x.dtype)
    total = _copy_unless(_contiguous(x), x)
    if x.dtype in _HALF:
        total += _sum(4 * rows * groups, 4 * rows * groups)
    if affine and prod(x.shape[2:]) != 1:
        total += _sum(acc * rows * channels, acc * rows * channels)
    return total


@declare("cuda", "group_norm.default", source="ATen/group_norm.cpp, ATen/cuda/group_norm_kernel.cu")
def _group_norm(call: OpCall) -> int:
    """Mean and reciprocal deviation in the input's type, 2·N·G, on top of the fused part."""
    x, groups = _tensor(call, 0, "input"), _arg(call, 1, "num_groups")
    if not isinstance(groups, int):
        raise UnknownSize(f"{call.target}: num_groups is {groups!r}, not a number")
    affine = _arg(call, 2, "weight") is not None or _arg(call, 3, "bias") is not None
    statistics = x.shape[0] * groups * x.dtype.itemsize
    return _sum(statistics, statistics) + _group_norm_fused(x, groups, affine)


@declare("cuda", "native_group_norm.default", source="ATen/group_norm.cpp, ATen/cuda/group_norm_kernel.cu")
def _native_group_norm(call: OpCall) -> int:
    """As `group_norm`, but mean and reciprocal deviation are outputs."""
    groups = _arg(call, 6, "group")
    if not isinstance(groups, int):
        raise UnknownSize(f"{call.target}: group is {groups!r}, not a number")
    affine = _arg(call, 1, "weight") is not None or _arg(call, 2, "bias") is not None
    return _group_norm_fused(_tensor(call, 0, "input"), groups, affine)


def _norm_rows(call: OpCall) -> int:
    shape = _arg(call, 1, "normalized_shape")
    if not isinstance(shape, list | tuple):
        raise UnknownSize(f"{call.target}: normalized_shape is {shape!r}, not a list of numbers")
    x = _tensor(call, 0, "input")
    return prod(x.shape[: len(x.shape) - len(shape)])


@declare("cuda", "layer_norm.default", source="ATen/layer_norm.cpp, ATen/cuda/layer_norm_kernel.cu")
def _layer_norm(call: OpCall) -> int:
    """Mean and reciprocal deviation per row in fp32, and a contiguous input."""
    x, statistics = _tensor(call, 0, "input"), _norm_rows(call) * _accumulate_bytes(_tensor(call, 0, "input").dtype)
    return _copy_unless(_contiguous(x), x) + _sum(statistics, statistics)


@declare("cuda", "native_layer_norm.default", "_fused_rms_norm.default", source="ATen/cuda/layer_norm_kernel.cu")
def _native_norm(call: OpCall) -> int:
    """A contiguous input; the statistics are outputs."""
    x = _tensor(call, 0, "input")
    return _copy_unless(_contiguous(x), x)


@declare("cuda", "rms_norm.default", source="ATen/layer_norm.cpp, ATen/cuda/layer_norm_kernel.cu")
def _rms_norm(call: OpCall) -> int:
    """Reciprocal root per row in fp32; with a weight of another type than the input, single operators in fp32."""
    x, weight = _tensor(call, 0, "input"), _maybe_tensor(call, 2, "weight")
    acc = _accumulate_bytes(x.dtype)
    rows = _sum(_norm_rows(call) * acc)
    if weight is not None and weight.dtype != x.dtype:
        full = x.numel * acc
        return rows + _sum(full, full, full)
    return _copy_unless(_contiguous(x), x) + rows


# --- products --------------------------------------------------------------------------------------------------------

_BLAS = "ATen/cuda/Blas.cpp, ATen/LinearAlgebra.cpp; cuBLAS's own workspace is reserved once: see cublas_workspace_bytes"


def _blas_copy(spec: TensorSpec) -> int:
    """Bytes of a copy of the matrices in `spec`, unless they are stored row by row or column by column."""
    rows, columns = spec.shape[-2:]
    down, across = spec.stride[-2:]
    by_rows = (across == 1 or columns == 1) and (down >= columns or rows == 1)
    by_columns = (down == 1 or rows == 1) and (across >= rows or columns == 1)
    return _copy_unless(by_rows or by_columns, spec)


@declare("cuda", "mm.default", "bmm.default", source=_BLAS)
def _mm(call: OpCall) -> int:
    return _blas_copy(_tensor(call, 0, "self")) + _blas_copy(_tensor(call, 1, "mat2"))


@declare("cuda", "addmm.default", "baddbmm.default", source=_BLAS)
def _addmm(call: OpCall) -> int:
    """The bias is added by the epilogue or first copied into the output."""
    names = ("mat1", "mat2") if str(call.target) == "aten.addmm.default" else ("batch1", "batch2")
    return _blas_copy(_tensor(call, 1, names[0])) + _blas_copy(_tensor(call, 2, names[1]))


@declare("cuda", "linear.default", source="ATen/Linear.cpp; " + _BLAS)
def _linear(call: OpCall) -> int:
    """A copy of the input if its leading dimensions are no single one."""
    x = _tensor(call, 0, "input")
    if len(x.shape) < 2:
        return 0
    if len(x.shape) == 2:
        return _blas_copy(x)
    return _copy_unless(_collapses(x.shape[:-1], x.stride[:-1]) and x.stride[-1] == 1, x)


@declare("cuda", "matmul.default", source=_BLAS)
def _matmul(call: OpCall) -> int:
    """A copy of each operand that has to be broadcast over, or gathered from, several batch dimensions."""
    left, right = _tensor(call, 0, "self"), _tensor(call, 1, "other")
    if len(left.shape) < 2 or len(right.shape) < 2:
        return _copy_unless(_contiguous(left), left) + _copy_unless(_contiguous(right), right)
    batch = _broadcast(left.shape[:-2], right.shape[:-2])
    if len(right.shape) == 2 and len(left.shape) > 2:
        return _copy_unless(_collapses(left.shape[:-1], left.stride[:-1]), left) + _blas_copy(right)
    return _batched_copy(left, batch) + _batched_copy(right, batch)


def _broadcast(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that two shapes that fit each other broadcast to."""
    pairs = zip_longest(reversed(left), reversed(right), fillvalue=1)
    return tuple(b if a == 1 else a for a, b in pairs)[::-1]


def _batched_copy(spec: TensorSpec, batch: tuple[int, ...]) -> int:
    pad = len(batch) - len(spec.shape[:-2])
    shape, stride = (1,) * pad + spec.shape[:-2], (0,) * pad + spec.stride[:-2]
    stride = tuple(s if n == full else 0 for n, s, full in zip(shape, stride, batch, strict=True))
    if _collapses(batch, stride):
        return _blas_copy(spec)
    return _sum(prod(batch) * prod(spec.shape[-2:]) * spec.dtype.itemsize)


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
    x, weight = _tensor(call, 0, "input"), _tensor(call, 1, "weight")
    (out,) = call.outputs
    spatial = len(weight.shape) - 2
    transposed = str(call.target).removeprefix("aten.") in _TRANSPOSED
    if str(call.target) == "aten.convolution.default":
        transposed = bool(_arg(call, 6, "transposed", False))
    unfolded = out.numel // max(1, prod(out.shape[-spatial:])) * prod(x.shape[-spatial:]) if transposed else 0
    if not transposed:
        unfolded = x.numel // max(1, prod(x.shape[-spatial:])) * prod(out.shape[-spatial:])
    im2col = unfolded * prod(weight.shape[2:]) * x.dtype.itemsize
    plan = min(CUDNN_WORKSPACE_CAP_BYTES, max(im2col, x.nbytes) + weight.nbytes + out.nbytes)
    return _sum(plan) + _convolution_copies(x, weight)


def _convolution_copies(x: TensorSpec, weight: TensorSpec) -> int:
    """Input and weight in one layout: channels-last if either of the two is that (and not contiguous as well)."""
    channels_last = any(_channels_last(each) and not _contiguous(each) for each in (x, weight))
    fits = _channels_last if channels_last else _contiguous
    return sum(_copy_unless(fits(each), each) for each in (x, weight))


# --- the rest --------------------------------------------------------------------------------------------------------

_SMOOTH = ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")


@declare("cuda", "softmax.int", "_softmax.default", source="ATen/cuda/SoftMax.cu: statistics stay in registers")
def _softmax(call: OpCall) -> int:
    """A contiguous input, and the input in the requested type where that is not the fused half to float."""
    x, dtype = _tensor(call, 0, "self"), _arg(call, 2, "dtype")
    total = _copy_unless(_contiguous(x), x)
    if isinstance(dtype, torch.dtype) and dtype != x.dtype and not (x.dtype in _HALF and dtype == torch.float32):
        total += _sum(x.numel * dtype.itemsize)
    return total


@declare("cuda", "embedding.default", source="ATen/Embedding.cpp: index_select straight into the output")
def _embedding(call: OpCall) -> int:
    indices = _tensor(call, 1, "indices")
    return _copy_unless(_contiguous(indices), indices)


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
    x = _tensor(call, 0, "self" if "self" in call.kwargs else "input")
    return _copy_unless(_contiguous(x) or _channels_last(x), x)
