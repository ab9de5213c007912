"""Norms over rows, softmax, and norms with given statistics, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from tests.passes.tile_rules.drawing import shapes, values
from tests.passes.tile_rules.harness import call_on, check_tiles, cuts_of

aten = torch.ops.aten


@given(st.data())
def test_softmax(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x, rank = data.draw(values(shape)), len(shape)
    along, dim = data.draw(st.integers(-rank, rank - 1)), data.draw(st.integers(0, rank - 1))
    operator, args = data.draw(
        st.sampled_from(
            [
                (aten.softmax.int, (x, along)),
                (aten.softmax.int, (x.float(), along, torch.float64)),
                (aten._softmax.default, (x, along, False)),
                (aten._safe_softmax.default, (x, along)),
                (aten.log_softmax.int, (x, along)),
                (aten._log_softmax.default, (x, along, False)),
            ]
        )
    )
    cuts = data.draw(cuts_of(shape[dim]))
    if along % rank != dim:
        check_tiles(operator, args, dim, cuts)
    else:
        with pytest.raises(Untileable, match=f"normalises over dimension {dim}"):
            check_tiles(operator, args, dim, cuts)


@given(st.data())
def test_norms_of_rows(data: st.DataObject) -> None:
    shape = data.draw(shapes(2))
    rows = data.draw(st.integers(1, len(shape)))
    x, w, b = data.draw(values(shape)), data.draw(values(shape[-rows:])), data.draw(values(shape[-rows:]))
    dim = data.draw(st.integers(0, len(shape) - 1))
    operator, args, outputs = data.draw(
        st.sampled_from(
            [
                (aten.layer_norm.default, (x, shape[-rows:], w, b), 1),
                (aten.layer_norm.default, (x, shape[-rows:]), 1),
                (aten.native_layer_norm.default, (x, shape[-rows:], w, None, 1e-5), 3),
                (aten.rms_norm.default, (x, shape[-rows:], w, 1e-6), 1),
                (aten._fused_rms_norm.default, (x, shape[-rows:], w, 1e-6), 2),
            ]
        )
    )
    output = data.draw(st.integers(0, outputs - 1))
    cuts = data.draw(cuts_of(shape[dim]))
    if dim < len(shape) - rows:
        check_tiles(operator, args, dim, cuts, output=output)
    else:
        with pytest.raises(Untileable, match=f"normalises over dimension {dim}"):
            check_tiles(operator, args, dim, cuts, output=output)


def test_results_wanted_in_different_parts() -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    call, _, (y, mean, _) = call_on(aten.native_layer_norm.default, (x, [3], None, None, 1e-5))
    tiled = tile(call, Part(0, 1, 3), Part(0, 2, 5), None)
    assert tiled.needs == (Part(0, 1, 5),)
    found = tiled.compute(lambda f, *args, **kwargs: f(*args, **kwargs), [x[1:5]])
    torch.testing.assert_close(found[0], y[1:3])
    torch.testing.assert_close(found[1], mean[2:5])
    assert found[2] is None
    with pytest.raises(Untileable, match="parts of different dimensions"):
        tile(call, Part(0, 1, 3), Part(1, 0, 1), None)


@given(st.data())
def test_given_statistics(data: st.DataObject) -> None:
    shape = data.draw(shapes(2, 5, 4))
    x, channels = data.draw(values(shape)), shape[1]
    w, b, mean = (data.draw(st.none() | values([channels])) for _ in range(3))
    mean, var = (data.draw(values([channels])) for _ in range(2))
    dim = data.draw(st.integers(0, len(shape) - 1))
    given_, tail = (x, w, b, mean, var.square()), (0.1, 1e-5)
    operator, args = data.draw(
        st.sampled_from(
            [
                (aten.batch_norm.default, (*given_, False, *tail, False)),
                (aten.native_batch_norm.default, (*given_, False, *tail)),
                (aten._native_batch_norm_legit_no_training.default, (*given_, *tail)),
                *([(aten.instance_norm.default, (*given_, False, *tail, False))] if len(shape) > 2 else []),
            ]
        )
    )
    check_tiles(operator, args, dim, data.draw(cuts_of(shape[dim])))


@pytest.mark.parametrize("dim", range(4))
def test_own_statistics(dim: int) -> None:
    x, w = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    args: tuple[Any, ...] = (x, w, None, None, None, True, 0.1, 1e-5, False)
    if dim < 2:
        check_tiles(aten.instance_norm.default, args, dim, [0, 1, 3])
    else:
        with pytest.raises(Untileable, match="needs statistics over all of its input"):
            check_tiles(aten.instance_norm.default, args, dim, [0, 1, 3])
    with pytest.raises(Untileable, match="needs statistics over all of its input"):
        check_tiles(aten.batch_norm.default, args, dim, [0, 1, 3])
    running = (torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    with pytest.raises(Untileable, match="writes its running statistics"):
        check_tiles(aten.instance_norm.default, (x, None, None, *running, True, 0.1, 1e-5, False), dim, [0, 1, 3])


def test_no_part_of_statistics() -> None:
    x, each = torch.randn(2, 3, 4), torch.ones(3)
    call, _, _ = call_on(aten.native_batch_norm.default, (x, each, each, each, each, False, 0.1, 1e-5))
    with pytest.raises(Untileable, match="has statistics besides its result"):
        tile(call, None, Part(0, 0, 1), None)
