"""Regions of convolutions in channels-last: the graph, equal results with equal strides, and what ends a region."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from passes.base import run_passes
from passes.cast_weights import Cast, CastWeights
from passes.channels_last import CONVOLUTIONS, ENTERS, LEAVES, ChannelsLast, ConvRegion, is_channels_last, rank_of
from passes.conv_regions import conv_regions
from passes.functionalise import Functionalise
from passes.program import Program
from passes.slice_weights import SliceWeights, WeightSlices
from runtime.errors import PlanFileError
from tests.passes.in_parts import assert_same, check_runs, plan_of
from tests.passes.programs import canonical, text
from tests.strategies.nets import Case, nets
from tests.zoo import ZOO

aten = torch.ops.aten
F64 = torch.float64
CLOSE = 1e-12


def rewritten(module: nn.Module, *args: Any, device: str = "cpu", **kwargs: Any) -> tuple[Program, Program]:
    """The canonical program, and that with all its regions in channels-last."""
    program = canonical(module, *args, **kwargs)
    return program, run_passes(program, (ChannelsLast(conv_regions(program, device)),))


def conversions(program: Program) -> dict[str, list[str]]:
    """By direction the values that are converted."""
    names = [node.name.rpartition("__") for node in program.ops()]
    return {how: [value for value, _, suffix in names if suffix == how] for how in (ENTERS, LEAVES)}


def check(module: nn.Module, *args: Any, least: bool = True, **kwargs: Any) -> Program:
    """Runs with equal results, equal strides and the predicted bytes (also at `least`); gives the rewritten program."""
    with torch.no_grad():
        expected = module.eval()(*args, **kwargs)
    _, program = rewritten(module, *args, **kwargs)
    p = plan_of(program, module, args, kwargs)
    if least:
        check_runs(p, expected, *args, close=CLOSE, **kwargs)
        return program
    m = p.build()
    assert_same(m(*args, **kwargs), expected, CLOSE)
    assert m.report().peak_bytes == p.peak_bytes
    m.close()
    return program


class Residual(nn.Module):
    """A block of a decoder, [B, 4, H, W] to [B, 3, 2H, 2W], with a skip, norms, upsampling and a concatenation."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.other = nn.GroupNorm(2, 8), nn.BatchNorm2d(8)
        self.last, self.inplace = nn.Conv2d(16, 3, 3, padding=1), inplace
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = functional.relu(self.other(self.second(functional.silu(self.norm(y)))), inplace=self.inplace)
        return self.last(functional.interpolate(torch.cat([y + z, z], 1), scale_factor=2.0))


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def test_the_graph() -> None:
    _, program = rewritten(nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3)), torch.randn(1, 2, 8, 8))
    (x,) = program.inputs
    assert text(program).splitlines()[4:] == [
        f"input {x}: f32[1, 2, 8, 8]",
        f"{x}__channels_last = clone({x}, memory_format=torch.channels_last)",
        f"conv2d = conv2d({x}__channels_last, w__0_weight, w__0_bias)",
        "silu = silu(conv2d)",
        "conv2d_1 = conv2d(silu, w__2_weight, w__2_bias)",
        "conv2d_1__contiguous = clone(conv2d_1, memory_format=torch.contiguous_format)",
        "return conv2d_1__contiguous",
    ]
    assert [w.stored and (w.stored.name, w.stored.part) for w in program.weights.values()] == [
        ("0.weight:layout", "layout"), None, ("2.weight:layout", "layout"), None,
    ]  # fmt: skip
    assert program.weights["w__0_weight"].spec.stride == (18, 1, 6, 2)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block(inplace: bool, batch: int) -> None:
    module = Residual(inplace)
    before, after = rewritten(module.eval(), image(batch, 4, 6, 5))
    (region,) = conv_regions(before)
    assert [sum(map(len, conversions(after).values()))] == [2]
    assert len(region.operators) == len([node for node in before.ops() if rank_of(node)])
    check(module, image(batch, 4, 6, 5))


@settings(max_examples=40, deadline=None)
@given(nets())
def test_nets(case: Case) -> None:
    check(case.module(), case.input(), least=False)


@settings(max_examples=40, deadline=None)
@given(nets(), st.booleans())
def test_each_value_is_converted_once(case: Case, strided: bool) -> None:
    x = case.input()
    x = x.to(memory_format=torch.channels_last) if strided and x.dim() == 4 else x
    program, after = rewritten(case.module(), x)
    members = {name for region in conv_regions(program) for name in region.operators}
    written = any(node.target._schema.is_mutable for node in program.ops() if isinstance(node.target, torch._ops.OpOverload))
    for values in conversions(after).values():
        assert written or len(values) == len(set(values))
    assert not members & set(conversions(after)[ENTERS])  # nothing is converted inside
    for node in after.ops():
        if node.name in members:
            assert is_channels_last(node.meta["val"])
            inputs = [n for n in node.all_input_nodes if n.name not in after.weights and rank_of(n) == rank_of(node)]
            assert all(is_channels_last(n.meta["val"]) or n.meta["val"].shape != node.meta["val"].shape for n in inputs)


