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


# Of every dimension of a tensor the elements [start, stop).
Box = tuple[tuple[int, int], ...]


def box(part: TensorSpec, whole: TensorSpec) -> Box | None:
    """Which elements of every dimension of a tensor a view of it is, of the same rank or one of a stack; None for others."""
    shape, stride = part.shape, part.stride
    if len(shape) == len(whole.shape) - 1:
        shape, stride = (1, *shape), (whole.stride[0], *stride)
    if len(shape) != len(whole.shape) or part.dtype != whole.dtype or not _is_apart(whole):
        return None
    if 0 in shape:
        return tuple((0, 0) for _ in shape)
    found, rest = [(0, 1)] * len(shape), part.offset - whole.offset
    for dim in sorted(range(len(shape)), key=lambda d: -whole.stride[d]):
        if whole.shape[dim] == 1:
            if shape[dim] != 1:
                return None
            continue
        start, rest = divmod(rest, whole.stride[dim])
        if shape[dim] > 1 and stride[dim] != whole.stride[dim]:
            return None
        found[dim] = start, start + shape[dim]
    inside = all(start >= 0 and stop <= size for (start, stop), size in zip(found, whole.shape, strict=True))
    return tuple(found) if inside and not rest else None


def _is_apart(whole: TensorSpec) -> bool:
    """Whether no two elements are in one place, and those of each dimension lie within one step of the next larger one."""
    span = 1
    for stride, size in sorted((s, n) for s, n in zip(whole.stride, whole.shape, strict=True) if n > 1):
        if stride < span:
            return False
        span = stride * size
    return True


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes of one tensor have an element in common."""
    return all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True))


def contains(outer: Box, inner: Box) -> bool:
    """Whether all of a box is in another."""
    empty = any(start >= stop for start, stop in inner)
    return empty or all(a[0] <= b[0] and b[1] <= a[1] for a, b in zip(outer, inner, strict=True))


def follows(one: Box, other: Box, dim: int) -> bool:
    """Whether a box begins where another one ends, along one dimension, and is as large along all others."""
    pairs = enumerate(zip(one, other, strict=True))
    return all(a[1] == b[0] if d == dim else a == b for d, (a, b) in pairs)


def joined(boxes: list[Box], more: Box) -> list[Box]:
    """The same elements as those of all the boxes and one more, in as few as are found by joining neighbours."""
    for i, known in enumerate(boxes):
        for dim in range(len(more)):
            for first, second in ((known, more), (more, known)):
                if follows(first, second, dim):
                    whole = (*first[:dim], (first[dim][0], second[dim][1]), *first[dim + 1 :])
                    return joined([*boxes[:i], *boxes[i + 1 :]], whole)
    return [*boxes, more]


def span(spec: TensorSpec) -> tuple[int, int]:
    """From the first element that a tensor reaches to behind the last one, in its storage."""
    if 0 in spec.shape:
        return spec.offset, spec.offset
    return spec.offset, spec.offset + 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True))


def is_whole(parts: list[Cut], shape: Sequence[int]) -> bool:
    """Whether the intervals are of one dimension, one after the other, from its beginning to its end."""
    if len({part.dim for part in parts}) != 1:
        return False
    ends = [(0, 0), *sorted((part.start, part.stop) for part in parts)]
    return ends[-1][1] == shape[parts[0].dim] and all(before[1] == after[0] for before, after in pairwise(ends))
