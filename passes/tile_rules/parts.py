"""What several rules say of parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from passes.spec import TensorSpec
from passes.tile_rules.base import Part, Run, Untileable

aten = torch.ops.aten


def sliced(run: Run, value: Any, part: Part, size: int) -> Any:
    """The part of a value that has `size` elements along the dimension; the value itself where that is all of it."""
    if (part.start, part.stop) == (0, size):
        return value
    return run(aten.slice.Tensor, value, part.dim, part.start, part.stop)


def nothing(spec: TensorSpec) -> Part | None:
    """The need of a tensor of which nothing is read: an empty part where it has a dimension."""
    return Part(0, 0, 0) if spec.shape else None


def agreed(parts: Sequence[Part]) -> Part:
    """The hull of what several results need of one tensor.

    Raises:
        Untileable: they need parts of different dimensions.
    """
    if len({part.dim for part in parts}) > 1:
        raise Untileable("has results that are wanted in parts of different dimensions")
    hull = parts[0]
    for part in parts[1:]:
        hull = hull.hull(part)
    return hull
