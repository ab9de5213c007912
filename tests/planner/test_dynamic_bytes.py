"""The law of dynamic plans: an expression, evaluated, is the bytes of a plan for those sizes alone, and what is measured."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch.utils._pytree import tree_map

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.dims import Evaluator
from passes.liveness import Liveness, analyse_liveness, is_view
from passes.probe import Prober
from passes.program import Program
from passes.write_in_place import WriteInPlace, in_place_overload
from planner import Plan, plan
from planner.capture import capture
from tests.properties.test_plans import same
from tests.zoo import ZOO

IMAGE = {0: "batch", 2: "height", 3: "width"}
EXAMPLES: dict[str, dict[Any, tuple[int, ...]]] = {
    "vae_decoder": {0: (4, 4, 12, 16)},
    "unet": {0: (4, 4, 16, 24), 2: (4, 8, 32)},
    "flux": {
        "hidden_states": (3, 20, 16), "encoder_hidden_states": (3, 6, 32), "pooled_projections": (3, 32), "timestep": (3,),
        "guidance": (3,), "img_ids": (20, 3),
    },
    "bert": {}, "t5_encoder": {}, "llama": {},
}  # fmt: skip
TOKENS = {0: "batch", 1: "tokens"}
DYNAMIC: dict[str, dict[Any, Any]] = {
    "vae_decoder": {0: IMAGE},
    "unet": {"sample": IMAGE, "encoder_hidden_states": {0: "batch", 1: "text"}},
    "flux": {
        "hidden_states": TOKENS, "encoder_hidden_states": {0: "batch", 1: "text"}, "pooled_projections": {0: "batch"},
        "timestep": {0: "batch"}, "guidance": {0: "batch"}, "img_ids": {0: "tokens"}, "txt_ids": {0: "text"},
    },
    "bert": {"input_ids": TOKENS, "attention_mask": TOKENS}, "t5_encoder": {"input_ids": TOKENS},
    "llama": {"input_ids": TOKENS},
}  # fmt: skip


@functools.cache
def dynamic_plan(name: str, device: str = "accounting") -> tuple[nn.Module, Plan]:
    """A model of the zoo at the largest sizes of `EXAMPLES`, at half of what it takes unplanned."""
    module, args, kwargs = ZOO[name]()
    resized = EXAMPLES[name]
    args = tuple(torch.randn(resized[i]) if i in resized else a for i, a in enumerate(args))
    kwargs = {k: torch.randn(resized[k]) if k in resized else v for k, v in kwargs.items()}
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, dynamic=DYNAMIC[name], device=device, machine="rtx-4090")
    return module, p.replan((p.minimum_bytes + p.unplanned_bytes) // 2)


def some_sizes(p: Plan, count: int, factor: int) -> Iterator[dict[str, int]]:
    """Random sizes that the program serves, up to `factor` times the largest ones."""
    assert p.problem.in_symbols is not None
    dims, rng = p.problem.in_symbols.dims, random.Random(7)
    while count:
        sizes = {name: rng.randint(low, factor * high) for name, (low, high) in dims.ranges.items()}
        if dims.holds(sizes):
            count -= 1
            yield sizes


def call_at(p: Plan, sizes: dict[str, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    options = p._options
    assert options.dynamic is not None
    bound = options.dynamic.bound(p._target, options.method, options.args, options.kwargs)
    return options.dynamic.at(*bound, sizes)


def real(call: Any) -> Any:
    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_meta:
            return leaf
        return torch.randn(leaf.shape) if leaf.dtype.is_floating_point else torch.ones(leaf.shape, dtype=leaf.dtype)

    return tree_map(fill, call)


def per_operator(liveness: Liveness) -> list[int]:
    """Bytes at every operator that is no view: of these an export for one size may record more or less."""
    return [
        n for node, n, cost in zip(liveness.nodes, liveness.bytes_at, liveness.costs, strict=True) if not is_view(node, cost)
    ]


def in_place_as(p: Plan, static: Liveness, program: Program) -> Liveness:
    """A static program where the operators write in place that do so in the dynamic one, which finds fewer."""
    live = p.problem.liveness
    launched = [node for node, cost in zip(live.nodes, live.costs, strict=True) if not is_view(node, cost)]
    same = [node for node, cost in zip(static.nodes, static.costs, strict=True) if not is_view(node, cost)]
    names = [own.name for node, own in zip(launched, same, strict=True) if node.target is in_place_overload(own.target)]
    return analyse_liveness(run_passes(program, (WriteInPlace(tuple(names)),)), Prober("accounting"))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vae_decoder", 2), ("bert", 3), ("llama", 2), ("t5_encoder", 2),
        *(pytest.param(name, 10, marks=pytest.mark.slow) for name in ("flux", "unet", "vae_decoder")),
    ],
)  # fmt: skip
def test_expressions_are_the_bytes_of_a_static_capture(name: str, count: int) -> None:
    module, p = dynamic_plan(name)
    in_symbols = p.problem.in_symbols
    assert in_symbols is not None
    assert in_symbols.profile is not None
    assert in_symbols.doubtful == ([], "bytes grow with every size")
    evaluators = {expr: Evaluator(expr) for expr in dict.fromkeys(in_symbols.profile)}
    costs = p.problem.liveness.costs
    for sizes in some_sizes(p, count, 2):
        args, kwargs = call_at(p, sizes)
        program = run_passes(capture(module, args, kwargs), CANONICALISE)
        static = in_place_as(p, analyse_liveness(program, Prober("accounting")), program)
        found = {expr: evaluate(sizes) for expr, evaluate in evaluators.items()}
        mine = [
            found[e]
            for e, node, c in zip(in_symbols.profile, p.problem.liveness.nodes, costs, strict=True)
            if not is_view(node, c)
        ]
        assert mine == per_operator(static)
        assert p.peak_bytes_at(**sizes) == p.peak_bytes_expr.subs({p.symbols[d]: n for d, n in sizes.items()})


@pytest.mark.parametrize("name", ["vae_decoder", "unet", "flux", "bert", "llama"])
def test_runs_as_eager_and_as_predicted_with_one_program(name: str) -> None:
    module, p = dynamic_plan(name)
    symbols = p.symbols
    m = p.build()
    for sizes in some_sizes(p, 5, 1):
        args, kwargs = real(call_at(p, sizes))
        with torch.no_grad():
            expected = module(*args, **kwargs)
        assert same(m(*args, **kwargs), expected)
        predicted = p.peak_bytes_expr.subs({symbols[d]: n for d, n in sizes.items()})
        assert m.report().peak_bytes == predicted <= p.peak_bytes <= p.budget_bytes
    assert len(m._runner.programs) == 1
    p.restore()


def test_on_a_gpu_the_program_is_replayed_at_the_sizes() -> None:
    module, p = dynamic_plan("vae_decoder", "cuda")
    for sizes in some_sizes(p, 3, 1):
        args, kwargs = call_at(p, sizes)
        static = plan(module, "1GB", inputs=args, kwargs=kwargs, device="cuda", machine="rtx-4090")
        mine = p.replan("1GB")
        assert mine.decisions == static.decisions  # all resident
        assert mine.peak_bytes_at(**sizes) == static.peak_bytes
        assert mine.peak_bytes_expr.subs({p.symbols[d]: n for d, n in sizes.items()}) == static.peak_bytes


def test_where_kernels_choose_by_size_the_expression_says_so() -> None:
    """A convolution of fewer than 16 images may take another kernel: nothing shows the bytes of the other side."""
    module = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3, stride=2)).eval()
    for most, parts in ((8, 1), (32, 2)):
        dims = {0: {0: torch.export.Dim("batch", max=most), 2: "height", 3: "width"}}
        p = plan(module, "1GB", inputs=(torch.randn(4, 4, 16, 12),), dynamic=dims, device="accounting")
        assert p.problem.in_symbols is not None
        chosen = p.problem.in_symbols.assumed != ()
        assert isinstance(p.peak_bytes_expr, sympy.Piecewise) == (chosen and parts == 2)
        for sizes in some_sizes(p, 6, 1):
            assert p.peak_bytes_at(**sizes) == p.peak_bytes_expr.subs({p.symbols[d]: n for d, n in sizes.items()})
