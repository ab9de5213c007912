"""Parts of tensors for the checker: which elements a view is of, and whether some parts are all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from passes.spec import TensorSpec


class Cut(NamedTuple):
    """The elements [start, stop) of one dimension."""

    dim: int
    start: int
    stop: int


def interval(part: TensorSpec, whole: TensorSpec) -> Cut | None:
    """Which elements of which dimension of a tensor a view of it is: an interval, or one of a stack; None for others."""
    at = part.offset - whole.offset
    if not whole.shape:
        return None
    if part.shape == whole.shape[1:] and part.stride == whole.stride[1:]:
        index, rest = divmod(at, whole.stride[0])
        return Cut(0, index, index + 1) if not rest else None
    cut = [d for d, (a, b) in enumerate(zip(part.shape, whole.shape, strict=False)) if a != b]
    if len(part.shape) != len(whole.shape) or part.stride != whole.stride or len(cut) > 1:
        return None
    dim = cut[0] if cut else 0
    start, rest = divmod(at, whole.stride[dim]) if whole.stride[dim] else (0, at)
    return Cut(dim, start, start + part.shape[dim]) if not rest else None


def begins(first: TensorSpec, whole: TensorSpec) -> bool:
    """Whether each element of a tensor is the one with the same indices of another, whose elements are all apart."""
    if first.offset != whole.offset or len(first.shape) != len(whole.shape):
        return False
    span = 1
    for stride, size in sorted((s, n) for s, n in zip(whole.stride, whole.shape, strict=True) if n > 1):
        if stride < span:
            return False
        span = stride * size
    rows = zip(first.shape, first.stride, whole.shape, whole.stride, strict=True)
    return all(size <= most and (step == stride or size == 1) for size, step, most, stride in rows)


def is_within(part: Cut, other: Cut) -> bool:
    return part.dim == other.dim and other.start <= part.start and part.stop <= other.stop


def is_whole(parts: list[Cut], shape: Sequence[int]) -> bool:
    """Whether the intervals are of one dimension, one after the other, from its beginning to its end."""
    if len({part.dim for part in parts}) != 1:
        return False
    ends = [(0, 0), *sorted((part.start, part.stop) for part in parts)]
    return ends[-1][1] == shape[parts[0].dim] and all(before[1] == after[0] for before, after in pairwise(ends))
