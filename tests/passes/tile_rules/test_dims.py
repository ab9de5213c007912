"""Dimensions moved, added, removed and repeated, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from tests.passes.tile_rules.harness import call_on, check_tiles, cuts_of
from tests.passes.tile_rules.moves import check_parts, parts_of, shapes, tensors

aten = torch.ops.aten


def check_any_part(data: st.DataObject, target: Any, args: tuple[Any, ...]) -> None:
    """A random part of every result together."""
    whole = target(*args)
    results = whole if isinstance(whole, (tuple, list)) else [whole]
    check_parts(target, args, [data.draw(parts_of(result.shape)) for result in results])


@given(st.data())
def test_permuted(data: st.DataObject) -> None:
    x = data.draw(tensors(data.draw(shapes())))
    order = [dim - x.ndim * data.draw(st.booleans()) for dim in data.draw(st.permutations(range(x.ndim)))]
    check_any_part(data, aten.permute.default, (x, order))
    one, other = data.draw(st.integers(-x.ndim, x.ndim - 1)), data.draw(st.integers(-x.ndim, x.ndim - 1))
    for target in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        check_any_part(data, target, (x, one, other))


@given(st.data())
def test_moved(data: st.DataObject) -> None:
    x = data.draw(tensors(data.draw(shapes())))
    dim = st.integers(-x.ndim, x.ndim - 1)
    check_any_part(data, aten.movedim.int, (x, data.draw(dim), data.draw(dim)))
    count = data.draw(st.integers(1, x.ndim))
    source, destination = (data.draw(st.permutations(range(x.ndim)))[:count] for _ in range(2))
    check_any_part(data, aten.movedim.intlist, (x, [d - x.ndim for d in source], destination))
    check_any_part(data, aten.moveaxis.intlist, (x, source, destination))


@given(st.data())
def test_transposed(data: st.DataObject) -> None:
    matrix = data.draw(tensors(data.draw(shapes(2, 2))))
    for target in (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default, aten.matrix_H.default):
        check_any_part(data, target, (matrix,))
    check_any_part(data, aten.t.default, (data.draw(tensors(data.draw(shapes(1, 1)))),))
    many = data.draw(tensors(data.draw(shapes(2))))
    for target in (aten.numpy_T.default, aten.mT.default, aten.mH.default):
        check_any_part(data, target, (many,))


@given(st.data())
def test_squeezed(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4))
    shape.insert(data.draw(st.integers(0, len(shape))), 3)
    x = data.draw(tensors(shape))
    some = data.draw(st.sets(st.integers(0, x.ndim - 1)))
    check_any_part(data, aten.squeeze.default, (x,))
    check_any_part(data, aten.squeeze.dim, (x, data.draw(st.integers(-x.ndim, x.ndim - 1))))
    check_any_part(data, aten.squeeze.dims, (x, [d - x.ndim * data.draw(st.booleans()) for d in sorted(some)]))


def test_a_part_of_one_element_keeps_its_dimension() -> None:
    x = torch.randn(1, 3, 2, dtype=torch.float64)
    check_tiles(aten.squeeze.default, (x,), 0, [0, 1, 2, 3])
    check_tiles(aten.squeeze.dim, (x, 1), 1, [0, 1, 2, 3])


@given(st.data())
def test_unsqueezed(data: st.DataObject) -> None:
    x = data.draw(tensors(data.draw(shapes())))
    check_any_part(data, aten.unsqueeze.default, (x, data.draw(st.integers(-x.ndim - 1, x.ndim))))


@given(st.data())
def test_expanded(data: st.DataObject) -> None:
    target = data.draw(shapes())
    skipped = data.draw(st.integers(0, len(target)))
    ones = data.draw(st.lists(st.booleans(), min_size=len(target), max_size=len(target)))
    shape = [1 if one else n for n, one in zip(target, ones, strict=True)][skipped:]
    x, other = data.draw(tensors(shape)), torch.zeros(target)
    asked = [-1 if d >= skipped and shape[d - skipped] == n and data.draw(st.booleans()) else n for d, n in enumerate(target)]
    check_any_part(data, aten.expand.default, (x, asked))
    check_any_part(data, aten.broadcast_to.default, (x, asked))
    check_any_part(data, aten.expand_as.default, (x, other))
    check_any_part(data, aten.broadcast_tensors.default, ([x, data.draw(tensors(target))],))


def test_a_result_that_nobody_wants_needs_nothing() -> None:
    call, _, _ = call_on(aten.broadcast_tensors.default, ([torch.zeros(3, 1), torch.zeros(4)],))
    assert tile(call, None, Part(1, 1, 2)).needs == (Part(0, 0, 0), Part(0, 1, 2))


@given(st.data())
def test_repeated(data: st.DataObject) -> None:
    x = data.draw(tensors(data.draw(shapes(0, 3, 4))))
    repeats = st.lists(st.integers(1, 3), min_size=max(x.ndim, 1), max_size=4)
    check_any_part(data, aten.repeat.default, (x, data.draw(repeats)))
    if x.ndim:
        check_any_part(data, aten.tile.default, (x, data.draw(st.lists(st.integers(1, 3), max_size=4))))


@given(st.data())
def test_complex(data: st.DataObject) -> None:
    shape = data.draw(shapes(1, 3))
    x = data.draw(tensors(shape, torch.complex128))
    dim = data.draw(st.integers(0, len(shape) - 1))
    cuts = data.draw(cuts_of(shape[dim]))
    for target in (aten.view_as_real.default, aten.real.default, aten.imag.default, aten.mH.default)[
        : None if len(shape) > 1 else 3
    ]:
        check_tiles(target, (x,), dim, cuts if target is not aten.mH.default else [0, target(x).shape[dim]])
    check_tiles(aten.view_as_complex.default, (torch.randn([*shape, 2], dtype=torch.float64),), dim, cuts)
    with pytest.raises(Untileable, match="makes its last dimension of all of its input"):
        check_tiles(aten.view_as_real.default, (x,), len(shape), [0, 1])


def test_a_complex_view_of_values_whose_strides_do_not_suit() -> None:
    whole = torch.randn(5, 2, dtype=torch.float64)
    call, _, _ = call_on(aten.view_as_complex.default, (whole,))
    odd = torch.randn(2, 3, dtype=torch.float64).t()[1:, :]
    found = tile(call, Part(0, 1, 3)).compute(lambda target, *args, **kwargs: target(*args, **kwargs), [odd])
    assert torch.equal(found, torch.complex(odd[:, 0], odd[:, 1]))


def test_memory_is_not_read_by_strides() -> None:
    with pytest.raises(Untileable, match="reads its input's memory"):
        check_tiles(aten.as_strided.default, (torch.zeros(4), [2, 2], [1, 1]), 0, [0, 1])


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.permute.default, ([2, 1, 0, 3],)),
        (aten.squeeze.default, ()),
        (aten.unsqueeze.default, (1,)),
        (aten.expand.default, ([3, 0, 4, 6],)),
        (aten.repeat.default, ([1, 2, 2, 0],)),
        (aten.slice.Tensor, (2, 0, 0)),
        (aten.split.Tensor, (2, 2)),
        (aten.unbind.int, (3,)),
        (aten.pad.default, ([1, 1, 2, 0])),
        (aten.unfold.default, (2, 2, 1)),
        (aten.pixel_unshuffle.default, (1,)),
    ],
    ids=str,
)
def test_tensors_without_elements(target: Any, args: tuple[Any, ...]) -> None:
    x = torch.zeros(3, 0, 4, 1, dtype=torch.float64)
    args = (x, list(args)) if target is aten.pad.default else (x, *args)
    results = target(*args)
    shape = (results[0] if isinstance(results, (tuple, list)) else results).shape
    for dim, size in enumerate(shape):
        if size:
            check_tiles(target, args, dim, [0, 1, size] if size > 1 else [0, 1])


@pytest.mark.parametrize("target", [aten.cat.default, aten.stack.default])
@pytest.mark.parametrize("joined", [0, 1, 2])
def test_joined_tensors_without_elements(target: Any, joined: int) -> None:
    x = torch.zeros(3, 0, 4, dtype=torch.float64)
    for dim, size in enumerate(target([x, x], joined).shape):
        if size:
            check_tiles(target, ([x, x], joined), dim, [0, 1, size])
