"""Bytes in symbols, evaluated, are the bytes of the concrete analysis."""

import pytest
import sympy
import torch
from torch import nn
from torch.export import Dim

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.liveness import analyse_liveness
from passes.probe import Prober
from passes.symbolic import SymbolicProber
from planner.capture import capture
from runtime.errors import UnknownSize

AUTO = torch.export.Dim.AUTO


class Encoder(nn.Module):
    """Norms, attention, views, a residual: batch and length are symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).flatten(2))


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Upsample(scale_factor=2.0), nn.Conv2d(8, 3, 1)
    ).eval()


@pytest.mark.parametrize(
    ("module", "example", "dims", "sizes"),
    [
        (decoder(), (2, 4, 8, 12), (0, 2, 3), [(2, 4, 8, 12), (3, 4, 6, 10), (5, 4, 16, 4), (2, 4, 31, 7)]),
        (Encoder().eval(), (2, 6, 16), (0, 1), [(2, 6, 16), (3, 9, 16), (7, 2, 16), (4, 33, 16)]),
    ],
    ids=["decoder", "encoder"],
)
def test_expressions_evaluate_to_the_concrete_bytes(
    module: nn.Module, example: tuple[int, ...], dims: tuple[int, ...], sizes: list[tuple[int, ...]]
) -> None:
    shapes = ((dict.fromkeys(dims, AUTO),), {})
    symbolic = run_passes(capture(module, (torch.empty(example),), dynamic_shapes=shapes), CANONICALISE)
    profile = analyse_liveness(symbolic, SymbolicProber()).bytes_at
    assert all(isinstance(entry, sympy.Expr) for entry in profile)
    placeholder = symbolic.node(symbolic.inputs[0]).meta["val"]
    symbols = {dim: placeholder.shape[dim].node.expr for dim in dims}
    for size in sizes:
        concrete = run_passes(capture(module, (torch.empty(size),)), CANONICALISE)
        expected = analyse_liveness(concrete, Prober("accounting"))
        values = {symbols[dim]: size[dim] for dim in dims}
        assert [int(entry.subs(values)) for entry in profile] == list(expected.bytes_at)


def test_a_size_that_depends_on_data_is_never_guessed() -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.mul(x, 2)

    program = capture(Double().eval(), (torch.ones(4),), dynamic_shapes=(({0: Dim.DYNAMIC},), {}))
    with pytest.raises(UnknownSize, match=r"the size s\d+ depends on data"):
        analyse_liveness(program, Prober("accounting"))
