"""Weights that are stored otherwise than the module has them, made once, on the host.

In a smaller type, with scales:

before:  w                  [out, in]    bfloat16
after:   values             [out, in]    float8_e4m3fn      w / scales
         scales             [out, 1]     float32            largest magnitude of the row / largest value of the type

The operator `vramplan::upcast` gives `values * scales` in the type that the program computes in.

Or in another layout: the values of `w` with other strides, those of channels-last, say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from runtime.errors import PlannerError

_LIBRARY = torch.library.Library("vramplan", "FRAGMENT")
_LIBRARY.define("upcast(Tensor values, Tensor scales, ScalarType dtype) -> Tensor")

# Storage types, and the largest value that scales map to.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}


@dataclass(frozen=True)
class Stored:
    """Which part of a scaled cast a stored weight is, or that it is the weight itself in another layout.

    Attributes:
        weight: the module's name of what it is made from.
        part: the values in `dtype`, or their scales, in float32; or the weight itself, its elements laid out otherwise.
        dim: the dimension that has a scale for each index; None: there is one for all.
    """

    weight: str
    part: Literal["values", "scales", "layout"]
    dtype: torch.dtype
    dim: int | None

    @property
    def name(self) -> str:
        """What people read: the weight, and which part of it."""
        return f"{self.weight}:{self.part}"

    @property
    def key(self) -> str:
        """What the host calls it: another for each way to store the weight, and no module has such names."""
        return f"{self.name}:{self.dtype}:{self.dim}"

    def make(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
        """The stored tensor, from the module's; with its scales, where those are known already.

        Of another layout the elements: strides are those of the place where they are copied to.

        Raises:
            PlannerError: the weight is cast, and has values that are not finite.
        """
        if self.part == "layout":
            return weight
        if scales is None:
            scales = scales_of(weight, self.dtype, self.dim)
        if not bool(torch.isfinite(scales).all()):
            raise PlannerError(
                f"the weight {self.weight!r} has values that are not finite, which no scale brings to {self.dtype}; "
                f"keep it as it is with keep={{{self.weight!r}: {{'cast': False}}}}"
            )
        return scales if self.part == "scales" else quantise(weight, scales, self.dtype)


def scale_shape(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    """Of the scales for a weight of that shape: they broadcast against it."""
    return tuple(n if d == dim else 1 for d, n in enumerate(shape))


def scales_of(weight: torch.Tensor, dtype: torch.dtype, dim: int | None) -> torch.Tensor:
    """What values are divided by, float32: 1 where all of them are zero."""
    others = [d for d in range(weight.dim()) if d != dim]
    largest = weight.detach().abs().amax(others, keepdim=True).float()
    scales = largest / LARGEST[dtype]
    # So small that its reciprocal, or itself, is no normal number: zero in every type that stores it.
    return torch.where(scales < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)


def quantise(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest values in the storage type, laid out as the weight is."""
    scaled = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) / scales
    scaled = scaled.clamp_(-LARGEST[dtype], LARGEST[dtype])  # rounding of the quotient may pass the largest value
    if dtype == torch.int8:
        scaled = scaled.round_()
    return scaled.to(dtype)


def upcast(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values * scales` as a new tensor of `dtype`; the product is rounded once."""
    return values.to(dtype).mul_(scales)


_LIBRARY.impl("upcast", upcast, "CompositeImplicitAutograd")
