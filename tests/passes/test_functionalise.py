"""`Functionalise`: writes in place become new values where nobody could tell, and stay everywhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.functionalise import Functionalise, functional_overload
from passes.mark_state import written_nodes
from passes.program import Program, storage_id, tensors_of
from planner.capture import capture
from tests.passes.programs import canonical, nodes_calling, text
from tests.strategies.modules import Case, cases

aten = torch.ops.aten


def interpret(
    program: Program, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], list[Tensor]]:
    """Runs a canonical program on real tensors: its outputs, and its state afterwards. Every value is as recorded."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    leaves = iter(tree_leaves((bound.args, bound.kwargs)))
    env: dict[fx.Node, Any] = {}
    state = []
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in program.weights:
                own = program.constants.get(node.name, tensors.get(program.weights[node.name].name))
                assert own is not None
                env[node] = own.detach().clone(memory_format=torch.preserve_format)
                state += [env[node]] if program.weights[node.name].state else []
            elif node.op == "placeholder":
                env[node] = next(leaves)
            elif node.op == "call_function":
                arguments, named = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*arguments, **named)  # type: ignore[operator]
                assert_as_recorded(node, env)
    return [env[o] if isinstance(o, fx.Node) else o for o in program.output.args[0]], state  # type: ignore[union-attr]


def assert_as_recorded(node: fx.Node, env: dict[fx.Node, Any]) -> None:
    """Dtype, sizes, strides, and whether the storage is that of an argument."""
    real = [t for t in tree_leaves(env[node]) if isinstance(t, Tensor)]
    arguments = [t for n in node.all_input_nodes for t in tree_leaves(env[n]) if isinstance(t, Tensor)]
    recorded = [t for n in node.all_input_nodes for t in tensors_of(n)]
    for found, expected in zip(real, tensors_of(node), strict=True):
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride()), node.name
        shared = [storage_id(found) == storage_id(t) for t in arguments]
        assert shared == [storage_id(expected) == storage_id(t) for t in recorded], node.name


def same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return bool(a == b)
    return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and torch.equal(a, b)


def sharing(values: list[Any]) -> list[tuple[int, ...]]:
    """Which outputs are in one storage."""
    ids = [storage_id(v) if isinstance(v, Tensor) else -1 for v in values]
    return [tuple(i for i, other in enumerate(ids) if other == own) for own in ids]


def check(program: Program, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """The pass applied: the same outputs, aliasing of outputs and state, bit for bit."""
    functional = run_passes(program, (Functionalise(),))
    outputs, state = interpret(program, module, args, kwargs)
    found, left = interpret(functional, module, args, kwargs)
    assert all(map(same, outputs, found))
    assert all(map(same, state, left))
    assert sharing(outputs) == sharing(found)
    assert writes(Functionalise().apply(functional)) == writes(functional)
    return functional


def writes(program: Program) -> list[str]:
    """Names of the nodes that write in place."""
    return [node.name for node in program.ops() if written_nodes(node)]


@given(cases())
def test_the_same_bits(case: Case) -> None:
    module = case.fresh()
    program = run_passes(capture(module, case.args, case.kwargs), CANONICALISE)
    check(program, case.fresh(), case.args, case.kwargs)


class Fixed(nn.Module):
    """A function of an input, with a weight, a buffer and a convolution to use."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("seen", torch.zeros(2, 3, 4, 4))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def functionalised(function: Callable[[Any, Tensor], Any]) -> Program:
    module, x = Fixed(function).eval(), torch.randn(2, 3, 4, 4)
    return check(canonical(module, x), module, (x,), {})


def test_an_activation_in_place_on_a_fresh_result() -> None:
    program = functionalised(lambda self, x: F.relu(self.norm(self.conv(x)), inplace=True) + x)
    assert writes(program) == []
    assert len(nodes_calling(program.graph, aten.relu.default)) == 1


def read_through_the_argument(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y.add_(x).mul_(2.0)
    return y * x


def read_through_views_made_afterwards(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = F.silu(y, inplace=True)
    first, second = y.chunk(2)
    second.masked_fill_(second < 0, 0.5)  # the other half is a view of before
    return torch.cat([first.flatten(), second.flatten(), z.flatten()])


def read_before(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    mean = y.view(2, -1).mean()
    return y.clamp_(-1, 1) + mean


def accumulated(self: Any, x: Tensor) -> Any:
    y = torch.zeros_like(x)
    for scale in (1.0, 2.0):
        y += scale * x
    return y, y.view(-1)


@pytest.mark.parametrize(
    ("function", "left"),
    [(read_through_the_argument, 0), (read_through_views_made_afterwards, 1), (read_before, 0), (accumulated, 0)],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_what_is_read_through_its_result_alone(function: Callable[[Any, Tensor], Any], left: int) -> None:
    assert len(writes(functionalised(function))) == left


def an_input(self: Any, x: Tensor) -> Tensor:
    return self.conv(x.relu_())


def a_view_of_an_input(self: Any, x: Tensor) -> Tensor:
    return self.conv(x.view(x.shape).mul_(0.5))


def a_buffer(self: Any, x: Tensor) -> Tensor:
    return self.seen.add_(x) * x


def a_view_made_before_is_read(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    flat = y.view(-1)
    y.relu_()
    return flat * 2


def a_view_made_before_is_given_back(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    flat = y.view(-1)
    y.relu_()
    return flat, x * 2


def the_whole_is_read_after_a_part_was_written(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y[:, 1:].mul_(0.5)
    return y + x


def another_dtype(self: Any, x: Tensor) -> Tensor:
    return self.conv(x).add_(x.double())


def other_strides(self: Any, x: Tensor) -> Tensor:
    return (self.conv(x)[:, :, 1:].exp_() * 2).sum()


def its_own_argument(self: Any, x: Tensor) -> Tensor:
    y = torch.eye(4) + x[0, 0]
    return y.addmm_(y, y)


@pytest.mark.parametrize(
    "function",
    [
        an_input, a_view_of_an_input, a_buffer, a_view_made_before_is_read, a_view_made_before_is_given_back,
        the_whole_is_read_after_a_part_was_written, another_dtype, other_strides, its_own_argument,
    ],
)  # fmt: skip
def test_what_stays(function: Callable[[Any, Tensor], Any]) -> None:
    module, x = Fixed(function).eval(), torch.randn(2, 3, 4, 4)
    program = canonical(module, x)
    assert len(writes(program)) == 1
    functional = run_passes(program, (Functionalise(),))
    assert text(functional) == text(program)


def test_a_chain_of_writes_through_different_names() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        flat = y.relu_().view(2, -1)
        flat.add_(1.0)  # y is read after it
        z = flat.mul_(2.0)
        return z.view_as(y) + y

    program = functionalised(function)
    assert len(writes(program)) == 2


def test_storage_level_reads_keep_a_write_into_a_part_of_a_storage() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        whole = self.conv(x)
        return whole[1:].relu_().as_strided((2, 2), (1, 2), 1)

    assert len(writes(functionalised(function))) == 1


def test_overloads() -> None:
    pairs = {
        aten.relu_.default: aten.relu.default,
        aten.add_.Tensor: aten.add.Tensor,
        aten.pow_.Scalar: aten.pow.Tensor_Scalar,
        aten.floor_divide_.Tensor: aten.floor_divide.default,
        aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
        aten.index_put_.default: aten.index_put.default,
        aten.copy_.default: aten.copy.default,
    }
    assert {target: functional_overload(target) for target in pairs} == pairs
    none = (aten.relu.default, aten.dropout_.default, aten.normal_.default, aten.t_.default, aten.set_.source_Tensor,
            aten._foreach_add_.Scalar, aten.mul.out, aten.__ior__.Tensor)  # fmt: skip
    assert {functional_overload(target) for target in none} == {None}
