"""Validation: what a plan gives beside what the module itself gives, on inputs that the user hands in.

A plan computes what was captured, bit for bit. The capture itself may differ from the module: some models take another branch
while they are exported (explicit attention masks), some draw random numbers.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only

from planner.isolate import random_draws
from planner.plain_state import PlainState
from runtime.errors import PlannerError


@dataclass(frozen=True)
class Validation:
    """The output of the planned module against the module's own.

    Attributes:
        equal: bit for bit, structure included.
        max_error: largest absolute difference; relative_error: largest |a - b| / |b| (2-norms) of an output. Both are infinite
            where shapes or structure differ.
        draws: whether the module draws random numbers; both runs were given the same.
        casts: how many weights the plan stores in a smaller type.
    """

    equal: bool
    max_error: float
    relative_error: float
    draws: bool
    casts: int = 0

    def __str__(self) -> str:
        drawn = ", which draws random numbers (the same were given to both)" if self.draws else ""
        if self.equal:
            return f"equal to the module's own output, bit for bit{drawn}"
        stored = "1 weight is" if self.casts == 1 else f"{self.casts} weights are"
        why = f"{stored} stored in a smaller type" if self.casts else "the module computes otherwise while it is captured"
        return (
            f"differs from the module's own output by at most {self.max_error:.3g} (relative {self.relative_error:.3g})"
            f"{drawn}: {why}"
        )


def run_alike(module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0) -> Any:
    """One call under fixed random state, on inputs of its own; all generators, and the module, are as before afterwards."""
    own_args, own_kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    with untouched(module), random_draws(), torch.no_grad():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return run(*own_args, **own_kwargs)


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Puts back what calls of the module change in it: attributes, lists, dicts and buffers."""
    held = PlainState(module)
    saved: list[tuple[Any, Any]] = []
    for owner in module.modules():
        containers = [v for v in owner.__dict__.values() if type(v) in (list, dict)]
        saved += [(c, c.copy()) for c in (owner.__dict__, owner._parameters, owner._buffers, *containers)]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for container, content in saved:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        held.restore()
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):  # NaN counts as changed, and is written again
                    buffer.copy_(value)


def compare(planned: Any, own: Any, draws: bool, casts: int = 0) -> Validation:
    """Two results of one call; the plan has so many `casts`."""
    (mine, spec), (others, other_spec) = tree_flatten(planned), tree_flatten(own)
    if spec != other_spec:
        return Validation(False, float("inf"), float("inf"), draws)
    equal, most, relative = True, 0.0, 0.0
    for a, b in zip(mine, others, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            equal &= type(a) is type(b) and bool(a == b)
        elif (a.shape, a.dtype) != (b.shape, b.dtype):
            return Validation(False, float("inf"), float("inf"), draws)
        elif not torch.equal(_bits(a), _bits(b)):
            equal = False
            difference = (a.to(torch.float64, copy=True) - b.to(a.device)).abs() if not a.is_complex() else (a - b).abs()
            most = max(most, float(difference.max()))
            relative = max(relative, float(difference.norm() / b.to(difference).norm().clamp_min(1e-300)))
    return Validation(equal, most, relative, draws, casts)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach().resolve_conj().cpu().contiguous().reshape(-1)
    return dense.view(torch.uint8) if dense.numel() else dense.new_empty(0, dtype=torch.uint8)


def refuse_without_weights(module: nn.Module) -> None:
    """Raises PlannerError for a module on the meta device: there is nothing to compare with."""
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise PlannerError(
            f"{type(module).__name__} is on the meta device, so it has no output of its own to compare with; validate the plan "
            "of a module with weights"
        )
