"""Modules whose Python asks for values: branches, routing to experts, sizes that only the data knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 32


def mlp(hidden: int, width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Branch(nn.Module):
    """Two branches of different size, taken by the sign of a sum; the root reads a parameter of its own."""

    def __init__(self, width: int = WIDTH, hidden: int = 64) -> None:
        super().__init__()
        self.before, self.small, self.large = nn.Linear(width, width), mlp(hidden, width), mlp(2 * hidden, width)
        self.scale = nn.Parameter(torch.full((width,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x) * self.scale
        return self.large(h) if h.sum() > 0 else self.small(h)


class Loop(nn.Module):
    """Halves until it is small: how often only the data knows."""

    def __init__(self) -> None:
        super().__init__()
        self.step = mlp(64)

    def forward(self, x: Tensor) -> Tensor:
        turns = 0
        while x.abs().max() > 0.5 and turns < 5:
            x, turns = self.step(x) / 2, turns + 1
        return x


class Experts(nn.Module):
    """Each row goes to one expert, chosen by index; no expert runs without rows."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList(mlp(64) for _ in range(count))
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(-1)
            if rows.numel() == 0:
                continue
            y.index_add_(0, rows, expert(x[rows]) * weight[rows, None])
        return self.after(y)


class MaskedExperts(Experts):
    """As `Experts`, by boolean masks."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mask = chosen == index
            if mask.any():
                y[mask] = expert(x[mask])
        return self.after(y)


class CountedExperts(Experts):
    """As `Experts`, by counts that leave torch: no fake tensor can follow."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        order = chosen.argsort()
        ends = torch.bincount(chosen, minlength=len(self.experts)).cpu().numpy().cumsum(0)
        y, start = torch.zeros_like(x), 0
        for expert, end in zip(self.experts, ends, strict=True):
            if start < end:
                y[order[start:end]] = expert(x[order[start:end]])
            start = end
        return self.after(y)


class Layers(nn.Module):
    """Blocks of which each holds a module whose sizes depend on values."""

    def __init__(self, inner: type[nn.Module] = CountedExperts, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": mlp(96), "inner": inner()}) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["inner"](x + block["up"](x))
        return x


class Padded(nn.Module):
    """Its Python takes a padding out of a buffer, as Encodec's convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("padding", torch.tensor(3))
        self.layer = nn.Conv1d(WIDTH, WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(nn.functional.pad(x, (int(self.padding), 0)))  # type: ignore[no-any-return]


def rows(count: int = 12, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) + shift
