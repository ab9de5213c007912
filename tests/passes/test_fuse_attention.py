"""`FuseAttention`: what is attention and what is not, that the operator is the same function, and what models give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2Model,
    GPTNeoConfig,
    GPTNeoModel,
    LlamaConfig,
    LlamaModel,
    Swinv2Config,
    Swinv2Model,
    T5Config,
    T5EncoderModel,
    XLNetConfig,
    XLNetModel,
)

from passes.base import run_passes
from passes.fuse_attention import FuseAttention, fusable_attentions
from passes.program import Program
from planner import Plan, plan
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


# --- what is left alone ----------------------------------------------------------------------------------------------


def _product(x: Tensor) -> Tensor:
    return x @ x.transpose(-1, -2)


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


def test_nothing_to_fuse_is_the_same_program() -> None:
    program = canonical(Function(torch.exp), normal(2))
    assert FuseAttention(()).apply(program) is program


# --- models ----------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
LEFT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
EAGER = {"attn_implementation": "eager"}
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def _llama() -> nn.Module:
    return LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48, use_cache=False, **EAGER))


def _t5() -> nn.Module:
    return T5EncoderModel(T5Config(d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=48, vocab_size=99, **EAGER))


def _bert() -> nn.Module:
    return BertModel(BertConfig(**SMALL, intermediate_size=48, **EAGER))


def _deberta() -> nn.Module:
    return DebertaV2Model(DebertaV2Config(**SMALL, intermediate_size=48))


def _diffusers(text: int) -> nn.Module:
    """As pipelines had it before PyTorch had the operator: baddbmm into an empty tensor."""
    return Attention(query_dim=32, cross_attention_dim=text, heads=4, dim_head=8, processor=AttnProcessor())


GPT: dict[str, Any] = {"n_layer": 2, "n_head": 4, "vocab_size": 99, "use_cache": False}
SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4]}
KINDS = [[["global", "local"], 1]]
NEO: dict[str, Any] = {"attention_types": KINDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
XL: dict[str, Any] = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 99, "use_mems_eval": False}
IMAGE = normal(2, 7, 32, dtype=torch.float32)
TEXT = normal(2, 5, 16, dtype=torch.float32)
HIDDEN = normal(2, 1, 5, dtype=torch.float32)

Model = tuple[Callable[[], nn.Module], dict[str, Tensor], int]
MODELS: dict[str, Model] = {
    "bert": (_bert, {"input_ids": IDS, "attention_mask": PADDED}, 2),
    "t5": (_t5, {"input_ids": IDS, "attention_mask": PADDED}, 2),
    "llama": (_llama, {"input_ids": IDS, "attention_mask": LEFT}, 2),
    "llama in bfloat16": (lambda: _llama().bfloat16(), {"input_ids": IDS, "attention_mask": LEFT}, 2),
    "gpt2": (lambda: GPT2Model(GPT2Config(n_embd=32, **GPT, **EAGER)), {"input_ids": IDS, "attention_mask": LEFT}, 2),
    "gpt neo": (lambda: GPTNeoModel(GPTNeoConfig(**NEO, use_cache=False)), {"input_ids": IDS}, 2),
    "bloom": (lambda: BloomModel(BloomConfig(hidden_size=32, **GPT)), {"input_ids": IDS, "attention_mask": LEFT}, 2),
    "deberta": (_deberta, {"input_ids": IDS, "attention_mask": PADDED}, 2),
    "xlnet": (lambda: XLNetModel(XLNetConfig(**XL)), {"input_ids": IDS}, 2),
    "swin 2": (lambda: Swinv2Model(Swinv2Config(**SWIN, window_size=4)), {"pixel_values": normal(1, 3, 32, 32).float()}, 3),
    "diffusers": (lambda: _diffusers(32), {"hidden_states": IMAGE}, 1),
    "diffusers with a mask": (
        lambda: _diffusers(16),
        {"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "attention_mask": HIDDEN},
        1,
    ),
}


def in_double(program: Program, module: nn.Module, inputs: list[Any]) -> list[Tensor]:
    """What a program gives where nothing is rounded to less than fp64: weights, inputs and casts are read as that."""
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    given, env = iter(inputs), dict[fx.Node, Any]()

    def wide(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64 if value.is_floating_point else value
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    for node in program.graph.nodes:
        if node.op == "placeholder":
            weight = program.weights.get(node.name)
            constant = program.constants.get(node.name)
            env[node] = wide(next(given) if weight is None else named[weight.name] if constant is None else constant)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})
    return [env[node] for node in program.output.all_input_nodes]


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    """All their attentions are fused, and without rounding the result is the same."""
    make, kwargs, count = MODELS[name]
    torch.manual_seed(0)
    module = make().eval()
    before = canonical(module, **kwargs)
    names = fusable_attentions(before)
    assert len(names) == count == sum("softmax" in str(node.target) for node in before.ops())
    after = fused(before)
    assert sum(node.target is SDPA for node in after.ops()) == count
    assert [n.name for n in before.output.all_input_nodes] == [n.name for n in after.output.all_input_nodes]
    inputs = list(kwargs.values())
    with torch.no_grad():
        assert_same(in_double(after, module, inputs), in_double(before, module, inputs))


def test_a_fused_program_is_planned_proved_and_run() -> None:
    """In less memory than whole scores take."""

    def attend(x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-1, -2) * 0.5, -1) @ x

    module, x = Function(attend).eval(), normal(1, 2, 256, 8)
    whole = plan(module, "8MB", inputs=(x,), device="accounting")
    tilings = tilings_of(fused(whole.problem.program), whole._options)
    p = Plan(whole.target, whole._options, tilings, Decisions())
    assert p.peak_bytes < whole.peak_bytes / 3
    wanted = module(x)
    m = p.build()
    assert_same([m(x)], [wanted])
    assert m.report().peak_bytes == p.peak_bytes
