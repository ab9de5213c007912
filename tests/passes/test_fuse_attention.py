"""`FuseAttention`: what is attention and what is not, that the operator is the same function, and what models give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.base import run_passes
from passes.fuse_attention import FuseAttention, fusable_attentions
from passes.program import Program
from planner import Plan, plan
from planner.capture import capture
from planner.prepare import tilings_of
from planner.solve.decisions import Decisions
from runtime.errors import PlanFileError
from tests.passes.programs import Function, canonical, text
from tests.passes.tiled import interpreted

SDPA = torch.ops.aten.scaled_dot_product_attention.default
INF = float("inf")
LEAST = torch.finfo(torch.float64).min


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _product(x: Tensor) -> Tensor:
    return x @ x.transpose(-1, -2)


def fused(program: Program) -> Program:
    """With all attentions that there are."""
    return run_passes(program, (FuseAttention(fusable_attentions(program)),))


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-12) -> None:
    """Not a number in the same places, elsewhere as close as that to the largest value."""
    for one, other in zip(found, wanted, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one.isnan(), other.isnan())
        one, other = one.nan_to_num(), other.nan_to_num()
        assert float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


def check(function: Callable[..., Any], *args: Tensor) -> Program:
    """That all softmaxes of a function are fused, and that it is the same function; the program that it becomes."""
    module = Function(function).eval()
    before = canonical(module, *args)
    after = fused(before)
    assert not [node for node in after.ops() if "softmax" in str(node.target)]
    assert_same(interpreted(after, module, *args), interpreted(before, module, *args))
    last = [n.name for n in before.output.all_input_nodes]
    assert [n.name for n in after.output.all_input_nodes] == last
    return after


# --- patterns --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """One way to write attention: how the products are written, and what is done to the scores in between."""

    sizes: tuple[int, int, int, int, int, int]
    form: str
    steps: tuple[tuple[Any, ...], ...]
    groups: int = 1
    ending: str = "none"
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
        batch, heads, queries, keys = self.sizes[:4]
        k, v = (_repeated(each, self.groups) for each in (k, v))
        flat = self.form in ("bmm", "baddbmm", "baddbmm with an addend")
        given = list(tensors)
        if flat:
            q, k, v = (each.reshape(-1, *each.shape[2:]) for each in (q, k, v))
        scores = self._scores(q, k, given)
        if flat and any(step[0] not in ("scale", "divide") for step in self.steps):
            scores = scores.view(batch, heads, queries, keys)
        for kind, *options in self.steps:
            scores = _done(kind, scores, options, given)
        shares = torch.softmax(scores, -1)
        if self.ending == "cast":
            shares = nn.functional.softmax(scores, scores.dim() - 1, dtype=torch.float64).to(torch.float64)
        if self.ending == "contiguous":
            shares = shares.contiguous()
        return self._result(shares.view(-1, queries, keys) if flat else shares, v)

    def _scores(self, q: Tensor, k: Tensor, given: list[Tensor]) -> Tensor:
        if self.form == "einsum":
            return torch.einsum("bhid,bhjd->bhij", q, k)
        if self.form == "einsum of tokens first":
            return torch.einsum("b i h d, b j h d -> b h i j", q.transpose(1, 2), k.transpose(1, 2))
        if self.form == "einsum with dots":
            return torch.einsum("...jd,...id->...ij", k, q)
        if self.form == "baddbmm":
            empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
            return torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.3)
        if self.form == "baddbmm with an addend":
            return torch.baddbmm(given.pop(0), q, k.transpose(-1, -2), beta=0.5, alpha=0.3)
        if self.form == "bmm":
            return torch.bmm(q, k.transpose(1, 2))
        return q @ (k.transpose(-1, -2) if self.form == "matmul" else k.permute(0, 1, 3, 2).contiguous())

    def _result(self, shares: Tensor, v: Tensor) -> Tensor:
        if self.form == "einsum of tokens first":
            return torch.einsum("b h i j, b j h d -> b i h d", shares, v.transpose(1, 2))
        if self.form == "matmul of columns":
            return (v.transpose(-1, -2) @ shares.transpose(-1, -2)).transpose(-1, -2)
        return torch.bmm(shares, v) if shares.dim() == 3 else shares @ v


def _repeated(x: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return x
    return x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def _done(kind: str, scores: Tensor, options: list[Any], given: list[Tensor]) -> Tensor:
    if kind == "scale":
        return scores * options[0]
    if kind == "divide":
        return scores / options[0]
    if kind == "factor":
        return scores * given.pop(0)
    if kind == "quotient":
        return scores / given.pop(0)
    if kind == "add":
        return given.pop(0) + scores if options[0] else scores + given.pop(0)
    if kind == "add in place":
        scores += given.pop(0)
        return scores
    if kind == "subtract":
        return torch.sub(scores, given.pop(0), alpha=2)
    if kind == "fill":
        return scores.masked_fill(given.pop(0), options[0])
    if kind == "fill in place":
        return scores.masked_fill_(given.pop(0), options[0])
    if kind == "where a number":
        return torch.where(given.pop(0), scores, options[0])
    return torch.where(given.pop(0), torch.full([], options[0], dtype=scores.dtype), scores)


@st.composite
def patterns(draw: st.DrawFn) -> tuple[Pattern, tuple[Tensor, ...]]:
    size = st.integers(1, 4)
    batch, heads, queries, keys, features, values = (draw(size) for _ in range(6))
    forms = ("matmul", "matmul of rows", "matmul of columns", "bmm", "baddbmm", "baddbmm with an addend")
    form = draw(st.sampled_from((*forms, "einsum", "einsum of tokens first", "einsum with dots")))
    groups = draw(st.sampled_from([n for n in (1, 2, 3) if heads % n == 0]))
    seeds = st.integers(0, 999)
    tensors: list[Tensor] = []

    def shape() -> list[int]:
        full = [batch, heads, queries, keys]
        return [draw(st.sampled_from([1, n])) for n in full[draw(st.integers(0, 3)) :]]

    def numbers() -> Tensor:
        found = normal(*shape(), seed=draw(seeds))
        return found.masked_fill(found > draw(st.sampled_from([INF, 0.5, -1.0])), -INF)  # some rows may be -inf all over

    if form == "baddbmm with an addend":
        tensors.append(normal(batch * heads, draw(st.sampled_from([1, queries])), keys, seed=draw(seeds)))
    steps: list[tuple[Any, ...]] = []
    lowest = 0.0  # what scores were replaced by
    for _ in range(draw(st.integers(0, 4))):
        masked = any(step[0] not in ("scale", "divide", "factor", "quotient") for step in steps) or "addend" in form
        kinds = ["add", "add in place", "subtract", "fill", "fill in place", "where a number", "where a tensor"]
        kinds += ["scale", "divide"] if lowest > LEAST else []
        kinds += ["factor", "quotient"] if not masked and form in ("matmul", "einsum") else []
        kind = draw(st.sampled_from(kinds))
        if kind in ("scale", "divide"):
            steps.append((kind, draw(st.sampled_from([0.25, 3, 1.0] if lowest else [0.25, -2.0, 1, 0.7]))))
        elif kind in ("factor", "quotient"):
            wanted = draw(st.sampled_from([(), (heads, 1, 1), (batch, 1, queries, 1)]))
            tensors.append(normal(*wanted, seed=draw(seeds)).abs() + 0.5)
            steps.append((kind,))
        elif kind in ("add", "add in place", "subtract"):
            tensors.append(numbers())
            steps.append((kind, draw(st.booleans())))
        else:
            value = draw(st.sampled_from([-INF, LEAST]))
            lowest = value if lowest > LEAST or value == LEAST else lowest
            tensors.append(normal(*shape(), seed=draw(seeds)) > draw(st.sampled_from([-1.0, 0.0, 1.0])))
            steps.append((kind, value))
    q = normal(batch, queries, heads, features, seed=draw(seeds)).transpose(1, 2)
    k = normal(batch, heads // groups, keys, features, seed=draw(seeds))
    v = normal(batch, heads // groups, keys, values, seed=draw(seeds))
    ending = draw(st.sampled_from(["none", "cast", "contiguous"]))
    found = Pattern((batch, heads, queries, keys, features, values), form, tuple(steps), groups, ending)
    return found, (q, k, v, *tensors)


@given(patterns())
def test_the_operator_is_the_same_function(drawn: tuple[Pattern, tuple[Tensor, ...]]) -> None:
    pattern, tensors = drawn
    with torch.no_grad():
        check(pattern, *tensors)


def test_before_and_after_in_text() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * 0.125 + mask, -1) @ v

    found = check(attend, *normal(3, 1, 2, 5, 4).unbind(), normal(5, 5))
    assert text(found).splitlines()[4:] == [
        "matmul_1_mask = reshape(arg_3, [1, 1, 5, 5])",
        "matmul_1_attention = scaled_dot_product_attention(arg_0, arg_1, arg_2, matmul_1_mask, scale=0.125)",
        "matmul_1_most = amax(matmul_1_mask, [-1], True)",
        "matmul_1_seen = mul.Tensor(matmul_1_most, 0.0)",
        "matmul_1 = add.Tensor(matmul_1_attention, matmul_1_seen)",
        "return matmul_1",
    ]


def test_a_mask_that_is_known_to_be_finite_needs_no_second_look() -> None:
    def attend(x: Tensor, kept: Tensor) -> Tensor:
        mask = (1.0 - kept.to(x.dtype)) * -1e4
        return torch.softmax(x @ x.transpose(-1, -2) + mask[:, None, None], -1) @ x

    found = check(attend, normal(2, 3, 5, 4), torch.tensor([[True, True, False, True, False], [False] * 5]))
    assert [str(n.target) for n in found.ops()].count("aten.amax.default") == 0


def test_two_attentions_of_which_one_reads_the_other() -> None:
    def attend(x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.softmax(x @ x.transpose(-1, -2), -1) @ x
        return x

    program = canonical(Function(attend), normal(1, 2, 5, 4))
    assert fusable_attentions(program) == ("softmax", "softmax_1")
    check(attend, normal(1, 2, 5, 4))
    assert fusable_attentions(FuseAttention(("softmax_1",)).apply(program)) == ("softmax",)
    assert fusable_attentions(fused(program)) == ()


def test_views_that_the_strides_of_attention_do_not_allow() -> None:
    """What the product gave was contiguous; attention gives what its queries are, transposed."""

    def attend(x: Tensor) -> tuple[Tensor, Tensor]:
        q = x.transpose(1, 2)
        y = torch.softmax(q @ q.transpose(-1, -2), -1) @ q
        return y.view(-1, 4), (y + 1.0).view(-1)

    found = check(attend, normal(2, 5, 3, 4))
    assert "reshape" in str(found.output.all_input_nodes[0].target)


def test_a_product_whose_result_is_permuted_keeps_its_strides() -> None:
    def attend(x: Tensor) -> Tensor:
        q = x.transpose(1, 2)
        y = torch.einsum("bhij,bhjd->bihd", torch.softmax(q @ q.transpose(-1, -2), -1), q)
        return (y + 1.0).permute(0, 2, 1, 3).view(2, -1)

    check(attend, normal(2, 5, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(dtype: torch.dtype) -> None:
    """Softmax in fp32 and back, as language models have it; more exact than what it replaces."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / 2 + mask
        return nn.functional.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v

    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    allowed[3] = dtype == torch.float16  # a row of padding: equal shares, but in float16 scores outlast its least number
    mask = torch.zeros(7, 7, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    args = (*normal(3, 2, 3, 7, 4, dtype=dtype).unbind(), mask)
    module = Function(attend).eval()
    before = canonical(module, *args)
    after = fused(before)
    assert len(fusable_attentions(before)) == 1
    assert_same(interpreted(after, module, *args), interpreted(before, module, *args), 10 * torch.finfo(dtype).eps)


def test_casts_to_a_wider_type_are_left_out() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q.float() @ k.transpose(-1, -2).float() + mask.float()
        return torch.softmax(scores, -1).to(v.dtype) @ v

    args = (*normal(3, 2, 3, 7, 4, dtype=torch.bfloat16).unbind(), normal(7, 7, dtype=torch.bfloat16))
    (node,) = [n for n in fused(canonical(Function(attend), *args)).ops() if n.target is SDPA]
    assert {n.meta["val"].dtype for n in node.all_input_nodes} == {torch.bfloat16}


def _shared_keys(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ k


@pytest.mark.parametrize("shape", [(2, 1, 6, 4), (6, 4), (1, 1, 6, 4)])
def test_keys_that_heads_share(shape: tuple[int, ...]) -> None:
    check(_shared_keys, normal(2, 3, 5, 4), normal(*shape))


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (2, 3, 2, 6, 4), (1, 2, 3, 2, 6, 4)])
def test_any_number_of_batch_dimensions(shape: tuple[int, ...]) -> None:
    """PyTorch's kernels take four dimensions."""
    found = check(_shared_keys, normal(*shape), normal(*shape, seed=1))
    (node,) = [n for n in found.ops() if n.target is SDPA]
    assert [n.meta["val"].dim() for n in node.all_input_nodes] == [4, 4, 4]


