"""`Executable`: an emitted program as the runtime takes it: source text, memory layout, weight geometry. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import TreeSpec

from runtime.layout import Layout


@dataclass(frozen=True)
class WeightView:
    """Geometry of one weight in an arena; `nbytes` is the span that its strides reach.

    Operators get it with the original's `requires_grad`: without autograd too, `matmul` chooses its kernels by that.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    state: bool
    requires_grad: bool = False

    def on(self, buffer: torch.Tensor, offset: int) -> torch.Tensor:
        """The weight as a view of a byte buffer (uint8, 1-d) from byte `offset` on."""
        if self.nbytes == 0:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=buffer.device)
        flat = buffer[offset : offset + self.nbytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())

    def operand(self, buffer: torch.Tensor, offset: int) -> torch.Tensor:
        """As `on`, as operators see it: no view to autograd, or its transpose would forget `requires_grad`."""
        return self.on(buffer, offset).detach().requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Executable:
    """Runs as `program(rt, w, device, *inputs) -> list of leaves`; weights and constants are keyed by placeholder name."""

    name: str
    source: str
    layout: Layout
    weights: Mapping[str, WeightView]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[str, ...]
    out_spec: TreeSpec
    predicted: Mapping[str, float] = field(default_factory=dict)
