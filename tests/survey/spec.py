"""What the tables of diffusers' models are written in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Random:
    """A tensor to be drawn: `kind` is normal, uniform, integers (below `high`), ones or bool ones."""

    kind: str
    shape: tuple[int, ...]
    high: int = 0

    def draw(self, g: torch.Generator) -> torch.Tensor:
        if self.kind == "normal":
            return torch.randn(self.shape, generator=g)
        if self.kind == "uniform":
            return torch.rand(self.shape, generator=g)
        if self.kind == "integers":
            return torch.randint(0, self.high, self.shape, generator=g)
        return torch.ones(self.shape, dtype=torch.bool if self.kind == "bools" else torch.int64)


def N(*shape: int) -> Random:
    return Random("normal", shape)


def U(*shape: int) -> Random:
    return Random("uniform", shape)


def I(high: int, *shape: int) -> Random:  # noqa: E743 - one letter each, to keep the tables readable
    return Random("integers", shape, high)


def ONES(*shape: int) -> Random:
    return Random("ones", shape)


def BOOLS(*shape: int) -> Random:
    return Random("bools", shape)


@dataclass(frozen=True)
class Entry:
    """A class of diffusers, its configuration, the arguments of one of its methods."""

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    method: str = "forward"
    variant: str = ""
    setup: tuple[str, ...] = ()  # methods to call once, such as enable_tiling

    @property
    def name(self) -> str:
        name = self.kind if self.method == "forward" else f"{self.kind}.{self.method}"
        return f"{name}:{self.variant}" if self.variant else name