def test_masks_of_windows() -> None:
    """[B * windows, heads, ...] with a mask for each window, as Swin has it."""

    def attend(x: Tensor, mask: Tensor) -> Tensor:
        scores = (x @ x.transpose(-1, -2)).view(2, 3, 2, 5, 5) + mask[None, :, None]
        return torch.softmax(scores.view(-1, 2, 5, 5), -1) @ x

    check(attend, normal(6, 2, 5, 4), normal(3, 5, 5))


def test_a_causal_mask_that_is_made_in_place() -> None:
    def attend(x: Tensor) -> Tensor:
        mask = torch.full((5, 5), -INF, dtype=x.dtype, device=x.device).triu_(1)
        return torch.softmax(_product(x) + mask, -1) @ x

    found = check(attend, normal(2, 3, 5, 4))
    assert "amax" in text(found), "nobody knows what was written"


def test_a_number_in_a_tensor() -> None:
    def attend(x: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(torch.where(mask, _product(x), torch.tensor(LEAST, dtype=x.dtype)), -1) @ x

    check(attend, normal(2, 3, 5, 4), torch.ones(5, 5, dtype=torch.bool).tril(-1))


# --- what is left alone ----------------------------------------------------------------------------------------------


def _in_place_result(x: Tensor, mask: Tensor) -> Tensor:
    y = torch.softmax(_product(x), -1) @ x
    y.add_(1.0)
    return y


def _changed_query(x: Tensor, mask: Tensor) -> Tensor:
    q = x + 1
    shares = torch.softmax(_product(q), -1)
    q.mul_(2.0)
    return shares @ x


def _changed_mask(x: Tensor, mask: Tensor) -> Tensor:
    numbers = mask * 1.0
    scores = _product(x) + numbers
    numbers.zero_()
    return torch.softmax(scores, -1) @ x + numbers[..., :1]


REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "queries share the softmax": lambda x, mask: torch.softmax(_product(x), -2) @ x,
    "scores are read elsewhere": lambda x, mask: ((s := _product(x)).sum(), torch.softmax(s, -1) @ x),
    "shares are given": lambda x, mask: ((p := torch.softmax(_product(x), -1)), p @ x),
    "shares are masked": lambda x, mask: (torch.softmax(_product(x), -1) * mask) @ x,
    "scores are capped": lambda x, mask: torch.softmax(torch.tanh(_product(x)) * 5, -1) @ x,
    "scores are cut": lambda x, mask: torch.softmax(_product(x)[..., :4], -1) @ x[..., :4, :],
    "softmax in less precision": lambda x, mask: torch.softmax(_product(x), -1, dtype=torch.float32).double() @ x,
    "a number like any other for a score": lambda x, mask: torch.softmax(_product(x).masked_fill(mask > 0, -5.0), -1) @ x,
    "a low number that does not outweigh": lambda x, mask: torch.softmax(_product(x).masked_fill(mask > 0, -1e9), -1) @ x,
    "scaled after scores were replaced": lambda x, mask: torch.softmax(_product(x).masked_fill(mask > 0, LEAST) * 0.5, -1) @ x,
    "a factor for every score": lambda x, mask: torch.softmax(_product(x) * mask, -1) @ x,
    "a factor behind a mask": lambda x, mask: torch.softmax((_product(x) + mask) * mask[0, 0], -1) @ x,
    "values summed with shares twice": lambda x, mask: (p := torch.softmax(_product(x), -1)) @ p,
    "no second product": lambda x, mask: torch.softmax(_product(x), -1).sum(-1),
    "no first product": lambda x, mask: torch.softmax(mask, -1) @ x,
    "two dimensions summed": lambda x, mask: torch.softmax(torch.einsum("bhid,bhjd->hij", x, x), -1) @ x[0],
    "heads are exchanged in between": lambda x, mask: torch.softmax(_product(x).transpose(0, 1), -1) @ x.transpose(0, 1),
    "the result is written in place": _in_place_result,
    "the query is written in between": _changed_query,
    "the mask is written in between": _changed_mask,
    "no elements": lambda x, mask: torch.softmax(x[:, :, :0] @ x.transpose(-1, -2), -1) @ x,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_fused(name: str) -> None:
    program = canonical(Function(REFUSED[name]), normal(2, 3, 5, 4), normal(5, 5))
    assert [n.name for n in program.ops() if "softmax" in str(n.target)] == ["softmax"]
    assert fusable_attentions(program) == ()
    with pytest.raises(
        PlanFileError, match=r"fuses the attention around 'softmax', which is no softmax .* plan the model again"
    ):
        FuseAttention(("softmax",)).apply(program)


@pytest.mark.parametrize("value", [torch.finfo(torch.float16).min, -INF])
def test_half_precision_has_no_number_that_outweighs_but_minus_infinity(value: float) -> None:
    def attend(x: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(_product(x).masked_fill(mask, value), -1) @ x

    program = canonical(Function(attend), normal(2, 3, 5, 4, dtype=torch.float16), normal(5, 5) > 0)
    assert fusable_attentions(program) == (("softmax",) if value == -INF else ())


@pytest.mark.parametrize("name", ["matmul", "nothing", "arg_0"])
def test_a_name_that_is_no_such_softmax(name: str) -> None:
    program = canonical(Function(lambda x: torch.softmax(_product(x), -1) @ x), normal(2, 3, 5, 4))
    with pytest.raises(PlanFileError, match=f"around '{name}'"):
        FuseAttention((name,)).apply(program)


def test_sizes_that_are_symbols_are_left_alone() -> None:
    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(_product(x), -1) @ x

    program = capture(Attend().eval(), (normal(2, 3, 5, 4),), dynamic_shapes=(({2: torch.export.Dim.DYNAMIC},), {}))
    assert fusable_attentions(program) == ()


def test_nothing_to_fuse_is_the_same_program() -> None:
    program = canonical(Function(torch.exp), normal(2))
    assert FuseAttention(()).apply(program) is program


def test_a_fused_program_is_planned_proved_and_run() -> None:
    """In less memory than whole scores take, and in tiles in less than that."""

    def attend(x: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-1, -2) * 0.5 + mask, -1) @ x

    module, args = Function(attend).eval(), (normal(1, 4, 256, 8), normal(256, 256).masked_fill(normal(256, 1) > 1, -INF))
    whole = plan(module, "16MB", inputs=args, device="accounting", allow=("offload", "tile"))
    tilings = tilings_of(fused(canonical(module, *args)), whole._options)
    p = Plan(whole.target, whole._options, tilings, Decisions())
    assert p.peak_bytes < whole.peak_bytes / 2
    wanted = module(*args)
    for each in (p, p.replan((p.minimum_bytes + p.peak_bytes) // 2)):
        m = each.build()
        assert_same([m(*args)], [wanted])
        assert m.report().peak_bytes == each.peak_bytes
        each.restore()
