"""Running operators on fakes as they would run for real: corrections of what PyTorch's fake kernels get wrong about strides.

The strides of dimensions of size 1 mean nothing until some kernel reads them to guess a memory format, and then a copy is made
or is not. Found by comparing fake and real runs (`tests/passes/test_fakes.py`): fake norms keep strides that the real kernels
normalise, and elementwise decompositions normalise strides that `TensorIterator` keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.spec import TensorSpec

aten = torch.ops.aten


_VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default}
_UPSAMPLES = {
    aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default, aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.default, aten.upsample_nearest3d.default, aten.upsample_trilinear3d.default,
}  # fmt: skip
_LIKE = {
    aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.rand_like.default, aten.randn_like.default,
}  # fmt: skip
# Tagged pointwise, but their results do not come from a TensorIterator.
_COPIES = {aten.clone.default, aten._to_copy.default, aten.copy.default}
_BINARY = {
    f"aten::{name}"
    for name in (
        "add", "sub", "rsub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "remainder", "fmod", "floor_divide", "maximum",
        "minimum", "bitwise_and", "bitwise_or", "bitwise_xor", "atan2", "hypot",
    )
}  # fmt: skip
_MASKED_FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}


def fake_of(spec: TensorSpec, storage: torch.UntypedStorage, mode: FakeTensorMode) -> torch.Tensor:
    """A fake CPU tensor of a geometry, in a storage of the meta device.

    Nothing runs on fakes for it: that takes thirty times as long.
    """
    tensor = torch.empty(0, dtype=spec.dtype, device="meta")
    tensor.set_(storage, spec.offset, spec.shape, spec.stride)
    made: torch.Tensor = mode.fake_tensor_converter.from_meta_and_device(mode, tensor, torch.device("cpu"))
    return made.requires_grad_(spec.grad)


def is_torchs(target: Any) -> bool:
    """Whether an operator is PyTorch's own or ours: what it does on fakes is the same for as long as the process lives.

    Anybody else's may be defined again.
    """
    return isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "vramplan")


def attention_kernels() -> tuple[bool, ...]:
    """Which kernels attention may choose from: what it gives depends on that."""
    kernels = torch.backends.cuda
    return kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled()


class FaithfulFakes(TorchDispatchMode):
    """Within it (and a FakeTensorMode), results have the strides of the real CPU kernels."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operator; subclasses watch what comes out."""
        result = func(*args, **kwargs)
        if _is_symbolic(args):
            return result  # asking a symbol for its value would fix it; a size of 1 is never a symbol
        if func is aten.native_group_norm.default:
            # ATen/native/group_norm.cpp: empty_like of input.contiguous(suggested format)
            return (_restride(result[0], suggested_format(args[0])), *result[1:])
        if func is aten.native_batch_norm.default:
            return (_restride(result[0], _batch_norm_format(args)), *result[1:])
        if func is aten.native_layer_norm.default:
            # ATen/native/layer_norm.cpp: the output is made contiguous
            return (_restride(result[0], torch.contiguous_format), *result[1:])
        if func in _LIKE and kwargs.get("memory_format") is None and kwargs.get("layout") is None:
            return _like(result, args[0])
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            # ATen/native/transformers/attention.cpp: the output is made by empty_like of the query
            return (_like(result[0], args[0]), *result[1:])
        if func in _UPSAMPLES:
            # ATen/native/UpSample*.cpp: the output has the suggested format of the input
            return _restride(result, suggested_format(args[0]))
        if func in _VIEWS and isinstance(args[0], FakeTensor):
            # ATen/TensorUtils.cpp, computeStride: the Python reference that fakes use differs where a size is 1
            with _disable_current_modes():
                stride = _meta(args[0]).view(args[1]).stride()
            return result if stride == result.stride() else args[0].as_strided(result.shape, stride, result.storage_offset())
        if torch.Tag.pointwise in func.tags and isinstance(result, FakeTensor) and not func._schema.is_mutable:
            return _iterate(func, args, kwargs, result)
        return result


def _is_symbolic(tree: Any) -> bool:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, (torch.Tensor, torch.SymInt))]
    return any(isinstance(x, torch.SymInt) or any(isinstance(n, torch.SymInt) for n in x.shape) for x in leaves)


def _iterate(func: Any, args: Any, kwargs: Any, result: FakeTensor) -> torch.Tensor:
    """The strides of the real kernel, where a size of 1 leaves doubt."""
    fakes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]  # some may have values
    if not any((1 in fake.shape and not fake.is_contiguous()) or _odd(fake) for fake in fakes):
        return result
    if func in _COPIES:
        with _disable_current_modes():
            metas, named = tree_map_only(torch.Tensor, _meta, (args, kwargs))
            named = {key: torch.device("meta") if isinstance(value, torch.device) else value for key, value in named.items()}
            stride = func(*metas, **named).stride()
    elif func in _MASKED_FILLS:  # ATen/native/TensorAdvancedIndexing.cpp: a contiguous clone, filled
        return _restride(result, torch.contiguous_format)
    else:
        numbers = any(type(value) in (int, float) for value in args[:2]) and func._schema.name in _BINARY
        stride = _iterator_stride(tuple(result.shape), fakes, numbers)
    if stride == result.stride():
        return result
    return torch.empty_strided(result.shape, stride, dtype=result.dtype, device=result.device)


