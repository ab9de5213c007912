"""`TensorSpec`: what the analyses know of a tensor that does not exist yet."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, stride, dtype and offset in elements; `storage` is an id: equal ids share memory.

    `requires_grad` is told of operands only, whose operators may choose kernels by it.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0
    storage: int = -1
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, as if dense."""
        return self.numel * self.dtype.itemsize

    @property
    def span_bytes(self) -> int:
        """Bytes from the first to the last element that the strides reach (0 for an empty tensor)."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor, storage: int = -1) -> TensorSpec:
        return cls(
            tuple(int(n) for n in tensor.shape),
            tuple(int(n) for n in tensor.stride()),
            tensor.dtype,
            int(tensor.storage_offset()),
            storage,
        )

    def __str__(self) -> str:
        return f"{short_dtype(self.dtype)}[{', '.join(map(str, self.shape))}]"


_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "b8", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def short_dtype(dtype: torch.dtype) -> str:
    """`f32` for `torch.float32`, in the manner of the graphs that PyTorch prints."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def align(nbytes: int, alignment: int) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment
