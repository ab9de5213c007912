"""Interpolation, part by part: the coordinates of the whole, whatever the tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from passes.tile_rules.resampling_axis import Axis, float32_step, is_lean, nearest_table, window
from tests.passes.tile_rules.harness import TOLERANCE, assert_close, call_on, check_tiles, cut, cuts_of, run

aten = torch.ops.aten

NEAREST = {
    1: [aten.upsample_nearest1d, aten._upsample_nearest_exact1d],
    2: [aten.upsample_nearest2d, aten._upsample_nearest_exact2d],
    3: [aten.upsample_nearest3d, aten._upsample_nearest_exact3d],
}
SMOOTH = {1: [aten.upsample_linear1d], 2: [aten.upsample_bilinear2d, aten.upsample_bicubic2d], 3: [aten.upsample_trilinear3d]}
FACTORS = st.sampled_from([2.0, 4.0, 3.0, 1.5, 0.5, 1.7]) | st.floats(0.4, 3.0)


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def calls(draw: st.DrawFn, packets: dict[int, list[Any]]) -> tuple[Any, tuple[Any, ...], torch.Tensor]:
    """An overload, its arguments and what it gives."""
    rank = draw(st.integers(1, 3))
    packet = draw(st.sampled_from(packets[rank]))
    most = {1: 40, 2: 24, 3: 9}[rank]
    sizes = draw(st.lists(st.integers(1, most), min_size=rank, max_size=rank))
    x = tensor(draw(st.integers(1, 2)), draw(st.integers(1, 3)), *sizes, seed=draw(st.integers(0, 99)))
    if draw(st.booleans()):
        x = x.transpose(0, 1)
    elif rank > 1 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last if rank == 2 else torch.channels_last_3d)
    align = () if packet in NEAREST[rank] else (draw(st.booleans()),)
    factors = draw(st.none() | st.lists(FACTORS, min_size=rank, max_size=rank))
    if factors is not None:
        factors = [max(factor, 1 / size) for factor, size in zip(factors, sizes, strict=True)]
        outs = [int(factor * size) for factor, size in zip(factors, sizes, strict=True)]
    else:
        # Often a simple ratio, so that coordinates repeat.
        outs = [draw(st.integers(1, 2 * most) | st.sampled_from([n, 2 * n, 3 * n, 4 * n, n // 2 or 1])) for n in sizes]
    if draw(st.booleans()):
        overload, args = packet.vec, (x, None if factors else outs, *align, factors)
    else:
        overload, args = packet.default, (x, outs, *align, *(factors or [None] * rank))
    return overload, args, overload(*args)


@given(st.data(), calls(NEAREST))
def test_nearest(data: st.DataObject, drawn: tuple[Any, tuple[Any, ...], torch.Tensor]) -> None:
    overload, args, whole = drawn
    dim = data.draw(st.integers(0, whole.dim() - 1))
    try:
        check_tiles(overload, args, dim, data.draw(cuts_of(whole.shape[dim])))
    except Untileable as refusal:
        if "rounding of its kernel" not in str(refusal):
            raise


@given(st.data(), calls(SMOOTH))
def test_linear_and_cubic(data: st.DataObject, drawn: tuple[Any, tuple[Any, ...], torch.Tensor]) -> None:
    overload, args, whole = drawn
    dim = data.draw(st.integers(0, whole.dim() - 1))
    try:
        check_tiles(overload, args, dim, data.draw(cuts_of(whole.shape[dim])))
    except Untileable as refusal:
        if "keeps a size" not in str(refusal):
            raise


@given(st.data())
def test_antialiased(data: st.DataObject) -> None:
    packet = data.draw(st.sampled_from([aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa]))
    height, width = data.draw(st.integers(4, 30)), data.draw(st.integers(1, 6))
    p, q = data.draw(st.sampled_from([(1, 2), (2, 1), (3, 1), (4, 1), (3, 2), (2, 3), (1, 1)]))
    x = tensor(1, 2, height * p, width, seed=data.draw(st.integers(0, 99)))
    args = (x, [height * q, 5], False, None, None)
    dim = data.draw(st.integers(0, 2))
    check_tiles(packet.default, args, dim, data.draw(cuts_of((1, 2, height * q)[dim])))
    transposed = (x.transpose(2, 3), [5, height * q], False, None, None)
    check_tiles(packet.default, transposed, 3, data.draw(cuts_of(height * q)))


@given(st.integers(1, 300), st.integers(1, 300), st.none() | FACTORS, st.booleans())
def test_nearest_indices_are_the_operators(size: int, out: int, factor: float | None, exact: bool) -> None:
    """In float32, by which all types but float64 are counted; refused only where kernels take a factor for another."""
    if factor is not None:
        out = max(1, int(size * factor))
        factor = max(factor, 1 / size)
    axis = Axis(size, out, factor, "nearest-exact" if exact else "nearest")
    ramp = torch.arange(size, dtype=torch.float32).view(1, 1, size)
    op = aten._upsample_nearest_exact1d.default if exact else aten.upsample_nearest1d.default
    wanted = op(ramp, [out], factor).view(-1).long().numpy()
    try:
        assert np.array_equal(nearest_table(axis), wanted)
    except Untileable:
        assert factor is not None
        assert out in (size, 2 * size)
        return
    index = np.arange(out, dtype=np.float32) + np.float32(0.5 if exact else 0)
    assert np.array_equal(np.minimum((index * float32_step(axis)).astype(np.int64), size - 1), wanted)


@given(st.data())
def test_reads_no_more_than_the_halo(data: st.DataObject) -> None:
    """Doubling, the usual case: one element beside the part, two for cubic, and none that a row does not reach."""
    size = data.draw(st.integers(2, 50))
    start = data.draw(st.integers(0, 2 * size - 1))
    stop = data.draw(st.integers(start + 1, 2 * size))
    for mode, halo in (("nearest", 0), ("linear", 1), ("cubic", 2)):
        low, high = Axis(size, 2 * size, None, mode).reads(start, stop)
        assert max(0, start // 2 - halo) <= low <= start // 2
        assert (stop - 1) // 2 < high <= min(size, (stop - 1) // 2 + 1 + halo)


def test_tiles_of_the_interior_share_their_calls() -> None:
    """Same operator, same sizes, same halo: one loop body serves them all."""
    for packet, extra in (
        (aten.upsample_nearest2d, ()),
        (aten.upsample_bilinear2d, (False,)),
        (aten.upsample_bicubic2d, (False,)),
    ):
        call, _, _ = call_on(packet.vec, (tensor(1, 2, 64, 8), None, *extra, [2.0, 2.0]))
        noted = set()
        for start in range(16, 112, 16):
            made: list[str] = []
            tile(call, Part(2, start, start + 16)).compute(
                lambda *args, m=made, **kwargs: m.append(repr((args, kwargs))), [None]
            )
            noted.add(tuple(made))
        assert len(noted) == 1, packet
        assert len(next(iter(noted))) == (1 if packet is aten.upsample_nearest2d else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packet", [aten.upsample_nearest2d, aten._upsample_nearest_exact2d])
def test_nearest_in_any_type_is_bitwise(packet: Any, dtype: torch.dtype) -> None:
    x = tensor(1, 3, 37, 5, dtype=dtype)
    for out in ([53, 7], [74, 10], [23, 3]):
        call, (source,), whole = call_on(packet.default, (x, out, None, None))
        for start in range(0, out[0], 7):
            part = Part(2, start, min(start + 7, out[0]))
            tiled = tile(call, part)
            assert torch.equal(tiled.compute(run, [cut(source, tiled.needs[0])]), cut(whole, part))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packet", [aten.upsample_bilinear2d, aten.upsample_bicubic2d])
def test_low_precision_rounds_once(packet: Any, dtype: torch.dtype) -> None:
    """Not further from float64 than the whole operator is, at a ratio that has to be gathered."""
    x = tensor(1, 2, 97, 11, dtype=dtype)
    call, (source,), whole = call_on(packet.default, (x, [151, 17], False, None, None))
    truth = packet.default(x.double(), [151, 17], False, None, None)
    own = 0.0
    for start in range(0, 151, 40):
        part = Part(2, start, min(start + 40, 151))
        tiled = tile(call, part)
        found = tiled.compute(run, [cut(source, tiled.needs[0])])
        assert found.dtype == dtype
        own = max(own, float((found.double() - cut(truth, part)).abs().max()))
    assert own <= 1.01 * float((whole.double() - truth).abs().max()) + 1e-6


def test_powers_of_two_are_bitwise_in_float32() -> None:
    x = tensor(1, 3, 40, 9, dtype=torch.float32)
    for out in ([80, 18], [160, 36], [20, 9]):
        call, (source,), whole = call_on(aten.upsample_bilinear2d.default, (x, out, False, None, None))
        for start in range(0, out[0], 8):
            part = Part(2, start, min(start + 8, out[0]))
            tiled = tile(call, part)
            assert torch.equal(tiled.compute(run, [cut(source, tiled.needs[0])]), cut(whole, part))


def test_both_ways_to_compute_are_there() -> None:
    """Whole factors run the operator on a slice, primes are gathered; a whole result is the operator itself."""
    doubled, prime = Axis(64, 128, None, "linear"), Axis(97, 151, None, "linear")
    for axis, lean in ((doubled, True), (prime, False)):
        found = window(axis, 90, 110)
        assert found is not None
        assert is_lean(axis, 90, 110, found) is lean
    whole = window(prime, 0, 151)
    assert whole is not None
    assert (whole.stop, whole.drop, whole.factor) == (97, 0, None)


def test_unsigned_bytes() -> None:
    x = torch.arange(60, dtype=torch.uint8).view(1, 1, 20, 3)
    for out in ([40, 6], [33, 3]):
        check_tiles(aten.upsample_nearest2d.vec, (x, out, None), 2, [0, 3, 17, out[0]])
    with pytest.raises(Untileable, match=r"interpolates torch\.uint8"):
        check_tiles(aten.upsample_bilinear2d.vec, (x, [40, 6], False, None), 2, [0, 40])


def test_no_batch() -> None:
    x = tensor(0, 3, 8, 8)
    check_tiles(aten.upsample_nearest2d.vec, (x, [16, 16], None), 2, [0, 5, 16])
    check_tiles(aten.upsample_bilinear2d.vec, (x, [13, 11], False, None), 3, [0, 5, 11])


def test_infinities_stay_where_they_are() -> None:
    x = tensor(1, 1, 16, 4)
    x[0, 0, 7, 2] = float("inf")
    check_tiles(aten.upsample_nearest2d.vec, (x, None, [2.0, 2.0]), 2, [0, 5, 16, 32])
    check_tiles(aten.upsample_bilinear2d.vec, (x, None, False, [2.0, 2.0]), 2, [0, 5, 16, 32])


@pytest.mark.parametrize(
    ("target", "args", "reason"),
    [
        (aten.upsample_nearest1d.default, (tensor(1, 1, 10), [20], 2.09), "rounding of its kernel"),
        (aten.upsample_linear1d.default, (tensor(1, 1, 10), [10], False, 1.05), "keeps a size"),
        (aten._upsample_bilinear2d_aa.default, (tensor(1, 1, 97, 4), [151, 4], False, None, None), "do not repeat"),
        (aten._upsample_bilinear2d_aa.default, (tensor(1, 1, 9, 4), [5, 4], True, None, None), "align_corners"),
        (aten._upsample_bicubic2d_aa.default, (tensor(1, 1, 9, 4), [5, 1], False, None, None), "to a size of 1"),
    ],
)
def test_refusals(target: Any, args: tuple[Any, ...], reason: str) -> None:
    call, _, whole = call_on(target, args)
    with pytest.raises(Untileable, match=reason):
        tile(call, Part(2, whole.shape[2] // 2, whole.shape[2] // 2 + 1))


@pytest.mark.parametrize("dim", range(4))
def test_grid_sampler(dim: int) -> None:
    x, grid = tensor(2, 3, 6, 7), tensor(2, 5, 4, 2, seed=1)
    size = (2, 3, 5, 4)[dim]
    check_tiles(aten.grid_sampler.default, (x, grid, 0, 0, False), dim, [0, 1, size])
    check_tiles(aten.grid_sampler_2d.default, (x, grid, 2, 1, True), dim, [0, 1, size])


def test_grid_sampler_of_volumes() -> None:
    x, grid = tensor(2, 3, 4, 5, 6), tensor(2, 3, 2, 4, 3, seed=1)
    for dim, size in enumerate((2, 3, 3, 2, 4)):
        check_tiles(aten.grid_sampler_3d.default, (x, grid, 0, 0, False), dim, [0, 1, size])


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "nearest", "scale_factor": 2.0},
        {"mode": "nearest-exact", "size": (20, 24)},
        {"mode": "bilinear", "scale_factor": 2.0, "align_corners": False},
        {"mode": "bilinear", "size": (17, 23), "align_corners": True},
        {"mode": "bicubic", "scale_factor": 1.5, "recompute_scale_factor": True},
        {"mode": "bicubic", "scale_factor": 0.5, "antialias": True},
    ],
    ids=str,
)
def test_what_an_export_holds_has_rules(arguments: dict[str, Any]) -> None:
    class Resize(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.interpolate(x, **arguments)

    x = tensor(1, 2, 10, 12)
    graph = torch.export.export(Resize(), (x,), strict=False).graph
    (node,) = [node for node in graph.nodes if node.op == "call_function"]
    call, (source,), whole = call_on(node.target, [x, *node.args[1:]], dict(node.kwargs))
    for part in (Part(2, 1, 4), Part(3, 2, whole.shape[3]), Part(1, 1, 2)):
        tiled = tile(call, part)
        assert_close(tiled.compute(run, [cut(source, tiled.needs[0])]), cut(whole, part), TOLERANCE)
