"""A pipeline of three components of a few lines, whose Python can be told to do something else than it was planned to."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from planner.machine import Machine
from tests.planner.toys import Mlp


class Chain(DiffusionPipeline):
    """`first` once, `second` as often as asked, `third` once; or whatever `detour` does with them."""

    def __init__(self, first: nn.Module, second: nn.Module, third: nn.Module) -> None:
        super().__init__()
        self.register_modules(first=first, second=second, third=third)
        self.detour: Callable[[Chain, torch.Tensor], torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, steps: int = 3) -> torch.Tensor:
        if self.detour is not None:
            return self.detour(self, x)
        x = self.first(x)
        for _ in range(steps):
            x = self.second(x) / 2
        result: torch.Tensor = self.third(x)
        return result


def chain(layers: Sequence[Sequence[int]]) -> Chain:
    """Components of so many hidden features, layer by layer."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these are no classes of diffusers
        return Chain(*(nn.Sequential(*(Mlp(hidden) for hidden in each)).eval() for each in layers))


def slow_link(seconds_per_mib: float) -> Machine:
    """An RTX 4090 whose copies begin at once and take so long."""
    preset: Any = Machine.preset("rtx-4090")
    return dataclasses.replace(preset, link_seconds=(), link_latency_seconds=1e-7, link_bandwidth=2**20 / seconds_per_mib)
