"""`GatherWrites`: buffers that are written in interleaved slices become one value, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.gather_writes import GatherWrites
from planner import plan
from tests.passes.programs import Function, canonical, text
from tests.passes.tiled import interpreted


def rotated(x: Tensor) -> Tensor:
    """As Wan has it."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    y = torch.empty_like(x)
    y[..., 0::2] = a * 2 - b
    y[..., 1::2] = a + b * 3
    return y.transpose(0, 1).exp()


def of(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    program = GatherWrites().apply(canonical(module, *inputs))
    with torch.no_grad():
        return interpreted(program, module, *inputs)


def test_in_text() -> None:
    lines = text(GatherWrites().apply(canonical(Function(rotated), torch.randn(3, 4)))).splitlines()
    assert [line for line in lines if "empty_like" in line or "stack" in line] == [
        "empty_like_parts = stack([sub, add], 2)",
        "empty_like = reshape(empty_like_parts, [3, 4])",
        "transpose = transpose.int(empty_like, 0, 1)",
    ]


@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 2), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_the_same_bits(count: int, size: int, dim: int, dtype: torch.dtype) -> None:
    """Any number of slices along any dimension, cast to the buffer's type."""

    def interleaved(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[dim] *= count
        y = torch.empty(shape, dtype=dtype)
        for start in range(count):
            y[(slice(None),) * dim + (slice(start, None, count),)] = x * (start + 1)
        return y.sin()

    module, x = Function(interleaved), torch.randn(size, size + 1, 2)
    (found,) = of(module, x)
    assert torch.equal(found, interleaved(x))
    assert "copy_" not in text(GatherWrites().apply(canonical(module, x)))


def _one_part(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., 0::2] = x[..., 0::2]
    return y.sin()


def _read_between(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., 0::2] = x[..., 0::2]
    z = y.sum()
    y[..., 1::2] = x[..., 1::2]
    return y + z


def _odd_size(x: Tensor) -> Tensor:
    y = torch.empty_like(x[:, :3])
    y[..., 0::2] = x[..., :2]
    y[..., 1::2] = x[..., :1]
    return y.sin()


def _halves(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., :2] = x[..., 2:]
    y[..., 2:] = x[..., :2]
    return y.sin()


@pytest.mark.parametrize("function", [_one_part, _read_between, _odd_size, _halves])
def test_what_stays(function: Callable[[Tensor], Tensor]) -> None:
    module, x = Function(function), torch.randn(3, 4)
    assert text(GatherWrites().apply(canonical(module, x))) == text(canonical(module, x))
    (found,) = of(module, x)
    assert torch.equal(found, function(x))


def test_what_is_rotated_runs_in_tiles() -> None:
    module, x = Function(rotated).eval(), torch.randn(64, 64, dtype=torch.float64)
    p = plan(module, "1GB", inputs=(x,), device="accounting", keep={"*": {"tile": {"count": 4, "dim": 0}}})
    (loop,) = (node.meta["loop"] for node in p.problem.liveness.nodes if "loop" in node.meta)
    assert loop.count == 4
    m = p.build()
    assert torch.equal(m(x), rotated(x))
    assert m.report().peak_bytes == p.peak_bytes
