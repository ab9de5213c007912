"""`WriteInPlace`: elementwise operators write over what ends there, and nobody can tell but by the bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, fx, nn

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.functionalise import functional_overload
from passes.liveness import analyse_liveness
from passes.loop import loop_of
from passes.probe import Prober
from passes.program import Program
from passes.write_in_place import WriteInPlace, in_place_overload, writable_in_place
from planner import plan
from planner.capture import capture
from planner.families import family_of
from planner.pipeline import emit_program
from planner.solve.decisions import UNTILED, Decisions
from planner.solve.rewriting import Rewriting
from runtime.errors import PlanFileError
from tests.passes.programs import canonical, run, text
from tests.passes.test_functionalise import interpret, same, sharing
from tests.properties.test_plans import planned
from tests.properties.test_plans import same as all_same
from tests.strategies.modules import INSTRUCTIONS, Case, cases
from tests.zoo import ZOO

aten = torch.ops.aten

# What elementwise operators, joins and views are made of; layers are only there to have weights.
_KINDS = {
    "activation", "linear", "add", "mul", "residual", "scalar_option", "cat", "split", "cut", "transpose", "rare_view",
    "contiguous", "flat_view", "expand", "broadcast", "cast", "cast_round_trip", "factory", "write", "write_through_view",
}  # fmt: skip
elementwise = cases(exclude=frozenset(i.name for i in INSTRUCTIONS) - _KINDS)


def rewritten(program: Program) -> Program:
    return run_passes(program, (WriteInPlace(writable_in_place(program)),))


def check(program: Program, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """The pass applied: the same outputs, aliasing of outputs, state and inputs bit for bit, and nowhere more bytes."""
    changed = rewritten(program)
    outputs, state = interpret(program, module, args, kwargs)
    found, left = interpret(changed, module, args, kwargs)
    assert all(map(same, outputs, found))
    assert all(map(same, state, left))
    assert sharing(outputs) == sharing(found)
    before, after = live_bytes(program), live_bytes(changed)
    assert all(after[name] <= nbytes for name, nbytes in before.items())
    assert all(nbytes <= after[name.removesuffix("_place")] for name, nbytes in after.items() if name not in before)
    assert writable_in_place(changed) == ()
    return changed


def live_bytes(program: Program) -> dict[str, int]:
    """At the worst moment of every operator."""
    live = analyse_liveness(program, Prober("accounting"))
    return dict(zip((node.name for node in live.nodes), live.bytes_at, strict=True))


@given(cases())
def test_the_same_bits_of_any_module(case: Case) -> None:
    module, given_ = case.fresh(), copy.deepcopy((case.args, case.kwargs))
    program = run_passes(capture(module, case.args, case.kwargs), CANONICALISE)
    check(program, case.fresh(), case.args, case.kwargs)
    assert all_same((case.args, case.kwargs), given_)


@given(elementwise)
def test_the_same_bits_of_elementwise_modules_and_no_higher_peak(case: Case) -> None:
    eager, module = case.fresh(), case.fresh()
    given_, weights = copy.deepcopy((case.args, case.kwargs)), copy.deepcopy(dict(module.named_parameters()))
    p = planned(case, module)
    if p is None:
        return
    base, final = p._tilings.base, p._tilings.of(UNTILED)
    assert final.resident.peak_bytes <= base.resident.peak_bytes
    assert final.minimum.peak_bytes <= base.minimum.peak_bytes
    for q in (p, p.replan(p.minimum_bytes)):
        m = q.build()
        for _ in range(2):
            with torch.no_grad():
                expected = eager(*copy.deepcopy(case.args), **copy.deepcopy(case.kwargs))
            assert all_same(m(*case.args, **case.kwargs), expected)
            assert m.report().peak_bytes == q.peak_bytes
        q.restore()
        eager = case.fresh()
    assert all_same((case.args, case.kwargs), given_)
    assert all_same(dict(module.named_parameters()), weights)


class Fixed(nn.Module):
    """A function of an input, with a convolution to make values of their own."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("table", torch.rand(2, 3, 4, 4))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def fixed(function: Callable[[Any, Tensor], Any], x: Tensor | None = None) -> Program:
    module, x = Fixed(function).eval(), torch.randn(2, 3, 4, 4) if x is None else x
    return check(canonical(module, x), module, (x,), {})


