"""`Executable`: an emitted program as the runtime takes it: source text, memory layout, weight geometry. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import TreeSpec

from runtime.layout import Layout
from runtime.leftovers import Leftovers


@dataclass(frozen=True)
class WeightView:
    """Geometry of one weight in an arena; `nbytes` is the span that its strides reach, `grad` whether it requires gradients."""

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    state: bool
    grad: bool = False

    def on(self, buffer: torch.Tensor, offset: int) -> torch.Tensor:
        """The weight as a view of a byte buffer (uint8, 1-d) from byte `offset` on."""
        if self.nbytes == 0:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=buffer.device)
        flat = buffer[offset : offset + self.nbytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())

    def argument(self, buffer: torch.Tensor, offset: int) -> torch.Tensor:
        """As `on`, for operators: `matmul` takes another kernel, with other bits, for a weight that requires gradients.

        Detached, since what counts is whether the base of a view does.
        """
        return self.on(buffer, offset).detach().requires_grad_(self.grad)


@dataclass(frozen=True)
class Pace:
    """How long things take on the machine that was planned for: what a device without engines of its own goes by.

    `compute`: seconds of operators before each prefetch, onload and evict, in program order, and after the last of them.
    `copies`: seconds of each bundle's copy, with its bytes.
    """

    compute: tuple[float, ...]
    copies: tuple[tuple[float, int], ...]


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
    pace: Pace | None = None
    leftovers: Leftovers | None = None
