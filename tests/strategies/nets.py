"""Random small networks of the kind that is tiled: convolutions, norms, resampling, skips, attention; double precision.

A net is a list of steps, each of which makes a value from values that exist, so every net that is drawn is valid. It prints
as its steps, and its weights are drawn from its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d}


@dataclass(frozen=True)
class Step:
    """`kind` of values number `of` (0 is the input) with `options`; `layer` is the number of its weights, where it has some."""

    kind: str
    of: tuple[int, ...]
    options: tuple[Any, ...] = ()
    layer: int | None = None


@dataclass(frozen=True)
class Case:
    """A net by its steps and what it gives, an input's shape, and a seed for all numbers."""

    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    layers: tuple[tuple[Any, ...], ...]
    seed: int

    def module(self) -> Net:
        torch.manual_seed(self.seed)
        return Net(self).double().eval()

    def input(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))


class Net(nn.Module):
    """Runs the steps of a case."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.steps, self.outputs = case.steps, case.outputs
        self.layers = nn.ModuleList(map(_layer, case.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step in self.steps:
            layer = None if step.layer is None else self.layers[step.layer]
            values.append(_compute(step, [values[i] for i in step.of], layer))
        return tuple(values[i] for i in self.outputs)


def _layer(recipe: tuple[Any, ...]) -> nn.Module:
    kind, *rest = recipe
    if kind == "conv":
        rank, before, after, kernel, stride, padding, dilation, groups = rest
        return _CONVOLUTIONS[rank](before, after, kernel, stride, padding, dilation, groups)
    module: nn.Module = {"norm": nn.GroupNorm, "linear": nn.Linear, "layer_norm": nn.LayerNorm}[kind](*rest)
    if kind in ("norm", "layer_norm"):
        nn.init.normal_(module.weight)  # type: ignore[arg-type]
        nn.init.normal_(module.bias)  # type: ignore[arg-type]
    return module


def _compute(step: Step, values: list[Tensor], layer: nn.Module | None) -> Tensor:
    x, kind = values[0], step.kind
    if layer is not None:
        return layer(x)
    if kind == "add":
        return values[0] + values[1]
    if kind == "cat":
        return torch.cat(values, step.options[0])
    if kind in ("silu", "relu"):
        return getattr(functional, kind)(x, inplace=step.options[0])
    if kind == "resize":
        mode, factor = step.options
        return functional.interpolate(x, scale_factor=factor, mode=mode)
    if kind == "pool":
        pool = functional.avg_pool2d if x.dim() == 4 else functional.avg_pool1d
        return pool(x, *step.options)
    if kind == "tokens":
        return x.flatten(2).transpose(1, 2)
    if kind == "image":
        return x.transpose(1, 2).unflatten(2, step.options[0])
    assert kind == "attention"
    q, k, v = (t.unflatten(-1, (step.options[0], -1)).transpose(1, 2) for t in values)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Builder:
    """Draws steps; every value is there on the meta device, whose shape says what can follow."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        rank = draw(st.sampled_from([4, 4, 4, 3]))
        sizes = [draw(st.integers(3, 12)) for _ in range(rank - 2)]
        self.shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4])), *sizes)
        self.values = [torch.empty(self.shape, device="meta")]
        self.written_by_caller = {0}  # the input and views of it
        self.steps: list[Step] = []
        self.layers: list[tuple[Any, ...]] = []

    def add(self, kind: str, of: tuple[int, ...], *options: Any, recipe: tuple[Any, ...] | None = None) -> int:
        number = None
        if recipe is not None:
            known = [i for i, other in enumerate(self.layers) if other == recipe]
            if known and self.draw(st.booleans()):
                number = known[0]
            else:
                number = len(self.layers)
                self.layers.append(recipe)
        step = Step(kind, of, options, number)
        layer = None if number is None else _layer(self.layers[number]).to("meta")
        before = {self.values[i].untyped_storage()._cdata: i for i in of}
        value = _compute(step, [self.values[i] for i in of], layer)
        if before.get(value.untyped_storage()._cdata) in self.written_by_caller:
            self.written_by_caller.add(len(self.values))
        self.values.append(value)
        self.steps.append(step)
        return len(self.values) - 1

    def step(self) -> None:
        """One more value, mostly of the last one."""
        draw = self.draw
        at = len(self.values) - 1 if draw(st.integers(0, 3)) else draw(st.integers(0, len(self.values) - 1))
        x = self.values[at]
        kinds = ["conv", "norm", "silu", "relu", "skip", "cat", "pool", "resize"]
        kinds += ["tokens"] if x.dim() == 4 else ["linear", "layer_norm", "attention", "image"]
        getattr(self, draw(st.sampled_from(kinds)))(at, x)

    def conv(self, at: int, x: Tensor) -> None:
        kernel, stride, padding = self.draw(st.integers(1, 3)), self.draw(st.sampled_from([1, 1, 1, 2])), 0
        dilation = self.draw(st.sampled_from([1, 1, 2]))
        span = dilation * (kernel - 1) + 1
        padding = self.draw(st.integers(0, span - 1)) if min(x.shape[2:]) >= span else span - 1
        channels, after = x.shape[1], self.draw(st.sampled_from([2, 4]))
        groups = self.draw(st.sampled_from([1, 1, 2])) if channels % 2 == 0 else 1
        self.add("conv", (at,), recipe=("conv", x.dim(), channels, after, kernel, stride, padding, dilation, groups))

    def norm(self, at: int, x: Tensor) -> None:
        groups = self.draw(st.sampled_from([g for g in (1, 2, 4) if x.shape[1] % g == 0]))
        if x[0].numel() > x.shape[1]:  # else a group may be one element
            self.add("norm", (at,), recipe=("norm", groups, x.shape[1]))

    def silu(self, at: int, x: Tensor) -> None:
        self.add("silu", (at,), at not in self.written_by_caller and self.draw(st.booleans()))

    def relu(self, at: int, x: Tensor) -> None:
        self.add("relu", (at,), at not in self.written_by_caller and self.draw(st.booleans()))

    def skip(self, at: int, x: Tensor) -> None:
        alike = [i for i, value in enumerate(self.values) if value.shape == x.shape]
        self.add("add", (at, self.draw(st.sampled_from(alike))))

    def cat(self, at: int, x: Tensor) -> None:
        alike = [i for i, v in enumerate(self.values) if v.shape[:1] + v.shape[2:] == x.shape[:1] + x.shape[2:]]
        self.add("cat", (at, self.draw(st.sampled_from(alike))), 1)

    def pool(self, at: int, x: Tensor) -> None:
        if min(x.shape[2:]) >= 2 and x.dim() in (3, 4):
            kernel = self.draw(st.integers(1, min(3, *x.shape[2:])))
            self.add("pool", (at,), kernel, self.draw(st.integers(1, 2)), self.draw(st.integers(0, kernel // 2)))

    def resize(self, at: int, x: Tensor) -> None:
        if x[0].numel() <= 500:
            modes = ["nearest", "bilinear"] if x.dim() == 4 else ["nearest", "linear"]
            self.add("resize", (at,), self.draw(st.sampled_from(modes)), 2.0)

    def tokens(self, at: int, x: Tensor) -> None:
        self.add("tokens", (at,))

    def image(self, at: int, x: Tensor) -> None:
        height = next(n for n in (4, 3, 2, 1) if x.shape[1] % n == 0)
        self.add("image", (at,), (height, x.shape[1] // height))

    def linear(self, at: int, x: Tensor) -> None:
        self.add("linear", (at,), recipe=("linear", x.shape[-1], self.draw(st.sampled_from([2, 4]))))

    def layer_norm(self, at: int, x: Tensor) -> None:
        self.add("layer_norm", (at,), recipe=("layer_norm", x.shape[-1]))

    def attention(self, at: int, x: Tensor) -> None:
        heads = 2 if x.shape[-1] % 2 == 0 else 1
        recipe = ("linear", x.shape[-1], 2 * heads)
        self.add("attention", tuple(self.add("linear", (at,), recipe=recipe) for _ in "qkv"), heads)


@st.composite
def nets(draw: st.DrawFn, most: int = 10) -> Case:
    """Draw a net of two to `most` steps; it gives its last value, and maybe another one."""
    with torch.no_grad():
        builder = _Builder(draw)
        for _ in range(draw(st.integers(2, most))):
            builder.step()
        if not builder.steps:
            builder.conv(0, builder.values[0])
    last = len(builder.values) - 1
    outputs = draw(st.sampled_from([(last,), (last,), (last, max(1, last // 2))]))
    return Case(builder.shape, tuple(builder.steps), outputs, tuple(builder.layers), draw(st.integers(0, 99)))