class Recorded(fx.Interpreter):
    """Compares the strides of every real value with those recorded."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            assert value.stride() == n.meta["val"].stride(), n.name
        return value


@settings(max_examples=40, deadline=None)
@given(nets(), st.sampled_from([F64, torch.float32]))
def test_kernels_give_the_strides_that_fakes_give(case: Case, dtype: torch.dtype) -> None:
    module, x = case.module().to(dtype), case.input().to(dtype)
    _, program = rewritten(module, x)
    named = dict(module.named_parameters())
    given = []
    for key in [node.name for node in program.graph.nodes if node.op == "placeholder"]:
        weight = program.weights.get(key)
        given.append(
            x if weight is None else named[weight.name].detach().as_strided_(*stride(named[weight.name], weight.spec.stride))
        )
    with torch.no_grad():
        Recorded(fx.GraphModule(nn.Module(), program.graph)).run(*given)


def stride(tensor: Tensor, strides: tuple[int, ...]) -> tuple[Any, Any]:
    """Shape and strides to view the memory of a weight by, whatever its numbers then are."""
    return tensor.shape, strides


@pytest.mark.parametrize("least", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_real_models(name: str, least: bool) -> None:
    module, args, kwargs = ZOO[name]()
    module = module.double()
    args = tuple(x.double() if x.is_floating_point() else x for x in args)
    program = check(module, *args, least=least, **kwargs)
    found = conversions(program)
    if name == "unet":  # once in and once out: attention reads its tokens from channels-last, and gives them so
        assert (len(found[ENTERS]), len(found[LEAVES])) == (1, 1)
    else:  # attention there takes all pixels of a channel
        assert (len(found[ENTERS]), len(found[LEAVES])) == (2, 2)


def test_inputs_in_channels_last() -> None:
    """Nothing is converted: what comes in is channels-last already, and so was what came out."""
    x = image(2, 4, 6, 5).to(memory_format=torch.channels_last)
    program = check(Residual(), x)
    assert conversions(program) == {ENTERS: [], LEAVES: []}
    assert any(weight.stored is not None for weight in program.weights.values())


def test_a_module_in_channels_last() -> None:
    program = check(Residual().to(memory_format=torch.channels_last), image(2, 4, 6, 5))
    assert all(weight.stored is None for weight in program.weights.values())


@pytest.mark.parametrize("channels", [1, 2])
def test_volumes(channels: int) -> None:
    module = nn.Sequential(nn.Conv3d(channels, 4, 3, padding=1), nn.SiLU(), nn.Conv3d(4, 2, 3)).double()
    check(module, image(1, channels, 4, 5, 6))
    check(module.float().double(), image(2, channels, 4, 5, 6))


class Shares(nn.Module):
    """One kernel for a convolution and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(image(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight).sum() * self.weight.flatten(1).sum()


def test_a_weight_that_others_read_stays() -> None:
    program, after = rewritten(Shares(), image(1, 4, 5, 5))
    assert conv_regions(program) == ()
    assert after is program


class Writes(nn.Module):
    """Returns the memory that it writes, and a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        part = y[:, :2]
        part.mul_(2)
        return y, part


def test_memory_that_views_write_stays() -> None:
    check(Writes(), image(2, 4, 5, 5))


def test_group_norm_ends_a_region_on_cuda() -> None:
    block = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 3))
    program = canonical(block, torch.randn(1, 4, 9, 9))
    assert [region.operators for region in conv_regions(program, "cuda")] == [
        ("conv2d", "silu"),
        ("conv2d_1", "silu_1", "conv2d_2"),
    ]
    assert len(conv_regions(program, "cpu")) == 1
    assert conv_regions(canonical(block.double(), image(1, 4, 9, 9)), "cuda") == ()  # cuDNN has none for doubles


@pytest.mark.parametrize("operators", [("nothing",), ("flatten",), ("conv2d", "flatten")])
def test_regions_that_do_not_fit(operators: tuple[str, ...]) -> None:
    block = nn.Sequential(nn.SiLU(), nn.Conv2d(4, 8, 3), nn.Flatten())
    program = canonical(block, torch.randn(1, 4, 9, 9))
    with pytest.raises(PlanFileError, match=r"plan (the model|it)? ?again"):
        run_passes(program, (ChannelsLast((ConvRegion(operators),)),))


def test_weights_in_parts_and_functional() -> None:
    module = Residual(inplace=True)
    x = image(2, 4, 6, 5)
    with torch.no_grad():
        expected = module.eval()(x)
    _, program = rewritten(module, x)
    program = run_passes(program, (SliceWeights((WeightSlices("w_second_weight", 3),)), Functionalise()))
    check_runs(plan_of(program, module, (x,), {}), expected, x, close=CLOSE)


def test_casts_read_the_layout() -> None:
    """As with the module's own layout, whatever is cast: the values are in channels-last strides, and the result the same."""
    module, x = Residual().eval(), image(1, 4, 6, 5)
    program, after = rewritten(module, x)
    cast = CastWeights((Cast("w_second_weight", "int8"),))
    both, plain = run_passes(after, (cast,)), run_passes(program, (cast,))
    values = both.weights["w_second_weight__values"]
    assert values.spec.stride == after.weights["w_second_weight"].spec.stride
    (conv,) = [n for n in both.ops() if n.name == "conv2d_1"]
    assert conv.target in CONVOLUTIONS
    assert is_channels_last(conv.args[1].meta["val"])  # type: ignore[union-attr]
    m = plan_of(plain, module, (x,), {}).build()
    expected = m(x)
    m.close()
    check_runs(plan_of(both, module, (x,), {}), expected, x, close=CLOSE)


def test_weights_that_are_written_arrive() -> None:
    module, x = Residual(), image(1, 4, 6, 5)
    _, program = rewritten(module, x)
    m = plan_of(program, module, (x,), {}).build()
    with torch.no_grad():
        module.second.weight.mul_(2)
        given = m(x)
        m.close()
        expected = module(x)
    for a, b in zip(tree_leaves(given), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=CLOSE)
