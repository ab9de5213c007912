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
