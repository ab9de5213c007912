"""Fake results have the strides and storage sizes of real ones, also where sizes of 1 leave strides in doubt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from passes.fakes import FaithfulFakes
from runtime import ops  # noqa: F401  # makes the operators `vramplan::...`

Geometry = tuple[tuple[int, ...], tuple[int, ...]]
Operator = Callable[[Tensor], Any]


@st.composite
def geometries(draw: st.DrawFn, least: int = 3, most: int = 5) -> Geometry:
    """A dense tensor in any order of dimensions, with arbitrary strides where a size is 1."""
    rank = draw(st.integers(least, most))
    shape = tuple(draw(st.lists(st.sampled_from([1, 1, 2, 3, 4]), min_size=rank, max_size=rank)))
    usual = [tuple(range(rank)), (0, *range(2, rank), 1)]  # contiguous, channels-last
    order = draw(st.sampled_from(usual) | st.permutations(range(rank)).map(tuple))
    stride, step = [0] * rank, 1
    for dim in reversed(order):
        stride[dim] = step
        step *= shape[dim]
    if draw(st.booleans()):
        stride = [draw(st.sampled_from([s, 1, 2, 7, 60])) if n == 1 else s for n, s in zip(shape, stride, strict=True)]
    return shape, tuple(stride)


def outcome(result: Any) -> list[tuple[Any, ...]]:
    """Shape, strides, type, offset and storage bytes of every tensor that an operator gives."""
    tensors = [t for t in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(t, Tensor)]
    return [(tuple(t.shape), t.stride(), t.dtype, t.storage_offset(), t.untyped_storage().nbytes()) for t in tensors]


def agree(operator: Operator, *geometry: Geometry, dtype: torch.dtype = torch.float32) -> None:
    """Runs the operator for real and on faithful fakes."""

    def run() -> list[tuple[Any, ...]]:
        tensors = [torch.empty_strided(shape, stride, dtype=dtype) for shape, stride in geometry]
        return outcome(operator(*[t.fill_(1) for t in tensors]))

    with torch.no_grad():
        real = run()
    with FakeTensorMode(), FaithfulFakes(), torch.no_grad():
        fake = run()
    assert fake == real


def _heads(x: Tensor) -> Tensor:
    """Splits the last dimension, exchanges two, joins again: what attention does with its heads."""
    x = x.flatten(0, -3)
    batch, length, width = x.shape
    return x.reshape(batch, length, 1, width).permute(0, 2, 1, 3).reshape(batch, 1 * length, width).transpose(1, 2)


ANY_RANK: dict[str, Operator] = {
    "group_norm": lambda x: torch.group_norm(x, 1),
    "group_norm_affine": lambda x: torch.group_norm(x, x.shape[1], torch.ones(x.shape[1]), torch.ones(x.shape[1])),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1])),
    "batch_norm_over_its_own": lambda x: F.batch_norm(torch.cat([x, x]), None, None, training=True),
    "group_statistics": lambda x: torch.ops.vramplan.group_statistics(x, 1),
    "group_normalise": lambda x: torch.ops.vramplan.group_normalise(x, torch.ones(x.shape[0], 1, 3), None, None, 1e-5),
    "group_normalise_rows": lambda x: torch.ops.vramplan.group_normalise(
        torch.cat([x, x], 2)[:, :, : x.shape[2]], torch.ones(x.shape[0], 1, 3), None, None, 1e-5
    ),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "layer_norm_affine": lambda x: F.layer_norm(x, x.shape[-2:], torch.ones(x.shape[-2:]), torch.ones(x.shape[-2:])),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "flatten": lambda x: x.flatten(1),
    "unsqueeze": lambda x: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]),
    "reshape_to_one_more": lambda x: x.reshape(*x.shape[:-1], 1, x.shape[-1]),
    "add_a_number": lambda x: x + 1,
    "subtract_from_a_number": lambda x: 1 - x,
    "divide_by_a_number": lambda x: x / 2,
    "multiply_by_a_number": lambda x: x * 0.5,
    "multiply_by_a_0d_tensor": lambda x: x * torch.tensor(0.5),
    "add_itself": lambda x: x + x,
    "multiply_by_a_row": lambda x: x * torch.ones(x.shape[-1]),
    "divide_by_channels": lambda x: x / torch.ones(x.shape[1], *[1] * (x.ndim - 2)),
    "add_a_contiguous_one": lambda x: x + torch.ones(x.shape),
    "add_to_a_contiguous_one": lambda x: torch.ones(x.shape) + x,
    "add_its_transpose": lambda x: x + x.transpose(0, 1).contiguous().transpose(0, 1),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "where": lambda x: torch.where(x > 0, x, 0.5),
    "addcmul": lambda x: torch.addcmul(x, x, torch.ones(x.shape[-1])),
    "compare": lambda x: x > 0,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "pow": lambda x: x.pow(2),
    "rsqrt": torch.rsqrt,
    "clamp": lambda x: x.clamp(0, 1),
    "cat": lambda x: torch.cat([x, x], 1),
    "cat_with_a_contiguous_one": lambda x: torch.cat([torch.ones(x.shape), x], -1),
    "stack": lambda x: torch.stack([x, x]),
    "softmax": lambda x: x.softmax(-1),
    "softmax_of_channels": lambda x: x.softmax(1),
    "clone": torch.clone,
    "zeros_like": torch.zeros_like,
    "full_like": lambda x: torch.full_like(x, 2.0),
    "contiguous": lambda x: x.contiguous(),
    "to_double": lambda x: x.to(torch.float64),
    "heads": _heads,
    "permute_and_reshape": lambda x: x.transpose(1, 2).reshape(x.shape[0], -1),
    "chunk": lambda x: x.chunk(2, 1),
    "mean": lambda x: x.mean(1),
    "mean_kept": lambda x: x.mean(-1, keepdim=True),
    "linear": lambda x: F.linear(x, torch.ones(3, x.shape[-1]), torch.ones(3)),
    "norm_of_a_sum": lambda x: F.layer_norm(x + 1, x.shape[-1:]).transpose(1, 2).reshape(x.shape[0], -1),
}  # fmt: skip

IMAGES: dict[str, Operator] = {
    "conv2d": lambda x: F.conv2d(x, torch.ones(2, x.shape[1], 1, 1), torch.ones(2)),
    "conv2d_3x3": lambda x: F.conv2d(x, torch.ones(2, x.shape[1], 3, 3), padding=1),
    "upsample_nearest": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "upsample_bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "pad": lambda x: F.pad(x, (0, 1, 0, 1)),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "norm_and_activation": lambda x: F.silu(torch.group_norm(x, 1)) / 1.5,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "to_tokens": lambda x: x.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, x.shape[1]),
}  # fmt: skip


@pytest.mark.parametrize("name", ANY_RANK)
@settings(max_examples=25)
@given(geometry=geometries())
def test_operators_of_any_rank(name: str, geometry: Geometry) -> None:
    agree(ANY_RANK[name], geometry)


@pytest.mark.parametrize("name", IMAGES)
@settings(max_examples=25)
@given(geometry=geometries(4, 4))
def test_operators_on_images(name: str, geometry: Geometry) -> None:
    agree(IMAGES[name], geometry)


@pytest.mark.parametrize("operator", [torch.add, torch.mul, torch.div, torch.maximum], ids=lambda f: f.__name__)
@settings(max_examples=25)
@given(first=geometries(4, 4), data=st.data())
def test_two_layouts_of_one_shape(operator: Operator, first: Geometry, data: st.DataObject) -> None:
    shape = first[0]
    order = data.draw(st.permutations(range(4)))
    second = torch.empty([shape[d] for d in order], device="meta").permute([order.index(d) for d in range(4)]).stride()
    agree(operator, first, (shape, second))


def test_a_norm_gives_up_the_odd_strides_of_its_input() -> None:
    odd = ((1, 4, 1, 3), (99, 3, 7, 1))
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty_strided(*odd)
        with FaithfulFakes():
            assert F.layer_norm(x, [3]).stride() == (12, 3, 3, 1)
    agree(lambda x: F.layer_norm(x, [3]), odd)
    agree(lambda x: torch.group_norm(x, 2), odd)


def test_within_faithful_fakes_everything_stays_fake() -> None:
    with FakeTensorMode() as mode, FaithfulFakes():
        x = torch.empty_strided((1, 3, 1), (50, 1, 9))
        for y in (x + 1, F.layer_norm(x, [1]), x.view(3), F.gelu(x)):
            assert getattr(y, "fake_mode", None) is mode
            assert y.device.type == "cpu"
