"""Which weights may be cast by their place in the program, and how much of their noise shows in the result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.castable import castable
from passes.noise import noise_gains, relative_error
from passes.program import Program
from tests.passes.programs import canonical


def names(program: Program) -> dict[str, int]:
    return {program.weights[key].name: dim for key, dim in castable(program).items()}


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def test_the_first_and_the_last_projection_stay() -> None:
    program = canonical(Layers(*(nn.Linear(128, 128) for _ in range(4))), torch.randn(2, 128))
    assert names(program) == {"layers.1.weight": 0, "layers.2.weight": 0}


def test_small_weights_norms_and_biases_stay() -> None:
    layers = [nn.Linear(128, 128), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 128)]
    program = canonical(Layers(*layers, nn.Linear(128, 128)), torch.randn(2, 128))
    assert names(program) == {"layers.3.weight": 0, "layers.4.weight": 0}


def test_a_table_counts_as_first_and_stays() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(512, 128)
            self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, ids: Tensor) -> Tensor:
            return self.b(self.a(self.table(ids)))

    assert names(canonical(Tokens(), torch.randint(512, (2, 4)))) == {"a.weight": 0}


def test_a_tied_table_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(512, 128)
            self.a, self.b = nn.Linear(128, 128), nn.Linear(512, 128)

        def forward(self, ids: Tensor) -> Tensor:
            return self.b(nn.functional.linear(self.a(self.table(ids)), self.table.weight))

    assert names(canonical(Tied(), torch.randint(512, (2, 4)))) == {"a.weight": 0}


@pytest.mark.parametrize(
    ("layer", "dim"),
    [(nn.Conv2d(16, 128, 3), 0), (nn.ConvTranspose2d(16, 128, 3), 1)],
    ids=["convolution", "transposed convolution"],
)
def test_scales_are_by_output_channel(layer: nn.Module, dim: int) -> None:
    ends = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(128, 3, 1)
    assert names(canonical(Layers(ends[0], layer, ends[1]), torch.randn(1, 3, 8, 8))) == {"layers.1.weight": dim}


@pytest.mark.parametrize(
    ("read", "dim"), [(lambda x, w: x @ w, 1), (lambda x, w: x @ w.t(), 0), (lambda x, w: x @ w.transpose(-1, -2), 0)]
)
def test_scales_follow_transposes(read: object, dim: int) -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 128)
            self.w = nn.Parameter(torch.randn(128, 128))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(read(self.a(x), self.w))  # type: ignore[operator]

    assert names(canonical(Products(), torch.randn(2, 128))) == {"w": dim}


def test_what_something_else_reads_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(128, 128) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x))) + self.b.weight.sum()

    assert names(canonical(Shared(), torch.randn(2, 128))) == {}


class TestNoise:
    def test_a_chain_adds_up(self) -> None:
        program = canonical(Layers(*(nn.Linear(16, 16) for _ in range(4))), torch.randn(2, 16))
        gains = {program.weights[key].name: gain for key, gain in noise_gains(program).items()}
        assert [gains[f"layers.{i}.weight"] for i in range(4)] == [1.0] * 4
        assert relative_error({"a": 1.0, "b": 1.0}, {"a": 0.03, "b": 0.04}) == pytest.approx(0.05)

    def test_branches_of_a_residual_network_count_by_their_share(self) -> None:
        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    x = x + layer(torch.nn.functional.layer_norm(x, [16]))
                return x

        program = canonical(Residual(), torch.randn(2, 16))
        gains = [gain for key, gain in noise_gains(program).items() if program.weights[key].name.endswith("weight")]
        assert all(1 / 9 - 1e-9 <= gain <= 0.5 for gain in gains)

    def test_the_estimate_is_of_the_size_of_what_is_measured(self) -> None:
        torch.manual_seed(0)
        module = Layers(*(nn.Linear(64, 64, bias=False) for _ in range(6))).eval()
        x = torch.randn(256, 64)
        program = canonical(module, x)
        with torch.no_grad():
            wanted = module(x)
            for layer in module.layers:
                layer.weight.add_(layer.weight * torch.randn_like(layer.weight) * 0.02)  # type: ignore[operator,arg-type]
            found = module(x)
        estimate = relative_error(noise_gains(program), {key: 0.02 for key, w in program.weights.items() if "weight" in w.name})
        assert 0.3 <= float((found - wanted).norm() / wanted.norm()) / estimate <= 3
