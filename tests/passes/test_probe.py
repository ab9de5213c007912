"""Predicted bytes of an operator against the storages that the real one makes, and the declared table's part in it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from passes import probe
from passes.live_storages import LiveStorages
from passes.probe import OpCost, Prober, call_of
from passes.program import Program
from passes.spec import TensorSpec
from passes.workspace import RULES
from planner.capture import capture
from runtime.devices.accounting import StorageCounter, _LinearIsOneKernel
from runtime.errors import UnknownSize
from tests.passes.programs import traced

aten = torch.ops.aten
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def node_of(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node that calls `target`; tensors become fake values of placeholders, recorded as a capture would."""
    program = traced(lambda *tensors: target(*_fill(args, tensors), **kwargs), *_flat(args))
    return next(n for n in program.ops() if n.target is target)


def _flat(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [t for item in tree for t in _flat(item)] if isinstance(tree, (list, tuple)) else []


def _fill(tree: Any, tensors: tuple[Tensor, ...]) -> Any:
    left = iter(tensors)

    def fill(item: Any) -> Any:
        if isinstance(item, Tensor):
            return next(left)
        return type(item)(map(fill, item)) if isinstance(item, (list, tuple)) else item

    return fill(tree)


def measured(target: Any, *args: Any, **kwargs: Any) -> int:
    """The most bytes that the real operator holds beyond its arguments."""
    counter = StorageCounter()
    for tensor in _flat(args):
        counter.count(tensor)
    before = counter.live_bytes
    with torch.no_grad(), counter, _LinearIsOneKernel(counter):
        result = target(*args, **kwargs)
    del result
    counter.detach()
    return counter.peak_bytes - before


def predicted(target: Any, *args: Any, **kwargs: Any) -> int:
    cost = Prober("accounting").cost(node_of(target, *args, **kwargs))
    return sum(cost.output_bytes) + cost.workspace_bytes


def _t(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.linspace(-1, 1, max(1, torch.Size(shape).numel())).view(shape).to(dtype)


Make = Callable[[torch.dtype], tuple[Any, ...]]


def _image(dtype: torch.dtype) -> Tensor:
    return _t(2, 8, 6, 6)(dtype)


def _tokens(dtype: torch.dtype) -> Tensor:
    return _t(2, 5, 8)(dtype)


def _heads(dtype: torch.dtype) -> Tensor:
    return _t(2, 2, 5, 4)(dtype)


CALLS: dict[str, tuple[Any, Make]] = {
    "linear": (aten.linear.default, lambda d: (_tokens(d), _t(6, 8)(d), _t(6)(d))),
    "linear_no_bias": (aten.linear.default, lambda d: (_tokens(d), _t(6, 8)(d))),
    "linear_of_a_transpose": (aten.linear.default, lambda d: (_t(2, 8, 5)(d).transpose(1, 2), _t(6, 8)(d), _t(6)(d))),
    "linear_of_a_vector": (aten.linear.default, lambda d: (_t(8)(d), _t(6, 8)(d), _t(6)(d))),
    "mm": (aten.mm.default, lambda d: (_t(5, 8)(d), _t(8, 3)(d))),
    "addmm": (aten.addmm.default, lambda d: (_t(3)(d), _t(5, 8)(d), _t(8, 3)(d))),
    "bmm": (aten.bmm.default, lambda d: (_t(2, 5, 8)(d), _t(2, 8, 3)(d))),
    "matmul_batches": (aten.matmul.default, lambda d: (_heads(d), _heads(d).transpose(-2, -1))),
    "matmul_broadcast": (aten.matmul.default, lambda d: (_heads(d), _t(4, 3)(d))),
    "matmul_expanded": (aten.matmul.default, lambda d: (_heads(d), _t(1, 2, 4, 3)(d).expand(2, 2, 4, 3))),
    "conv2d": (aten.conv2d.default, lambda d: (_image(d), _t(4, 8, 3, 3)(d), _t(4)(d), [1, 1], [1, 1])),
    "conv2d_strided_input": (aten.conv2d.default, lambda d: (_image(d)[:, :, ::2], _t(4, 8, 3, 3)(d), _t(4)(d))),
    "conv1d": (aten.conv1d.default, lambda d: (_t(2, 8, 9)(d), _t(4, 8, 3)(d), _t(4)(d))),
    "conv_transpose2d": (aten.conv_transpose2d.input, lambda d: (_image(d), _t(8, 4, 2, 2)(d), _t(4)(d), [2, 2])),
    "group_norm": (aten.group_norm.default, lambda d: (_image(d), 4, _t(8)(d), _t(8)(d))),
    "group_norm_of_a_slice": (aten.group_norm.default, lambda d: (_image(d)[:, :, 1:], 4, _t(8)(d), _t(8)(d))),
    "layer_norm": (aten.layer_norm.default, lambda d: (_tokens(d), [8], _t(8)(d), _t(8)(d))),
    "layer_norm_of_a_transpose": (aten.layer_norm.default, lambda d: (_t(2, 8, 5)(d).transpose(1, 2), [8])),
    "rms_norm": (aten.rms_norm.default, lambda d: (_tokens(d), [8], _t(8)(d), 1e-6)),
    "softmax": (aten.softmax.int, lambda d: (_heads(d), -1)),
    "softmax_in_float": (aten.softmax.int, lambda d: (_heads(d), -1, torch.float32)),
    "log_softmax": (aten.log_softmax.int, lambda d: (_tokens(d), -1)),
    "attention": (aten.scaled_dot_product_attention.default, lambda d: (_heads(d), _heads(d), _heads(d))),
    "attention_masked": (
        aten.scaled_dot_product_attention.default,
        lambda d: (_heads(d), _heads(d), _heads(d), _t(5, 5)(d)),
    ),
    "gelu": (aten.gelu.default, lambda d: (_tokens(d),)),
    "silu": (aten.silu.default, lambda d: (_image(d),)),
    "relu_in_place": (aten.relu_.default, lambda d: (_tokens(d),)),
    "add": (aten.add.Tensor, lambda d: (_tokens(d), _tokens(d))),
    "add_broadcast": (aten.add.Tensor, lambda d: (_tokens(d), _t(8)(d))),
    "mul_in_place": (aten.mul_.Tensor, lambda d: (_tokens(d), 0.5)),
    "where": (aten.where.self, lambda d: (_tokens(d) > 0, _tokens(d), _tokens(d))),
    "masked_fill": (aten.masked_fill.Scalar, lambda d: (_tokens(d), _tokens(d) > 0, 0.5)),
    "cat": (aten.cat.default, lambda d: ([_tokens(d), _tokens(d)], 1)),
    "stack": (aten.stack.default, lambda d: ([_tokens(d), _tokens(d)], 1)),
    "split": (aten.split.Tensor, lambda d: (_tokens(d), 4, -1)),
    "chunk": (aten.chunk.default, lambda d: (_tokens(d), 2, -1)),
    "transpose": (aten.transpose.int, lambda d: (_tokens(d), 1, 2)),
    "reshape_that_copies": (aten.reshape.default, lambda d: (_tokens(d).transpose(1, 2), [2, 40])),
    "reshape_that_does_not": (aten.reshape.default, lambda d: (_tokens(d), [2, 40])),
    "contiguous": (aten.contiguous.default, lambda d: (_tokens(d).transpose(1, 2),)),
    "clone": (aten.clone.default, lambda d: (_tokens(d),)),
    "expand": (aten.expand.default, lambda d: (_t(1, 5, 8)(d), [2, 5, 8])),
    "repeat": (aten.repeat.default, lambda d: (_tokens(d), [1, 2, 1])),
    "mean": (aten.mean.dim, lambda d: (_tokens(d), [1])),
    "sum": (aten.sum.dim_IntList, lambda d: (_tokens(d), [-1], True)),
    "amax": (aten.amax.default, lambda d: (_tokens(d), [-1])),
    "topk": (aten.topk.default, lambda d: (_tokens(d), 3)),
    "cumsum": (aten.cumsum.default, lambda d: (_tokens(d), 1)),
    "var": (aten.var.correction, lambda d: (_tokens(d), [1])),
    "upsample_nearest": (aten.upsample_nearest2d.vec, lambda d: (_image(d), None, [2.0, 2.0])),
    "avg_pool": (aten.avg_pool2d.default, lambda d: (_image(d), [2, 2])),
    "pad": (aten.pad.default, lambda d: (_image(d), [1, 1, 1, 1])),
    "embedding": (aten.embedding.default, lambda d: (_t(7, 4)(d), torch.tensor([[0, 3], [6, 1]]))),
    "index_select": (aten.index_select.default, lambda d: (_tokens(d), 1, torch.tensor([4, 0]))),
    "index": (aten.index.Tensor, lambda d: (_tokens(d), [None, torch.tensor([4, 0])])),
    "flip": (aten.flip.default, lambda d: (_tokens(d), [-1])),
    "to_double": (aten.to.dtype, lambda d: (_tokens(d), torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CALLS)
def test_predicted_is_measured(name: str, dtype: torch.dtype) -> None:
    target, make = CALLS[name]
    assert predicted(target, *make(dtype)) == measured(target, *make(dtype))


@pytest.mark.parametrize("name", ["conv2d", "group_norm", "silu", "upsample_nearest", "avg_pool", "pad"])
def test_predicted_is_measured_in_channels_last(name: str) -> None:
    target, make = CALLS[name]

    def arguments() -> tuple[Any, ...]:
        image, *others = make(F32)
        return image.contiguous(memory_format=torch.channels_last), *others

    assert predicted(target, *arguments()) == measured(target, *arguments())


def test_without_its_declared_rule_linear_is_predicted_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    target, make = CALLS["linear_of_a_transpose"]
    actual = measured(target, *make(F32))
    assert predicted(target, *make(F32)) == actual == 2 * 5 * 6 * 4
    monkeypatch.delitem(RULES, ("accounting", "aten.linear.default"))
    monkeypatch.setattr(probe, "_costs", {})
    assert predicted(target, *make(F32)) != actual


def test_a_composite_operator_has_workspace() -> None:
    node = node_of(aten.group_norm.default, *CALLS["group_norm"][1](F32))
    # mean and reciprocal deviation of 2 x 4 groups live beside the output
    assert Prober("accounting").cost(node).workspace_bytes == 2 * (2 * 4 * 4)


def test_flops_and_moved_bytes_of_a_product() -> None:
    cost = Prober("accounting").cost(node_of(aten.mm.default, *CALLS["mm"][1](F32)))
    assert cost == OpCost((5 * 3 * 4,), 0, flops=2 * 5 * 8 * 3, moved_bytes=4 * (5 * 8 + 8 * 3 + 5 * 3))


def test_a_view_moves_nothing_and_a_lookup_only_its_rows() -> None:
    assert Prober("accounting").cost(node_of(aten.transpose.int, *CALLS["transpose"][1](F32))) == OpCost()
    lookup = Prober("accounting").cost(node_of(aten.embedding.default, *CALLS["embedding"][1](F32)))
    assert (lookup.output_bytes, lookup.moved_bytes) == ((64,), 128)


def test_norms_of_groups_read_their_input_twice() -> None:
    """Statistics first; where these are an operator of their own, the norm after it reads once."""
    x, size = torch.ones(2, 8, 4, 4), 2 * 8 * 4 * 4 * 4
    statistics = torch.ops.vramplan.group_statistics.default
    assert Prober("accounting").cost(node_of(aten.group_norm.default, x, 4)).moved_bytes == 3 * size
    assert Prober("accounting").cost(node_of(statistics, x, 4)).moved_bytes == 2 * size + 2 * 4 * 3 * 4


def test_in_place_makes_nothing_and_moves_what_it_reads_and_writes() -> None:
    cost = Prober("accounting").cost(node_of(aten.mul_.Tensor, torch.ones(10), 2.0))
    assert (cost.output_bytes, cost.workspace_bytes, cost.moved_bytes) == ((), 0, 80)


def test_views_of_one_output_are_one_storage() -> None:
    node = node_of(aten.split.Tensor, *CALLS["split"][1](F32))
    call = call_of(node)
    assert call.fresh_bytes == ()
    assert [o.storage for o in call.outputs] == [call.args[0].storage] * 2
    assert [o.offset for o in call.outputs] == [0, 4]


def test_equal_calls_are_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    program = traced(lambda x: torch.tanh(torch.tanh(torch.tanh(x))), torch.ones(3))
    prober, probed = Prober("accounting"), []
    probe = Prober._probe
    monkeypatch.setattr(Prober, "_probe", lambda self, node, *rest: probed.append(node.name) or probe(self, node, *rest))
    assert len({prober.cost(node) for node in program.ops()}) == 1
    assert probed == ["tanh"]


def test_the_same_numbers_of_other_types_are_other_calls() -> None:
    one, one_point = (call_of(next(iter(traced(lambda x, k=k: x * k, torch.ones(3)).ops()))) for k in (1, 1.0))
    assert one.args[1] == one_point.args[1]
    assert one.key != one_point.key


def test_aliased_arguments_are_another_call_than_separate_ones() -> None:
    def key(program: Program) -> Any:
        return call_of(next(iter(program.ops()))).key

    x = torch.ones(4, 2)
    apart = traced(torch.add, x[:2], torch.ones(2, 2))
    shared = traced(torch.add, x[:2], x[2:])
    assert key(apart) != key(shared)


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, 2)


def test_a_dynamic_size_is_named() -> None:
    program = capture(_Double().eval(), (torch.ones(3),), dynamic_shapes=(({0: Dim.DYNAMIC},), {}))
    with pytest.raises(UnknownSize, match=r"^arg_0: the size s\d+ depends on data or on a dynamic dimension"):
        Prober("accounting").cost(program.node("mul"))


def test_an_operator_that_does_not_run_on_fakes_is_named() -> None:
    node = node_of(aten.mm.default, *CALLS["mm"][1](F32))
    node.target = aten.bmm.default
    with pytest.raises(UnknownSize, match=r"^mm: aten\.bmm\.default cannot be sized without data \("):
        Prober("accounting").cost(node)


def test_what_is_no_operator_costs_nothing() -> None:
    program = traced(lambda x: x.split(2), torch.ones(4))
    member = next(n for n in program.ops() if n.name.startswith("getitem"))
    assert Prober("accounting").cost(member) == OpCost()


def test_specs_carry_offsets_and_local_storages() -> None:
    program = traced(lambda x: x[1:] + x[:1], torch.ones(3, 2))
    add = next(n for n in program.ops() if n.target is aten.add.Tensor)
    first, second = call_of(add).args
    assert first == TensorSpec((2, 2), (2, 1), F32, 2, 0)
    assert second == TensorSpec((1, 2), (2, 1), F32, 0, 0)


def test_nothing_is_held_of_a_call_that_was_costed() -> None:
    held = LiveStorages()
    x = torch.ones(4)
    y = x + 1
    held.count(y)
    gc.disable()
    try:
        Prober("accounting", None).cost_of(aten.add.Tensor, (x, 1), {}, y)
        del y
        assert held.live_bytes == 0
    finally:
        gc.enable()
