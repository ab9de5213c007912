"""Attention as one operator, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.tile_rules import Part, Untileable, tile
from tests.passes.tile_rules.harness import call_on, check_tiles, cuts_of, run

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SIZES = st.integers(1, 5)


def heads_of(*shape: int) -> Tensor:
    """[..., heads, tokens, features] as models make it: a transposed view of [..., tokens, heads, features]."""
    if len(shape) < 3:
        return torch.randn(shape, dtype=torch.float64)
    return torch.randn(*shape[:-3], shape[-2], shape[-3], shape[-1], dtype=torch.float64).transpose(-2, -3)


def check_all(data: st.DataObject, args: tuple[Any, ...], kwargs: dict[str, Any], refusable: bool = False) -> None:
    """Every dimension of the result, cut at random; heads that share keys unevenly may be refused where all would be needed."""
    for dim, size in enumerate(SDPA(*args, **kwargs).shape):
        cuts = data.draw(cuts_of(size))
        try:
            check_tiles(SDPA, args, dim, cuts, kwargs)
        except Untileable:
            assert refusable
            assert dim == args[0].dim() - 3


@st.composite
def masks(draw: st.DrawFn, batch: list[int], queries: int, keys: int) -> Tensor | None:
    """None, booleans (rows of which may be all false) or numbers (some -inf), broadcast along any dimension."""
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind == "none":
        return None
    full = [*batch, queries, keys]
    skipped = draw(st.integers(0, len(batch)))
    shape = [draw(st.sampled_from([1, size])) for size in full[skipped:]]
    allowed = torch.rand(shape) > draw(st.sampled_from([0.0, 0.4, 0.8]))
    return allowed if kind == "bool" else torch.randn(shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)


@given(st.data())
def test_queries_keys_masks(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch = data.draw(st.lists(SIZES, max_size=2))
    queries, keys, features = data.draw(SIZES), data.draw(SIZES), data.draw(SIZES)
    values = data.draw(st.sampled_from([features, features, 3]))
    causal = data.draw(st.booleans())
    mask = None if causal else data.draw(masks(batch, queries, keys))
    kwargs = {"is_causal": causal, "scale": data.draw(st.sampled_from([None, 0.5]))}
    args = heads_of(*batch, queries, features), heads_of(*batch, keys, features), heads_of(*batch, keys, values), mask
    check_all(data, args, kwargs)


@given(st.data())
def test_batches_that_broadcast(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch = data.draw(st.lists(SIZES, min_size=1, max_size=2))

    def some() -> list[int]:
        return [data.draw(st.sampled_from([1, size])) for size in batch][data.draw(st.integers(0, len(batch))) :]

    args = heads_of(*batch, 3, 4), heads_of(*some(), 5, 4), heads_of(*some(), 5, 4)
    check_all(data, args, {"is_causal": data.draw(st.booleans())})


@given(st.data())
def test_heads_that_share_keys(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    shared, per_key, per_value = (data.draw(st.integers(1, 3)) for _ in range(3))
    heads = shared * per_key * per_value
    batch = data.draw(st.lists(st.integers(1, 2), min_size=0, max_size=1))
    q, k, v = (heads_of(*batch, n, 4, 3) for n in (heads, heads // per_key, heads // per_value))
    causal = data.draw(st.booleans())
    mask = None if causal else data.draw(masks([*batch, heads], 4, 4))
    check_all(data, (q, k, v, mask), {"is_causal": causal, "enable_gqa": True}, refusable=True)


def test_causal_parts_read_no_later_keys_and_build_no_mask_they_do_not_need() -> None:
    q, k = torch.randn(1, 2, 6, 4, dtype=torch.float64), torch.randn(1, 2, 4, 4, dtype=torch.float64)
    call, _, _ = call_on(SDPA, (q, k, k), {"is_causal": True})

    def calls(start: int, stop: int) -> tuple[int, list[Any]]:
        tiled = tile(call, Part(2, start, stop))
        seen: list[Any] = []

        def note(target: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(target)
            return run(target, *args, **kwargs)

        need = tiled.needs[1]
        assert need is not None
        tiled.compute(note, [q[:, :, start:stop], k[:, :, : need.stop], k[:, :, : need.stop]])
        return need.stop, seen

    assert calls(0, 2) == (2, [SDPA])
    assert calls(1, 3) == (3, [aten.new_ones.default, aten.tril.default, SDPA])
    assert calls(2, 3) == (3, [SDPA])
    assert calls(2, 6) == (4, [aten.new_ones.default, aten.tril.default, SDPA])
    assert calls(3, 6) == (4, [SDPA])


@pytest.mark.parametrize("causal", [False, True])
def test_no_keys_at_all(causal: bool) -> None:
    q, k = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 0, 4, dtype=torch.float64)
    for dim in range(4):
        check_tiles(SDPA, (q, k, k), dim, [0, 1, q.shape[dim]], {"is_causal": causal})


@pytest.mark.parametrize("values", [4, 3])  # the fused kernel, and the one that is spelled out
@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_rows_that_see_no_key_are_what_the_whole_makes_of_them(kind: torch.dtype, values: int) -> None:
    allowed = torch.ones(5, 6, dtype=torch.bool)
    allowed[1:3] = False
    mask = allowed if kind == torch.bool else torch.zeros(5, 6, dtype=kind).masked_fill(~allowed, -torch.inf)
    args = tuple(torch.randn(2, 3, *shape, dtype=torch.float64) for shape in ((5, 4), (6, 4), (6, values)))
    check_tiles(SDPA, (*args, mask), 2, [0, 1, 2, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_causal_parts_are_as_accurate_as_the_whole(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 64, 16).to(dtype) for _ in range(3))
    call, _, whole = call_on(SDPA, (q, k, v), {"is_causal": True})
    exact = SDPA(q.double(), k.double(), v.double(), is_causal=True)
    parts = []
    for start in range(0, 64, 16):
        tiled = tile(call, Part(2, start, start + 16))
        keys = start + 16
        parts.append(tiled.compute(run, [q[:, :, start : start + 16], k[:, :, :keys], v[:, :, :keys]]))
    error, allowed = (found.double() - exact for found in (torch.cat(parts, 2), whole))
    assert error.abs().max() <= 2 * allowed.abs().max() + torch.finfo(dtype).eps * exact.abs().max()


def test_refused() -> None:
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    with pytest.raises(Untileable, match="drops at random"):
        check_tiles(SDPA, (x, x, x, None, 0.5), 2, [0, 2, 5])
    with pytest.raises(Untileable, match="all heads would be needed"):
        check_tiles(SDPA, (x, x[:, :2], x[:, :2]), 1, [0, 1, 4], {"enable_gqa": True})
    with pytest.raises(Untileable, match="has a mask and is causal"):
        check_tiles(SDPA, (x, x, x, torch.zeros(5, 5, dtype=torch.float64), 0.0, True), 1, [0, 1, 4])
    with pytest.raises(Untileable, match="unusual shapes"):
        check_tiles(SDPA, (x, x[:, :, :1], x), 1, [0, 1, 4])
