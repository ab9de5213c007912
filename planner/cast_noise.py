"""How well weights can be stored in smaller types: the relative error of each, measured on its values where it has any.

Of a large weight a part is measured: rows spread evenly, with their own scales and with the one that the whole would have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from passes.cast_weights import STORAGE_TYPES, Cast
from passes.castable import castable
from passes.noise import noise_gains
from passes.program import Program, Weight
from planner.solve.casting import NO_CASTS, Candidate, Casting, ordered, saved_bytes
from runtime.origins import has_no_bytes, named_tensors
from runtime.stored import quantise, scales_of

# Relative errors (of 2-norms) of normally distributed weights of 128 a row, with a scale a row.
TYPICAL = {"float8_e5m2": 0.0511, "float8_e4m3fn": 0.0255, "int8": 0.0068}
# Elements that are measured of a weight, and how much larger the error with one scale for all may be to be as good.
_SAMPLE = 1 << 18
_AS_GOOD = 1.01


def casting_of(model: nn.Module, program: Program, dtypes: Sequence[str], allowed: Callable[[str], bool]) -> Casting:
    """The weights that may be stored in one of the types, each in the one with the least error.

    `allowed`: what the user lets be cast, by the module's names.
    """
    dims = {key: dim for key, dim in castable(program).items() if allowed(program.weights[key].name)}
    if not dims:
        return NO_CASTS
    gains, tensors = noise_gains(program), named_tensors(model)
    marks = list(_marks(model))
    candidates = []
    for key, dim in dims.items():
        weight = program.weights[key]
        if any(mark.keeps(name) for name in (weight.name, *weight.aliases) for mark in marks):
            continue
        known = tensors.get(weight.name)
        options = list(_options(key, weight, dim, dtypes, None if known is None or has_no_bytes(known) else known))
        if options:
            noise, cast, measured = min(options, key=lambda option: option[0])
            saved = saved_bytes(program, key, cast.dtype)
            candidates.append(Candidate(cast, saved, noise, gains.get(key, 0.0), measured))
    return Casting(ordered(candidates))


def _options(
    key: str, weight: Weight, dim: int, dtypes: Sequence[str], values: torch.Tensor | None
) -> Iterator[tuple[float, Cast, bool]]:
    """By storage type: the error, the cast, whether it was measured. None of a weight with values that are not finite."""
    for dtype in dtypes:
        if STORAGE_TYPES[dtype].itemsize >= weight.spec.dtype.itemsize:
            continue
        if values is None:
            yield TYPICAL[dtype], Cast(key, dtype, dim), False
            continue
        sample = _sample(values, dim)
        storage = STORAGE_TYPES[dtype]
        rows, whole = (relative_noise(sample, storage, scales_of(w, storage, d)) for w, d in ((sample, dim), (values, None)))
        if not math.isfinite(rows + whole):
            continue
        yield (whole, Cast(key, dtype, None), True) if whole <= _AS_GOOD * rows else (rows, Cast(key, dtype, dim), True)


def relative_noise(weight: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor) -> float:
    """`|stored - w| / |w|` (2-norms); 0 for zeros, NaN where values are not finite."""
    values = quantise(weight, scales, dtype).float() * scales
    norm = float(weight.float().norm())
    return float((values - weight.float()).norm()) / norm if norm else 0.0


def _sample(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Some of its indices of a dimension, the first and the last among them."""
    size = weight.shape[dim]
    count = max(2, _SAMPLE * size // max(weight.numel(), 1))
    if count >= size:
        return weight.detach()
    picked = torch.linspace(0, size - 1, count, device=weight.device).round().long()
    return weight.detach().index_select(dim, picked)


@dataclass(frozen=True)
class _Mark:
    """What a module at a path (with a dot behind it) says of the weights below it."""

    prefix: str
    fits: Callable[[str], bool]

    def keeps(self, name: str) -> bool:
        return name.startswith(self.prefix) and self.fits(name.removeprefix(self.prefix))


def _marks(model: nn.Module) -> Iterator[_Mark]:
    """What models say of themselves, as diffusers and transformers have it: what is kept in fp32, what is not to be cast."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        parts = frozenset(getattr(module, "_keep_in_fp32_modules", None) or ())
        if parts:
            yield _Mark(prefix, partial(_has_part, parts))
        for pattern in getattr(module, "_skip_layerwise_casting_patterns", None) or ():
            yield _Mark(prefix, partial(_is_found, re.compile(pattern)))


def _has_part(parts: frozenset[str], name: str) -> bool:
    return not parts.isdisjoint(name.split("."))


def _is_found(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.search(name) is not None