def in_place(program: Program) -> list[str]:
    """What was rewritten."""
    return [node.name.removesuffix("_place") for node in program.ops() if node.target is aten.alias.default]


def test_before_and_after() -> None:
    program = fixed(lambda self, x: F.silu(self.conv(x)) + x)
    assert text(program).splitlines()[-6:] == [
        "conv2d = conv2d(arg_0, w_conv_weight, w_conv_bias, [1, 1], [1, 1])",
        "silu_place = alias(conv2d)",
        "silu = silu_(silu_place)",
        "add_place = alias(silu)",
        "add = add_.Tensor(add_place, arg_0)",
        "return add",
    ]


def test_a_chain_lives_in_one_storage() -> None:
    program = fixed(lambda self, x: torch.tanh(F.relu(self.conv(x) * 2.0) / 3.0).exp().neg())
    assert in_place(program) == ["mul", "relu", "div", "tanh", "exp", "neg"]
    before, after = (
        live_bytes(canonical(Fixed(lambda s, x: (s.conv(x) * 2).exp()), torch.ones(2, 3, 4, 4))),
        live_bytes(program),
    )
    assert max(after.values()) == 2 * 384 < max(before.values())


def test_the_other_argument_of_a_sum_or_product() -> None:
    assert in_place(fixed(lambda self, x: x + self.conv(x))) == ["add"]
    assert in_place(fixed(lambda self, x: x * self.conv(x))) == ["mul"]
    assert in_place(fixed(lambda self, x: x - self.conv(x))) == []
    assert in_place(fixed(lambda self, x: torch.add(x, self.conv(x), alpha=2))) == []
    assert in_place(fixed(lambda self, x: torch.add(self.conv(x), x, alpha=2))) == ["add"]
    assert in_place(fixed(lambda self, x: self.table * self.conv(x))) == ["mul"]


def test_views_that_end_before() -> None:
    program = fixed(lambda self, x: torch.relu(self.conv(x).flatten(1).view(2, 3, 4, 4)).transpose(1, 2))
    assert in_place(program) == ["relu"]


