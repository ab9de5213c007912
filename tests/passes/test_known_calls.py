"""A call that is known gives the geometry and the aliasing of one that is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from passes import known_calls
from passes.check_kernels import Kernels
from passes.known_calls import run_on_fakes
from passes.spec import TensorSpec
from tests.passes.test_fakes import Geometry, geometries

aten = torch.ops.aten
TARGETS = [
    (aten.relu.default, ()), (aten.add.Tensor, (1.5,)), (aten.relu_.default, ()), (aten.unsqueeze.default, (0,)),
    (aten.select.int, (0, -1)), (aten.split.Tensor, (1, 0)), (aten.clone.default, ()), (aten.sum.dim_IntList, ([0], True)),
    (aten.native_layer_norm.default, ([1], None, None, 1e-5)), (aten.argmax.default, ()), (aten.unsqueeze_.default, (0,)),
    (aten.transpose.int, (0, -1)), (aten._to_copy.default, ()), (aten.detach.default, ()),
]  # fmt: skip


def fakes(mode: FakeTensorMode, geometry: Geometry, offset: int, dtype: torch.dtype) -> Tensor:
    shape, stride = geometry
    span = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
    with mode:
        return torch.empty(offset + span, dtype=dtype).as_strided(shape, stride, offset)


def described(result: Any, arguments: Sequence[Tensor]) -> list[Any]:
    """Geometry of every output, and which argument or earlier output it is, or is in the memory of."""
    found: list[Any] = [type(result) if isinstance(result, (list, tuple)) else None]
    seen = list(arguments)
    for t in result if isinstance(result, (list, tuple)) else [result]:
        same = next((i for i, other in enumerate(seen) if other is t), None)
        storage = t.untyped_storage()
        where = next((i for i, other in enumerate(seen) if other.untyped_storage()._cdata == storage._cdata), None)
        found.append((type(t), t.shape, t.stride(), t.dtype, t.storage_offset(), storage.nbytes(), t.device, same, where))
        seen.append(t)
    return [*found, [(a.shape, a.stride()) for a in arguments]]


@settings(max_examples=150, deadline=None)
@given(geometries(least=3), st.sampled_from(TARGETS), st.integers(0, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_known_call_is_as_one_that_is_run(geometry: Geometry, call: Any, offset: int, dtype: torch.dtype) -> None:
    target, rest = call
    if target is aten.native_layer_norm.default:
        rest = ([geometry[0][-1]], *rest[1:])
    outcomes = []
    known_calls._known.clear()
    for _ in range(3):
        mode = FakeTensorMode()
        argument = fakes(mode, geometry, offset, dtype)
        outcomes.append(described(run_on_fakes(target, (argument, *rest), {}, mode), [argument]))
    assert outcomes[1] == outcomes[2] == outcomes[0]


def test_the_second_time_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    known_calls._known.clear()
    mode = FakeTensorMode()
    run_on_fakes(aten.relu.default, (fakes(mode, ((2, 3), (3, 1)), 0, torch.float32),), {}, mode)
    monkeypatch.setattr(known_calls, "_run", None)
    argument = fakes(mode, ((2, 3), (3, 1)), 0, torch.float32)
    result = run_on_fakes(aten.relu.default, (argument,), {}, mode)
    assert (result.shape, result.fake_mode) == ((2, 3), mode)
    with pytest.raises(TypeError):
        run_on_fakes(aten.relu.default, (fakes(mode, ((3, 2), (2, 1)), 0, torch.float32),), {}, mode)


@pytest.fixture
def factor() -> Iterator[list[int]]:
    """How many times its rows somebody's operator `vramplan_test_known::rows` gives; who changes it defines it anew."""
    times = [2]
    library = torch.library.Library("vramplan_test_known", "DEF")
    library.define("rows(Tensor v) -> Tensor")
    library.impl("rows", lambda v: v.new_empty((times[0] * v.shape[0], *v.shape[1:])), "CompositeExplicitAutograd")
    yield times
    library._destroy()


def test_what_others_define_may_be_defined_again(factor: list[int]) -> None:
    target, shapes = torch.ops.vramplan_test_known.rows.default, []
    node = fx.Graph().call_function(target, (fx.Graph().placeholder("v"),))
    value = TensorSpec.of(torch.empty(3, 2, device="meta"))
    for factor[0] in (2, 5):
        mode = FakeTensorMode()
        given = run_on_fakes(target, (fakes(mode, ((3, 2), (2, 1)), 0, torch.float32),), {}, mode)
        ((checked, *_),), _ = Kernels().run(node, {"v": [(value, 0)]})
        shapes.append((tuple(given.shape), checked.shape))
    assert shapes == [((6, 2), (6, 2)), ((15, 2), (15, 2))]
