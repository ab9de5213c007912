"""Modules without weights: parameters on the meta device, buffers real, as the libraries themselves load checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import accelerate
import torch
from torch import nn


@contextlib.contextmanager
def without_weights(dtype: torch.dtype) -> Iterator[None]:
    """Modules made within it have parameters without bytes, of `dtype` where a module does not say; none is initialised.

    Buffers keep their values: rotary frequencies and position numbers are computed when a module is made and are in no
    checkpoint. Ties between parameters are lost; the library's own `tie_weights` makes them again.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with accelerate.init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(before)


def keep_in_float32(module: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Makes the parameters whose names are `wanted` float32, ties kept; for parameters on the meta device."""
    made: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is None or not parameter.dtype.is_floating_point or not wanted(f"{path}.{key}".lstrip(".")):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.detach().to(torch.float32), parameter.requires_grad)
            owner._parameters[key] = made[id(parameter)]
