"""One operator call as declared rules see it: arguments by name, and what the layout of a tensor allows.

Bytes are those of the CUDA caching allocator, which rounds each buffer up to 512 B (`passes.cuda_allocator`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from passes.cuda_allocator import round_bytes
from passes.spec import TensorSpec
from runtime.errors import UnknownSize

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class OpCall:
    """One operator call on specs. `target` prints as the operator's name, as in `aten.mm.default`."""

    target: object
    args: tuple[object, ...]
    kwargs: Mapping[str, object] = field(default_factory=dict)
    outputs: tuple[TensorSpec, ...] = ()
    machine_capability: tuple[int, int] | None = None


def arg(call: OpCall, index: int, name: str, default: object = None) -> object:
    if name in call.kwargs:
        return call.kwargs[name]
    return call.args[index] if index < len(call.args) else default


def tensor_arg(call: OpCall, index: int, name: str) -> TensorSpec:
    value = arg(call, index, name)
    if not isinstance(value, TensorSpec):
        raise UnknownSize(f"{call.target}: argument {name!r} is {value!r}, not a tensor of known size")
    return value


def maybe_tensor_arg(call: OpCall, index: int, name: str) -> TensorSpec | None:
    return None if arg(call, index, name) is None else tensor_arg(call, index, name)


def capability_of(call: OpCall) -> tuple[int, int]:
    if call.machine_capability is None:
        raise UnknownSize(f"{call.target}: the kernel depends on the GPU; say its compute capability, as in (8, 9)")
    return call.machine_capability


def rounded_sum(*sizes: int) -> int:
    """Bytes of buffers that are alive together, each rounded as the CUDA allocator rounds."""
    return sum(round_bytes(size) for size in sizes)


def accumulate_bytes(dtype: torch.dtype) -> int:
    """Bytes per element of the type that CUDA kernels accumulate `dtype` in."""
    return 8 if dtype == torch.float64 else 4


def is_dense(spec: TensorSpec, order: tuple[int, ...]) -> bool:
    """Whether the elements lie without gaps, dimensions from the outermost to the innermost in `order`."""
    expected = 1
    for dim in reversed(order):
        if spec.shape[dim] != 1 and spec.stride[dim] != expected:
            return spec.numel == 0
        expected *= spec.shape[dim]
    return True


def is_contiguous(spec: TensorSpec) -> bool:
    return is_dense(spec, tuple(range(len(spec.shape))))


def is_channels_last(spec: TensorSpec) -> bool:
    return len(spec.shape) in (4, 5) and is_dense(spec, (0, *range(2, len(spec.shape)), 1))


def collapses(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether all dimensions can be viewed as one."""
    dims = [(n, s) for n, s in zip(shape, stride, strict=True) if n != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(dims))


def copy_unless(fits: bool, spec: TensorSpec) -> int:
    return 0 if fits else rounded_sum(spec.nbytes)
