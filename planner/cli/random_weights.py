"""Random weights for a module that has none: views of a few small blocks, so that making them costs neither time nor memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

_STEP = 61  # between rows: odd, so that rows of a power of two do not repeat


class RandomWeights(Mapping[str, torch.Tensor]):
    """Weights by name for every parameter of `module` that is on the meta device, of a size that keeps activations finite.

    A matrix is a window that slides over one row of normal numbers (a Toeplitz matrix, of full rank), scaled by its fan-in;
    vectors called `weight` are near one, as norms are, and others near zero.
    """

    def __init__(self, module: nn.Module, seed: int = 0) -> None:
        self._specs = {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.is_meta}
        self._generator = torch.Generator().manual_seed(seed)
        self._blocks: dict[tuple[torch.dtype, int, bool], torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        spec = self._specs[name]
        rows, fan_in = (spec.shape[0], spec[0].numel()) if spec.dim() > 1 else (1, spec.numel())
        norm = spec.dim() == 1 and name.endswith("weight")
        scale = 1 / math.sqrt(max(fan_in, 1)) if spec.dim() > 1 else 0.02
        block = self._block(spec.dtype, (rows - 1) * _STEP + fan_in, scale, norm)
        inner = torch.empty(spec.shape[1:], device="meta").stride() if spec.dim() > 1 else ()
        return block.as_strided(spec.shape, (_STEP, *inner) if spec.dim() > 1 else (1,) * spec.dim())

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _block(self, dtype: torch.dtype, length: int, scale: float, norm: bool) -> torch.Tensor:
        key = (dtype, round(1 / scale), norm)
        known = self._blocks.get(key)
        if known is None or known.numel() < length:
            values = torch.randn(length, generator=self._generator) * scale + norm
            known = self._blocks[key] = values.to(dtype)
        return known
