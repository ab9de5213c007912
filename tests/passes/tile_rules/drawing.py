"""Tensors that Hypothesis draws: shapes, layouts, values from a drawn seed."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

LAYOUTS = ("dense", "transposed", "narrowed", "channels_last")


def shapes(least: int = 1, most: int = 4, size: int = 5) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, size), min_size=least, max_size=most)


@st.composite
def values(draw: st.DrawFn, shape: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers of a shape, in any layout."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**16))), dtype=torch.float64).to(dtype)
    return laid_out(x, draw(st.sampled_from(LAYOUTS)))


@st.composite
def integers(draw: st.DrawFn, shape: list[int], below: int, least: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return torch.randint(least, below, shape, generator=generator)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "narrowed" and x.dim() > 0:
        return torch.cat([x, x, x], -1).narrow(-1, x.shape[-1], x.shape[-1])
    if layout == "channels_last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x
