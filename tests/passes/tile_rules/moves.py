"""Holds the rules of operators that only move elements against those operators: the values, and that no need is too large."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

from passes.tile_rules import Part, tile
from tests.passes.tile_rules.harness import assert_close, call_on, cut, run


def listed(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def check_parts(target: Any, args: Sequence[Any], parts: Sequence[Part | None], kwargs: dict[str, Any] | None = None) -> None:
    """The parts of the results, computed by the rule, are those of the whole, and each need is the hull of what is read.

    What is read is seen by numbering the elements of all tensors: an operator that moves elements shows which ones it took.

    Raises:
        Untileable: the rule declines.
    """
    call, tensors, whole = call_on(target, args, kwargs)
    tiled = tile(call, *parts)
    assert len(tiled.needs) == len(tensors)
    found = listed(tiled.compute(run, [cut(t, need) for t, need in zip(tensors, tiled.needs, strict=True)]))
    for part, ours, theirs in zip(parts, found, listed(whole), strict=True):
        if part is not None:
            assert_close(ours, theirs.narrow(part.dim, part.start, part.size), 0.0)
    if any(result.numel() for result in listed(whole)):  # what is empty may need anything
        for need, read in zip(tiled.needs, elements_read(target, args, parts, kwargs), strict=True):
            assert_minimal(need, read)


def elements_read(
    target: Any, args: Sequence[Any], parts: Sequence[Part | None], kwargs: dict[str, Any] | None = None
) -> list[torch.Tensor]:
    """For each tensor which elements are read, as a mask of its shape."""
    starts = [1000]  # not what anything is padded with

    def numbered(tensor: torch.Tensor) -> torch.Tensor:
        starts.append(starts[-1] + tensor.numel())
        # In the tensor's own memory layout: a view may depend on it.
        return torch.empty_like(tensor, dtype=torch.float64).copy_(
            torch.arange(starts[-2], starts[-1], dtype=torch.float64).reshape(tensor.shape)
        )

    args_, kwargs_ = tree_map_only(torch.Tensor, numbered, (tuple(args), kwargs or {}))
    results = listed(target(*args_, **kwargs_))
    wanted = [r.narrow(p.dim, p.start, p.size).reshape(-1) for r, p in zip(results, parts, strict=True) if p is not None]
    seen = torch.cat(wanted).unique().long()
    shapes: list[torch.Size] = []
    tree_map_only(torch.Tensor, lambda t: shapes.append(t.shape), (tuple(args), kwargs or {}))
    return [
        torch.isin(torch.arange(start, stop), seen).reshape(shape)
        for (start, stop), shape in zip(pairwise(starts), shapes, strict=True)
    ]


def hull_along(read: torch.Tensor, dim: int) -> tuple[int, int]:
    """The interval of one dimension in which something is read."""
    where = read.movedim(dim, 0).reshape(read.shape[dim], -1).any(1).nonzero().flatten().tolist()
    return (where[0], where[-1] + 1) if where else (0, 0)


def assert_minimal(need: Part | None, read: torch.Tensor) -> None:
    """The need is the hull of what is read; all of a tensor is needed only where no dimension's hull is smaller.

    Of a tensor without elements any need is right.
    """
    if not read.numel():
        return
    if need is None:
        assert not read.any() or all(hull_along(read, dim) == (0, size) for dim, size in enumerate(read.shape))
        return
    start, stop = hull_along(read, need.dim)
    assert need.size == stop - start
    assert not need.size or need.start == start


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random values under random strides: contiguous, permuted in memory, or every second of a larger tensor."""
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else list(range(len(shape)))
    step = draw(st.sampled_from([1, 1, 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dense = torch.randn([shape[dim] * step for dim in order], generator=generator, dtype=dtype)
    spaced = dense[tuple(slice(0, None, step) for _ in order)]
    return spaced.permute([order.index(dim) for dim in range(len(shape))])


@st.composite
def parts_of(draw: st.DrawFn, shape: Sequence[int], dim: int | None = None) -> Part:
    """Any interval that is not empty, of any dimension or this one."""
    dim = draw(st.integers(0, len(shape) - 1)) if dim is None else dim
    start = draw(st.integers(0, shape[dim] - 1))
    return Part(dim, start, draw(st.integers(start + 1, shape[dim])))


def shapes(least: int = 1, most: int = 4, largest: int = 5) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, largest), min_size=least, max_size=most)
