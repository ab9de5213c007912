"""Running operators on fakes as they would run for real: corrections of what PyTorch's fake kernels get wrong about strides.

The strides of dimensions of size 1 mean nothing until some kernel reads them to guess a memory format, and then a copy is made
or is not. Found by comparing fake and real runs (`tests/passes/test_fakes.py`): fake norms keep strides that the real kernels
normalise, and elementwise decompositions normalise strides that `TensorIterator` keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten


_VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default}
_BINARY = {
    f"aten::{name}"
    for name in (
        "add", "sub", "rsub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "remainder", "fmod", "floor_divide", "maximum",
        "minimum", "bitwise_and", "bitwise_or", "bitwise_xor", "atan2", "hypot",
    )
}  # fmt: skip


class FaithfulFakes(TorchDispatchMode):
    """Within it (and a FakeTensorMode), results have the strides of the real CPU kernels."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operator; subclasses watch what comes out."""
        result = func(*args, **kwargs)
        if func is aten.native_group_norm.default:
            # ATen/native/group_norm.cpp: empty_like of input.contiguous(suggested format)
            return (_restride(result[0], _suggested_format(args[0])), *result[1:])
        if func is aten.native_layer_norm.default:
            # ATen/native/layer_norm.cpp: the output is made contiguous
            return (_restride(result[0], torch.contiguous_format), *result[1:])
        if func in _VIEWS and isinstance(args[0], FakeTensor):
            # ATen/TensorUtils.cpp, computeStride: the Python reference that fakes use differs where a size is 1
            with _disable_current_modes():
                stride = _meta(args[0]).view(args[1]).stride()
            return result if stride == result.stride() else args[0].as_strided(result.shape, stride, result.storage_offset())
        if torch.Tag.pointwise in func.tags and isinstance(result, FakeTensor) and not func._schema.is_mutable:
            return _iterate(func, args, kwargs, result)
        return result


def _iterate(func: Any, args: Any, kwargs: Any, result: FakeTensor) -> torch.Tensor:
    """The strides that TensorIterator gives, by its own structured kernel on the meta device where a size of 1 leaves doubt."""
    fakes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
    if not any(1 in fake.shape and not fake.is_contiguous() or _odd(fake) for fake in fakes):
        return result

    with _disable_current_modes():
        if func._schema.name in _BINARY and len([f for f in fakes if f.dim()]) == 1:
            # A number or 0-d operand broadcasts; the meta kernels shortcut that case, the real iterator does not.
            func, args, kwargs = aten.add.Tensor, (next(f for f in fakes if f.dim()), torch.empty(1, device="meta")), {}
        metas, named = tree_map_only(FakeTensor, _meta, (args, kwargs))
        named = {key: torch.device("meta") if isinstance(value, torch.device) else value for key, value in named.items()}
        stride = func(*metas, **named).stride()
    if stride == result.stride():
        return result
    return torch.empty_strided(result.shape, stride, dtype=result.dtype, device=result.device)


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


def _suggested_format(tensor: torch.Tensor) -> torch.memory_format:
    """c10's suggest_memory_format: channels-last where strides say so, in exactly the order of sizes."""
    for rank, order, layout in ((4, (1, 3, 2, 0), torch.channels_last), (5, (1, 4, 3, 2, 0), torch.channels_last_3d)):
        if tensor.dim() == rank and _channels_last(tensor, order):
            return layout
    return torch.contiguous_format


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


def _restride(tensor: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    wanted = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)
    return tensor if wanted.stride() == tensor.stride() else wanted
