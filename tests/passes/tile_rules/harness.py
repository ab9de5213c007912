"""Holds a tile rule against the whole operator, on real tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.spec import TensorSpec
from passes.tile_rules import Part, TileCall, reduce_parts, tile

TOLERANCE = 1e-12


def call_on(target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> tuple[TileCall, list[torch.Tensor], Any]:
    """The call by geometry, its tensors in order, and what the whole operator gives."""
    tensors = [leaf for leaf in tree_leaves((tuple(args), kwargs or {})) if isinstance(leaf, torch.Tensor)]
    storages: dict[int, int] = {}

    def spec(tensor: torch.Tensor) -> TensorSpec:
        return TensorSpec.of(tensor, storages.setdefault(tensor.untyped_storage()._cdata, len(storages)))

    args_, kwargs_ = tree_map_only(torch.Tensor, spec, (tuple(args), kwargs or {}))
    whole = target(*args, **(kwargs or {}))
    outputs = tuple(spec(t) for t in tree_leaves(whole) if isinstance(t, torch.Tensor))
    return TileCall(target, args_, kwargs_, outputs), tensors, whole


def run(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def cut(tensor: torch.Tensor, part: Part | None) -> torch.Tensor:
    """The part itself; a rule may ask for nothing that is not there."""
    if part is None:
        return tensor
    assert 0 <= part.start <= part.stop <= tensor.shape[part.dim], f"{part} of {tuple(tensor.shape)}"
    return tensor.narrow(part.dim, part.start, part.size)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal up to the tolerance, relative to the largest value; infinities and NaN in the same places."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    if not (wanted.is_floating_point() or wanted.is_complex()):
        assert torch.equal(found, wanted)
        return
    finite = wanted.isfinite()
    assert torch.equal(finite, found.isfinite())
    torch.testing.assert_close(found[~finite], wanted[~finite], equal_nan=True)
    if finite.any():
        worst = (found[finite] - wanted[finite]).abs().max()
        assert worst <= tolerance * max(1.0, float(wanted[finite].abs().max())), f"differs by {float(worst)}"


def check_tiles(
    target: Any, args: Sequence[Any], dim: int, cuts: Sequence[int], kwargs: dict[str, Any] | None = None, output: int = 0
) -> None:
    """Every interval between neighbours of `cuts` of one result, computed by the rule, is that part of the whole.

    Raises:
        Untileable: the rule declines; a test that expects it says so with `pytest.raises`.
    """
    call, tensors, whole = call_on(target, args, kwargs)
    results = list(whole) if isinstance(whole, (tuple, list)) else [whole]
    for start, stop in pairwise(cuts):
        parts: list[Part | None] = [None] * len(results)
        parts[output] = Part(dim, start, stop)
        tiled = tile(call, *parts)
        assert len(tiled.needs) == len(tensors)
        found = tiled.compute(run, [cut(t, need) for t, need in zip(tensors, tiled.needs, strict=True)])
        if isinstance(whole, (tuple, list)):
            found = found[output]
        assert_close(found, results[output].narrow(dim, start, stop - start))


def check_reduction(
    target: Any, args: Sequence[Any], dim: int, cuts: Sequence[int], kwargs: dict[str, Any] | None = None
) -> None:
    """The partial results of all intervals of the first tensor, merged, are the whole result. `cuts`: from 0 to its size.

    Raises:
        Untileable: the rule declines.
    """
    call, tensors, whole = call_on(target, args, kwargs)
    partial, merge = [], None
    for start, stop in pairwise(cuts):
        reduced = reduce_parts(call, Part(dim, start, stop))
        partial.append(reduced.partial(run, [cut(t, need) for t, need in zip(tensors, reduced.needs, strict=True)]))
        merge = reduced.merge
    assert merge is not None
    assert_close(merge(run, torch.stack(partial)), whole)


@st.composite
def cuts_of(draw: st.DrawFn, size: int, most: int = 4) -> list[int]:
    """Ascending positions from 0 to `size` that cut it into at most `most` parts, none empty."""
    inner = draw(st.sets(st.integers(1, size - 1), max_size=most - 1)) if size > 1 else set()
    return [0, *sorted(inner), size]