def _iterator_stride(shape: tuple[int, ...], operands: list[torch.Tensor], numbers: bool) -> tuple[int, ...]:
    """The strides that TensorIterator gives a new output (ATen/TensorIterator.cpp: fast_set_up, reorder_dimensions).

    `numbers`: a Python number is among the operands; it counts as a 0-d tensor, which broadcasts.
    """
    contiguous = torch.empty(shape, device="meta").stride()
    if not (numbers and shape) and all(tuple(fake.shape) == shape for fake in operands):
        if all(fake.is_contiguous() for fake in operands):
            return contiguous
        if len(shape) == 4 and all(fake.is_contiguous(memory_format=torch.channels_last) for fake in operands):
            return torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
        strides = {fake.stride() for fake in operands}
        if len(strides) == 1 and all(map(is_dense, operands)):
            return strides.pop()
    rank = len(shape)
    aligned = []
    for fake in operands:
        missing = rank - fake.dim()
        sizes = zip(shape[missing:], fake.shape, fake.stride(), strict=True)
        own = [0 if size == 1 and whole != 1 else stride for whole, size, stride in sizes]
        aligned.append([0] * missing + own)
    order = list(reversed(range(rank)))
    for i in range(1, rank):  # an insertion sort, because comparisons may be ambiguous
        here = i
        for there in reversed(range(i)):
            comparison = _compare(order[there], order[here], aligned, shape)
            if comparison < 0:
                break
            if comparison > 0:
                order[there], order[here] = order[here], order[there]
                here = there
    if order == list(reversed(range(rank))):
        return contiguous
    stride, step = [0] * rank, 1
    for dim in order:
        stride[dim] = step
        step *= shape[dim]
    return tuple(stride)


def _compare(dim: int, other: int, strides: list[list[int]], shape: tuple[int, ...]) -> int:
    """Whether `dim` is iterated outside (1) or inside (-1) of `other`; 0 where no operand tells."""
    for stride in strides:
        if stride[dim] == 0 or stride[other] == 0:
            continue
        if stride[dim] != stride[other]:
            return -1 if stride[dim] < stride[other] else 1
        if shape[dim] > shape[other]:
            return 1
    return 0


def is_dense(fake: torch.Tensor) -> bool:
    """Whether no two elements are at one place and nothing lies between them: c10's is_non_overlapping_and_dense."""
    step = 1
    for stride, size in sorted((s, n) for n, s in zip(fake.shape, fake.stride(), strict=True) if n != 1):
        if stride != step:
            return False
        step *= size
    return True


def _meta(fake: torch.Tensor) -> torch.Tensor:
    """A tensor of the same geometry on the meta device, where PyTorch's own C++ computes strides."""
    with _disable_current_modes():
        return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="meta")


def _odd(fake: torch.Tensor) -> bool:
    """Contiguous, but not with the strides that `torch.empty` would give."""
    expected, stride = 1, []
    for size in reversed(fake.shape):
        stride.append(expected)
        expected *= max(int(size), 1)
    return fake.stride() != tuple(reversed(stride))


def suggested_format(tensor: torch.Tensor) -> torch.memory_format:
    """c10's suggest_memory_format: channels-last where strides say so, in exactly the order of sizes."""
    for rank, order, layout in ((4, (1, 3, 2, 0), torch.channels_last), (5, (1, 4, 3, 2, 0), torch.channels_last_3d)):
        if tensor.dim() == rank and _channels_last(tensor, order):
            return layout
    return torch.contiguous_format


def _batch_norm_format(args: Any) -> torch.memory_format:
    """ATen/native/Normalization.cpp, batch_norm_cpu: the suggested format, or that in which all arguments are contiguous."""
    x, others = args[0], [t for t in args[1:5] if t is not None]
    if all(t.is_contiguous() for t in others):
        formats = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}.get(x.dim(), ())
        for layout in (torch.contiguous_format, *formats):
            if x.is_contiguous(memory_format=layout):
                return layout
    return suggested_format(x)


def _channels_last(tensor: torch.Tensor, order: tuple[int, ...]) -> bool:
    """c10's is_channels_last_strides (c10/core/MemoryFormat.h)."""
    if tensor.stride(1) == 0:
        return False
    least = 0
    for dim in order:
        if tensor.size(dim) == 0 or tensor.stride(dim) < least:
            return False
        if dim == 0 and least == tensor.stride(1):
            return False
        least = tensor.stride(dim)
        if tensor.size(dim) > 1:
            least *= tensor.size(dim)
    return True


def _like(tensor: torch.Tensor, other: FakeTensor) -> torch.Tensor:
    """C++'s empty_like keeps the strides of a dense tensor as they are (ATen/native/TensorFactories.cpp)."""
    if not is_dense(other) or tensor.stride() == other.stride():
        return tensor
    return torch.empty_strided(tensor.shape, other.stride(), dtype=tensor.dtype, device=tensor.device)


def _restride(tensor: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    wanted = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)
    return tensor if wanted.stride() == tensor.stride() else wanted
