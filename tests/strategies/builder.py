"""Building a program forward: each line is run as it is added, so that the next is chosen from values that exist."""

import functools
import math
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.strategies.program import GLOBALS, Case, GeneratedModule, type_text

MAX_ELEMENTS = 4096  # of one value, so that one example runs in milliseconds
MAX_MAGNITUDE = 64.0  # a new value above this is followed by a tanh
VOCABULARY = 11


class Builder:
    """The program so far: its lines and the real value of every name."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        self.module = GeneratedModule().eval()
        self.initial: dict[str, Tensor] = {}  # buffers before the lines were run
        self.owned: list[Tensor] = []  # inputs, weights, constants, buffers: not to be written
        self.counts: dict[str, int] = {}
        self.values: dict[str, Tensor] = {}
        self._draw_inputs()
        self.scope: dict[str, Any] = {"self": self.module, "ids": None, "y": None, "scale": 1.0, "flip": False}
        self.scope |= self.values | self.options

    def _draw_inputs(self) -> None:
        draw = self.draw
        self.batch = draw(st.integers(1, 3))
        dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16]))
        kinds = st.sampled_from([self._tokens, self._image])
        self.values["x"] = self.own(draw(kinds)().to(dtype))
        if draw(st.booleans()):
            shape = (self.batch, draw(st.integers(2, 12)))
            self.values["ids"] = self.own(torch.randint(VOCABULARY, shape, generator=self.generator))
        if draw(st.booleans()):
            x, other = self.values["x"], draw(kinds)()
            forms = [other, other, x, x[:, 1:]]  # the last two share memory with the first argument
            self.values["y"] = self.own(draw(st.sampled_from(forms)))
        options = {"scale": draw(st.sampled_from([0.5, 2.0, -1.25])), "flip": draw(st.booleans())}
        self.options = {k: v for k, v in options.items() if draw(st.booleans())}

    def _tokens(self) -> Tensor:
        return self.random(self.batch, self.draw(st.integers(2, 12)), self.draw(st.sampled_from([4, 8, 16, 24])))

    def _image(self) -> Tensor:
        sizes = self.draw(st.integers(4, 9)), self.draw(st.integers(4, 9))
        return self.random(self.batch, self.draw(st.sampled_from([4, 8, 16])), *sizes)

    def random(self, *shape: int) -> Tensor:
        """Uniform in [-1, 1)."""
        return torch.rand(shape, generator=self.generator) * 2 - 1

    def own(self, t: Tensor) -> Tensor:
        """Remember a tensor that intermediates may alias but not write."""
        self.owned.append(t)
        return t

    def fresh(self, prefix: str) -> str:
        """The next unused name with this prefix."""
        number = self.counts.get(prefix, 0)
        self.counts[prefix] = number + 1
        return f"{prefix}{number}"

    # Choosing operands

    def having(self, where: "Predicate") -> list[str]:
        """Names whose value satisfies `where`, newest first."""
        return [name for name in reversed(self.values) if where(self, self.values[name])]

    def operand(self, where: "Predicate") -> str:
        """A name that satisfies `where`, more often a recent one; shrinks to the newest."""
        names = self.having(where)
        return self.draw(st.sampled_from(names[:3] + names[:3] + names))

    def partner(self, v: str, where: Callable[[Tensor], bool]) -> str:
        """Any name that satisfies `where`, however old, or `v` itself."""
        return self.draw(st.sampled_from([v, *self.having(lambda b, t: t.is_floating_point() and where(t))]))

    def storage(self, t: Tensor) -> int:
        """Identity of the memory under a tensor (of those alive)."""
        return t.untyped_storage()._cdata

    # Adding to the module

    def layer(self, kind: str, make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> str:
        """Add a layer with random weights and return how a line refers to it."""
        name = self.fresh(kind)
        layer = make().to(dtype).eval()
        for p in layer.parameters():
            bound = 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5
            p.copy_(self.random(*p.shape) * bound + (1.0 if p.ndim == 1 and kind.endswith("norm") else 0.0))
            self.own(p)
        self.module.layers[name] = layer.requires_grad_(False)
        return f"self.layers.{name}"

    def linear(self, inputs: int, outputs: int | None, dtype: torch.dtype) -> str:
        """A Linear that takes `inputs` features: an existing one (shared weights) or a new one."""
        fits = [
            f"self.layers.{name}"
            for name, m in self.module.layers.items()
            if isinstance(m, nn.Linear) and m.in_features == inputs and m.weight.dtype == dtype
            if outputs in (None, m.out_features)
        ]
        reuse = self.draw(st.booleans())
        if fits and reuse:
            return self.draw(st.sampled_from(fits))
        width = outputs or self.draw(st.sampled_from([4, 8, 16, 24]))
        bias = self.draw(st.booleans())
        return self.layer("linear", lambda: nn.Linear(inputs, width, bias=bias), dtype)

    def buffer(self, prefix: str, value: Tensor) -> str:
        """Add a buffer, persistent or not."""
        name = self.fresh(prefix)
        self.initial[name] = value.clone()
        self.module.register_buffer(name, self.own(value), persistent=self.draw(st.booleans()))
        return f"self.{name}"

    def constant(self, value: Tensor) -> str:
        """Add a plain tensor attribute."""
        name = self.fresh("const")
        setattr(self.module, name, self.own(value))
        return f"self.{name}"

    # Adding lines

    def do(self, line: str) -> None:
        """Append a line and run it."""
        self.module.lines.append(line)
        exec(_code(line), GLOBALS, self.scope)

    def let(self, expression: str, count: int = 1) -> list[str]:
        """Append `v0, ... = expression` and return the names; a value that grew large is brought back by a tanh."""
        names = [self.fresh("v") for _ in range(count)]
        self.do(f"{', '.join(names)} = {expression}")
        for name in names:
            value = self.scope[name]
            assert bool(value.isfinite().all()), f"{name} is not finite in\n{self.module!r}"
            self.values[name] = value
            if float(value.abs().max()) > MAX_MAGNITUDE:
                self.do(f"{name} = torch.tanh({name})")
                self.values[name] = self.scope[name]
        return names

    def case(self) -> Case:
        """The finished case, with buffers as they were before the lines ran."""
        for name, value in self.initial.items():
            self.module.get_buffer(name).copy_(value)
        named = {k: v for k, v in self.values.items() if k in ("ids", "y")}
        by_position = "ids" in named and self.draw(st.booleans())
        args = (self.values["x"], named.pop("ids")) if by_position else (self.values["x"],)
        kwargs = named | self.options
        shown = [type_text(a) for a in args]
        shown += [f"{k}={type_text(v) if isinstance(v, Tensor) else v}" for k, v in kwargs.items()]
        return Case(self.module, args, kwargs, f"{self.module!r}\n# called with ({', '.join(shown)})")


Predicate = Callable[[Builder, Tensor], bool]  # of a value, in the program so far


@functools.lru_cache(maxsize=4096)
def _code(line: str) -> CodeType:
    return compile(line, "<generated>", "exec")