def test_what_another_operator_reads_as_well_is_written_over_by_the_last() -> None:
    def gate(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * torch.sigmoid(y)

    assert in_place(fixed(gate)) == ["mul"]


def test_a_member_of_several_results() -> None:
    def parts(self: Any, x: Tensor) -> Tensor:
        values, _ = torch.max(self.conv(x), 1)
        return torch.relu(values)

    assert in_place(fixed(parts)) == ["relu"]


def test_what_the_module_writes_in_place_itself_stays() -> None:
    def own(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        F.relu(y, inplace=True)
        z = torch.exp(y)
        z[:, :1] = 0.0
        return torch.tanh(z)

    program = fixed(own)
    assert in_place(program) == ["exp", "tanh"]
    assert "relu_ = relu_(conv2d)" in text(program)


def test_channels_last_is_kept() -> None:
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert in_place(fixed(lambda self, x: torch.relu(self.conv(x)) * x, x)) == ["relu", "mul"]


def view_read_later(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    row = y[:, 0]
    return torch.relu(y).sum() + row.sum()


def read_later(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return torch.sigmoid(y).sum() + y.sum()


def read_twice(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return y + y


def its_own_view(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return y + y.transpose(2, 3)


def output_too(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return torch.relu(y), y


def view_is_output_too(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return torch.relu(y), y[0]


REFUSED: dict[str, Callable[[Any, Tensor], Any]] = {
    "a view of it is read later": view_read_later,
    "it is read later": read_later,
    "the operator reads it twice": read_twice,
    "the operator reads a view of it": its_own_view,
    "it is an output too": output_too,
    "a view of it is an output too": view_is_output_too,
    "it is an input": lambda self, x: torch.relu(x),
    "it is a view of an input": lambda self, x: torch.relu(x.view(6, 16)),
    "it is a weight": lambda self, x: torch.relu(self.conv.weight) + x.sum(),
    "it is a view of a buffer": lambda self, x: torch.exp(self.table.flatten()),
    "it broadcasts": lambda self, x: self.conv(x).sum(1, keepdim=True) + x,
    "the result has another dtype": lambda self, x: self.conv(x).to(torch.bfloat16) + x,
    "integers are divided": lambda self, x: self.conv(x).to(torch.int64) / 2,
    "a comparison": lambda self, x: self.conv(x) < x,
    "it is expanded": lambda self, x: torch.relu(self.conv(x)[:1, :1].sum().expand(2, 3)),
    "it is a part of more": lambda self, x: torch.relu(self.conv(x)[:1]),
    "it is not contiguous": lambda self, x: torch.relu(self.conv(x)[:, :, ::2]),
    "the result is laid out otherwise": lambda self, x: x.contiguous() + self.conv(x).transpose(2, 3),
    "it draws random numbers": lambda self, x: torch.bernoulli(torch.zeros_like(x)),
}


SUMS = {"a view of it is read later", "it is read later", "it is a weight"}


@pytest.mark.parametrize("why", sorted(REFUSED))
def test_refused(why: str) -> None:
    program = fixed(REFUSED[why])
    # A sum that comes behind may be written over its own argument.
    assert set(in_place(program)) <= ({"add"} if why in SUMS else set())


def test_also_where_sizes_are_symbols() -> None:
    """One program for all sizes; at each as eager, and what is predicted is measured."""
    module = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4), nn.Sigmoid()).eval()
    p = plan(module, "1GB", inputs=(torch.randn(64, 4),), dynamic={0: {0: "n"}}, device="accounting")
    assert "relu_.default(" in p.code
    m = p.build()
    for n in (64, 17, 2):
        x = torch.randn(n, 4)
        with torch.no_grad():
            assert torch.equal(m(x), module(x))
        assert m.report().peak_bytes == p.peak_bytes_at(n=n)
    p.restore()


def test_an_operator_that_cannot_is_refused_by_name() -> None:
    program = canonical(Fixed(read_later), torch.randn(2, 3, 4, 4))
    for name in ("sigmoid", "nowhere"):
        with pytest.raises(PlanFileError, match=f"'{name}' cannot write in place; plan the model again"):
            run_passes(program, (WriteInPlace((name,)),))


# Overloads -----------------------------------------------------------------------------------------------------------

_UNARY = {
    "relu": torch.relu, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "exp": torch.exp, "neg": torch.neg, "clamp": lambda t: t.clamp(-0.5, 0.5),
    "pow": lambda t: t.pow(2), "sqrt": lambda t: t.abs().sqrt(), "rsqrt": lambda t: (t.abs() + 1).rsqrt(),
    "leaky_relu": lambda t: F.leaky_relu(t, 0.1), "elu": F.elu, "hardswish": F.hardswish, "mish": F.mish,
    "hardtanh": F.hardtanh, "add": lambda t: t + 1.5, "mul": lambda t: t * 0.3, "sub": lambda t: t - 1, "div": lambda t: t / 3,
    "masked_fill": lambda t: t.masked_fill(torch.ones(t.shape[-1], dtype=torch.bool), 0.5), "erf": torch.erf, "cos": torch.cos,
    "softplus": F.hardsigmoid, "abs": torch.abs, "floor": torch.floor, "log": lambda t: (t.abs() + 1).log(),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", sorted(_UNARY))
def test_operators_give_the_same_bits_in_place(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 37, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    function = _UNARY[name]

    def made(t: Tensor) -> Tensor:
        return function(t.flip(0))

    program = traced_function(made, x)
    assert in_place(program), text(program)
    (found,), _ = interpret(program, nn.Identity(), (x,), {})
    assert torch.equal(found.view(torch.uint8), made(x).contiguous().view(torch.uint8))


def traced_function(function: Callable[..., Any], *args: Tensor) -> Program:
    class Module(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            result: Tensor = function(t)
            return result

    return rewritten(canonical(Module(), *args))


def _targets() -> list[Any]:
    names = [name for name in dir(aten) if name.endswith("_") and not name.startswith("_")]
    packets = [getattr(aten, name) for name in names]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


def test_overloads_come_from_schemas() -> None:
    found = {functional_overload(target) for target in _targets()} - {None}
    known = {target for target in found if in_place_overload(target) is not None}
    assert {aten.silu.default, aten.gelu.default, aten.add.Tensor, aten.mul.Scalar, aten.masked_fill.Scalar} <= known
    assert {aten.div.Tensor, aten.pow.Tensor_Scalar, aten.clamp.default, aten.neg.default, aten.masked_fill.Tensor} <= known
    assert not {aten.cumsum.default, aten.addmm.default, aten.index_put.default, aten.scatter.src, aten.tril.default} & known
    assert in_place_overload(aten.bernoulli.default) is None
    assert in_place_overload(aten.where.self) is None
    assert in_place_overload(torch.relu) is None


def test_in_place_costs_the_same_seconds_and_takes_nothing_beside() -> None:
    """Of every overload that takes one tensor and numbers: the same family, FLOPs and bytes moved, no workspace."""
    prober, seen = Prober("accounting"), 0
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    for target in {functional_overload(t) for t in _targets()} - {None}:
        changed = in_place_overload(target)
        if changed is None or any(a.default_value is None and not a.kwarg_only for a in target._schema.arguments[1:]):
            continue
        with mode:
            value = torch.empty(4, 8)
            try:
                result = target(value)
            except RuntimeError:
                continue  # not of this dtype
        if result.dtype != value.dtype or result.untyped_storage()._cdata == value.untyped_storage()._cdata:
            continue
        seen += 1
        before = prober.cost_of(target, (value,), {}, result)
        after = prober.cost_of(changed, (value,), {}, value)
        assert (before.flops, before.moved_bytes) == (after.flops, after.moved_bytes), target
        assert after.output_bytes == ()
        assert after.workspace_bytes <= before.workspace_bytes, target
        assert family_of(target) is family_of(changed), target
    assert seen > 30


def test_weights_that_the_operator_reads_still_come_when_it_runs() -> None:
    """Streams name operators: the one that writes in place has the name that it had."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale = nn.Linear(64, 64), nn.Parameter(torch.rand(32, 64))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(x) * self.scale).relu()

    module, x = Scaled().eval(), torch.randn(32, 64)
    with torch.no_grad():
        expected = module(x)
    p = plan(module, "1GB", inputs=(x,), device="accounting", allow=("offload",))
    p = p.replan(p.minimum_bytes)
    m = p.build()
    assert torch.equal(m(x), expected)
    assert m.report().peak_bytes == p.peak_bytes
    assert "mul" in {stream.first for stream in p.decisions.streams}
    assert "mul_.Tensor(mul_place" in p.code
    p.restore()


@pytest.mark.parametrize("name", ["bert", "vae_decoder"])
def test_tiles_write_in_place_as_well(name: str) -> None:
    """In the bodies of loops: the bits and at most the peak of the tiles that do not, and what is predicted is measured."""
    example = ZOO[name]()
    p = plan(example[0], "1GB", inputs=example[1], kwargs=example[2], device="accounting")
    tilings = p._tilings
    tiling = p.replan(p.minimum_bytes).decisions.tiling
    assert tilings.build is not None
    plain = tilings.build(Rewriting(p.program).of(tiling), tiling)
    final = tilings.of(tiling).problem
    assert any("_part_place" in node.name for body in bodies(final.program) for node in body.nodes)
    results = []
    for problem in (plain, final):
        program, proof = emit_program(problem, Decisions(tiling=tiling), 10**9)
        ((outputs, measured),) = run(program, proof, example)
        assert measured == proof.peak_bytes
        results.append((outputs, measured))
    assert all_same(results[0][0], results[1][0])
    assert results[1][1] <= results[0][1]


def bodies(program: Program) -> list[fx.Graph]:
    return [run.body for node in program.ops() if (loop := loop_of(node)) is not None for run in loop.runs]
