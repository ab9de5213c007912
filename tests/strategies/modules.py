"""Random small `nn.Module`s for property tests: valid by construction, captured by `torch.export`, printable as Python.

A program is a straight list of Python lines, built forward: each line is run on real tensors as it is drawn, so that
the next line is chosen among operators whose preconditions (shape, stride, dtype, aliasing) are met by values that
exist. Nothing is filtered afterwards. The lines are the forward function: what a failure prints is what ran.

    def forward(self, x, ids=None, *, y=None, scale=1.0, flip=False):
        v0 = self.layers.linear0(x)
        v1 = v0[:, 1:3]
        v1.mul_(torch.sigmoid(v1))
        return {"a": v0, "b": (v1, None)}

Inputs, weights and constants are never written; intermediates and buffers are, also through views.

Left out, because `torch.export` (torch 2.13, `strict=False`) itself fails or differs from eager:

- writing a plain tensor attribute (`self.const.add_(1)`): captured without an error, the exported results differ;
- writing through `.data`: refused, "found a fake tensor in the exported program constant's list";
- `int(t)` or `t.item()` where a shape depends on it: refused, a data-dependent guard.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["INSTRUCTIONS", "Case", "GeneratedModule", "cases"]

MAX_ELEMENTS = 4096  # of one value, so that one example runs in milliseconds
MAX_MAGNITUDE = 64.0  # a new value above this is followed by a tanh
VOCABULARY = 11
SIGNATURE = "self, x, ids=None, *, y=None, scale=1.0, flip=False"
SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.int64: "i64", torch.bool: "b8"}


class GeneratedModule(nn.Module):
    """A module whose forward is the text in `lines`; `repr` prints its layers, its own tensors and that text."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.lines: list[str] = []

    @property
    def source(self) -> str:
        """The program as a Python function."""
        return "\n    ".join([f"def forward({SIGNATURE}):", *self.lines])

    def forward(
        self, x: Tensor, ids: Tensor | None = None, *, y: Tensor | None = None, scale: float = 1.0, flip: bool = False
    ) -> Any:
        """Run the lines."""
        return _function(self.source)(self, x, ids, y=y, scale=scale, flip=flip)

    def __repr__(self) -> str:
        heads = [f"# self.layers.{name} = {layer!r}" for name, layer in self.layers.items()]
        heads += [f"# self.{name} = parameter {_type(p)}" for name, p in self._parameters.items() if p is not None]
        for name, b in self._buffers.items():
            kind = "non-persistent buffer" if name in self._non_persistent_buffers_set else "buffer"
            heads.append(f"# self.{name} = {kind} {_type(b)}")
        heads += [f"# self.{name} = constant {_type(t)}" for name, t in vars(self).items() if isinstance(t, Tensor)]
        return "\n".join([*heads, self.source])


@dataclass(frozen=True, repr=False)
class Case:
    """A module in eval mode with one call's arguments. `description` is the program and the types of its inputs."""

    module: GeneratedModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    description: str

    def fresh(self) -> GeneratedModule:
        """A deep copy of the module: calls may write its buffers."""
        return copy.deepcopy(self.module)

    def __repr__(self) -> str:
        return f"Case of\n{self.description}\n"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis prints a failing example."""
        printer.text(repr(self))


@st.composite
def cases(
    draw: st.DrawFn, *, min_instructions: int = 3, max_instructions: int = 25, exclude: frozenset[str] = frozenset()
) -> Case:
    """Draw a `Case`; `exclude` names instruction kinds (see `INSTRUCTIONS`) that must not appear."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        b = _Builder(draw)
        for _ in range(draw(st.integers(min_instructions, max_instructions))):
            ready = [i for i in INSTRUCTIONS if i.name not in exclude and b.having(i.where)]
            chosen = draw(st.sampled_from([None, *ready]))  # None: failures shrink to fewer lines
            if chosen:
                chosen.build(b, b.operand(chosen.where))
        _return(b)
        return b.case()


# Building a program forward -------------------------------------------------------------------------------------------


class _Builder:
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
        return self.draw(st.sampled_from([v, *self.having(lambda b, t: is_float(b, t) and where(t))]))

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
        exec(_code(line), _GLOBALS, self.scope)

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
        shown = [_type(a) for a in args]
        shown += [f"{k}={_type(v) if isinstance(v, Tensor) else v}" for k, v in kwargs.items()]
        return Case(self.module, args, kwargs, f"{self.module!r}\n# called with ({', '.join(shown)})")


def _return(b: _Builder) -> None:
    """The last line: the newest value, with others, in one of several structures."""
    last = next(reversed(b.values))
    others = b.draw(st.lists(st.sampled_from(list(reversed(b.values))), max_size=3))
    view = f"{last}.transpose(0, -1)" if b.values[last].ndim else f"{last}.view(1)"
    forms = [
        last,
        f"({', '.join([last, *others])},)",
        f"[{', '.join([last, *others])}]",
        f"({last}, {last})",
        f"({last}, {view})",
        f"({last}, x)",
        f"({last}, 3, None, 2.5)",
        "{" + ", ".join(f'"{k}": {v}' for k, v in zip("abcd", [last, *others], strict=False)) + "}",
        f'{{"a": ({last}, None), "b": [{", ".join(others)}], "c": None}}',
    ]
    b.module.lines.append(f"return {b.draw(st.sampled_from(forms))}")


# Preconditions --------------------------------------------------------------------------------------------------------

Predicate = Callable[[_Builder, Tensor], bool]


def is_float(b: _Builder, t: Tensor) -> bool:
    return t.is_floating_point()


def is_matrix(b: _Builder, t: Tensor) -> bool:
    return t.is_floating_point() and t.ndim >= 2


def is_tokens(b: _Builder, t: Tensor) -> bool:
    return t.is_floating_point() and t.ndim == 3


def is_image(b: _Builder, t: Tensor) -> bool:
    return t.is_floating_point() and t.ndim == 4


def is_poolable(b: _Builder, t: Tensor) -> bool:
    return is_image(b, t) and min(t.shape[2:]) >= 2


def is_growable(b: _Builder, t: Tensor) -> bool:
    return is_image(b, t) and 4 * t.numel() <= MAX_ELEMENTS


def is_joinable(b: _Builder, t: Tensor) -> bool:
    return is_matrix(b, t) and 2 * t.numel() <= MAX_ELEMENTS


def is_square(b: _Builder, t: Tensor) -> bool:
    """Tokens that can be folded into an image two rows high."""
    return is_tokens(b, t) and t.shape[1] % 2 == 0


def is_indices(b: _Builder, t: Tensor) -> bool:
    return t.dtype == torch.int64 and t.ndim == 2


def is_widest(b: _Builder, t: Tensor) -> bool:
    """Wide enough to be cut along its last dimension."""
    return is_matrix(b, t) and t.shape[-1] >= 2


def is_contiguous(b: _Builder, t: Tensor) -> bool:
    return is_matrix(b, t) and t.is_contiguous()


def is_writable(b: _Builder, t: Tensor) -> bool:
    """An intermediate: not memory of an input, weight, constant or buffer, and no element twice in it."""
    if not is_matrix(b, t):
        return False
    reach = 0  # the last offset covered by the dimensions of smaller stride
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return b.storage(t) not in {b.storage(o) for o in b.owned}


def has_weight(b: _Builder, t: Tensor) -> bool:
    return is_matrix(b, t) and bool(_weights(b))


def has_head(b: _Builder, t: Tensor) -> bool:
    return is_matrix(b, t) and bool(_embeddings(b, t.shape[-1]))


def _weights(b: _Builder) -> list[str]:
    """How lines refer to the matrices that exist."""
    kinds = (nn.Linear, nn.Embedding)
    return [f"self.layers.{name}.weight" for name, m in b.module.layers.items() if isinstance(m, kinds)]


def _embeddings(b: _Builder, width: int) -> list[str]:
    """How lines refer to the embeddings of this width."""
    kept = {n: m for n, m in b.module.layers.items() if isinstance(m, nn.Embedding)}
    return [f"self.layers.{n}" for n, m in kept.items() if m.embedding_dim == width]


# Instructions ---------------------------------------------------------------------------------------------------------


def activation(b: _Builder, v: str) -> None:
    b.let(b.draw(st.sampled_from(["F.relu({})", "F.gelu({})", "F.silu({})", "torch.tanh({})"])).format(v))


def linear(b: _Builder, v: str) -> None:
    t = b.values[v]
    b.let(f"{b.linear(t.shape[-1], None, t.dtype)}({v})")


def shared_linear(b: _Builder, v: str) -> None:
    """The same square Linear three times, with activations between."""
    t = b.values[v]
    layer = b.linear(t.shape[-1], t.shape[-1], t.dtype)
    for _ in range(2):
        v = b.let(f"F.silu({layer}({v}))")[0]
    b.let(f"{layer}({v})")


def add(b: _Builder, v: str) -> None:
    shape = b.values[v].shape
    b.let(f"{v} + {b.partner(v, lambda t: t.shape == shape)}")


def residual(b: _Builder, v: str) -> None:
    """A skip connection to any older value: its features are projected when they do not fit."""
    t = b.values[v]
    u = b.partner(v, lambda s: s.ndim == t.ndim and s.shape[:-1] == t.shape[:-1])
    if b.values[u].shape == t.shape:
        b.let(f"torch.tanh({v} + {u})")
        return
    layer = b.linear(b.values[u].shape[-1], t.shape[-1], b.values[u].dtype)
    b.let(f"{v} + {layer}({u})")


def mul(b: _Builder, v: str) -> None:
    shape = b.values[v].shape
    u = b.partner(v, lambda t: t.shape == shape or t.ndim == 0)
    b.let(f"{v} * {b.draw(st.sampled_from(['{}', 'torch.sigmoid({})', '{}.abs()'])).format(u)}")


def scalar_option(b: _Builder, v: str) -> None:
    """Computation that depends on the Python scalars among the arguments."""
    forms = ["{0} * scale", "{0} + scale if flip else {0} - 1", "{0}.flip(-1) if flip else {0} * scale"]
    b.let(b.draw(st.sampled_from(forms)).format(v))


def layer_norm(b: _Builder, v: str) -> None:
    t, affine = b.values[v], b.draw(st.booleans())
    b.let(f"{b.layer('norm', lambda: nn.LayerNorm(t.shape[-1], elementwise_affine=affine), t.dtype)}({v})")


def group_norm(b: _Builder, v: str) -> None:
    t = b.values[v]
    groups = [g for g in (1, 2, 4) if t.shape[1] % g == 0 and t.numel() // g > 1] or [1]
    group = b.draw(st.sampled_from(groups))
    b.let(f"{b.layer('groupnorm', lambda: nn.GroupNorm(group, t.shape[1]), t.dtype)}({v})")


def conv(b: _Builder, v: str) -> None:
    t, width = b.values[v], b.draw(st.sampled_from([4, 8, 16]))
    kernel = b.draw(st.sampled_from([1, 3]))
    make = functools.partial(nn.Conv2d, t.shape[1], width, kernel, padding=kernel // 2)
    b.let(f"{b.layer('conv', make, t.dtype)}({v})")


def conv_transpose(b: _Builder, v: str) -> None:
    t = b.values[v]
    make = functools.partial(nn.ConvTranspose2d, t.shape[1], 4, 2, stride=2)
    b.let(f"{b.layer('up', make, t.dtype)}({v})")


def upsample(b: _Builder, v: str) -> None:
    b.let(f'F.interpolate({v}, scale_factor=2.0, mode="nearest")')


def pool(b: _Builder, v: str) -> None:
    b.let(f"F.avg_pool2d({v}, 2)")


def attention(b: _Builder, v: str) -> None:
    """Self or cross attention over [B, T, C], as one operator or spelled out."""
    t = b.values[v]
    batch, length, width = t.shape
    u = b.partner(v, lambda s: s.ndim == 3 and s.shape[0] == batch and s.dtype == t.dtype)
    keys, inner = b.values[u].shape[1], b.draw(st.sampled_from([4, 8, 16]))
    heads = b.draw(st.sampled_from([1, 2, 4]))
    q = b.let(f"{b.linear(width, inner, t.dtype)}({v}).view({batch}, {length}, {heads}, -1).transpose(1, 2)")[0]
    context = b.values[u].shape[-1]
    k, w = (
        b.let(f"{b.linear(context, inner, t.dtype)}({u}).view({batch}, {keys}, {heads}, -1).transpose(1, 2)")[0]
        for _ in range(2)
    )
    causal = b.draw(st.booleans())
    if b.draw(st.booleans()):
        bias = f"attn_mask=torch.ones({length}, {keys}).tril().log().to({t.dtype})"
        option = b.draw(st.sampled_from([f"is_causal={causal}", bias]))
        o = b.let(f"F.scaled_dot_product_attention({q}, {k}, {w}, {option})")[0]
    else:
        s = b.let(f"{q} @ {k}.transpose(-2, -1) * {1 / math.sqrt(inner // heads)}")[0]
        mask = f"torch.ones({length}, {keys}, dtype=torch.bool).tril().logical_not()"
        softmax = f'{s}.masked_fill({mask}, float("-inf")).softmax(-1)' if causal else f"{s}.softmax(-1)"
        o = b.let(f"{softmax} @ {w}")[0]
    o = b.let(f"{o}.transpose(1, 2).reshape({batch}, {length}, {inner})")[0]
    b.let(f"{b.linear(inner, width, t.dtype)}({o})")


def embedding(b: _Builder, v: str) -> None:
    layers = [n for n, m in b.module.layers.items() if isinstance(m, nn.Embedding) and m.num_embeddings == VOCABULARY]
    reuse = b.draw(st.booleans())
    if layers and reuse:
        b.let(f"self.layers.{layers[0]}({v})")
        return
    width = b.draw(st.sampled_from([4, 8, 16]))
    b.let(f"{b.layer('embed', lambda: nn.Embedding(VOCABULARY, width))}({v})")


def positions(b: _Builder, v: str) -> None:
    """Learned positions, looked up with arange."""
    t = b.values[v]
    length, width = t.shape[-2:]
    table = b.layer("positions", lambda: nn.Embedding(length, width), t.dtype)
    b.let(f"{v} + {table}(torch.arange({length}))")


def tied_head(b: _Builder, v: str) -> None:
    """An embedding's table used once more as the matrix of a head, directly or as a tied parameter of a Linear."""
    t = b.values[v]
    name = b.draw(st.sampled_from(_embeddings(b, t.shape[-1])))
    table = b.module.get_parameter(f"{name.removeprefix('self.')}.weight")
    if b.draw(st.booleans()):
        b.let(f"F.linear({v}, {name}.weight.to({t.dtype}))")
        return
    head = b.layer("head", lambda: nn.Linear(table.shape[1], table.shape[0], bias=False), table.dtype)
    b.module.get_submodule(head.removeprefix("self.")).weight = table
    b.let(f"{head}({v}.to({table.dtype}))")


def weight_view(b: _Builder, v: str) -> None:
    """A matrix used through a view: transposed, some of its rows, a column, or cast."""
    t = b.values[v]
    w = b.draw(st.sampled_from(_weights(b)))
    rows, columns = b.module.get_parameter(w.removeprefix("self.")).shape
    cast = f".to({t.dtype})"
    forms = [f"{v}.mean() * {w}[:{max(1, rows // 2)}]", f"{v}[..., :1] + {w}[:, 0].sum()"]
    if t.shape[-1] == columns:
        forms += [f"F.linear({v}, {w}[:{max(1, rows - 1)}]{cast})", f"{v} @ {w}.t(){cast}", f"{v} * {w}[0]"]
    if t.shape[-1] == rows:
        forms += [f"F.linear({v}, {w}.t(){cast})", f"{v} + {w}[:, {columns - 1}]"]
    b.let(b.draw(st.sampled_from(forms)))


def cat(b: _Builder, v: str) -> None:
    t = b.values[v]
    dim = b.draw(st.integers(1, t.ndim - 1))

    def fits(s: Tensor) -> bool:
        same = s.ndim == t.ndim and all(s.shape[d] == t.shape[d] for d in range(t.ndim) if d != dim)
        return same and s.numel() <= MAX_ELEMENTS // 2

    b.let(f"torch.cat([{v}, {b.partner(v, fits)}], dim={dim})")


def split(b: _Builder, v: str) -> None:
    """Both parts are views of the whole."""
    width = b.values[v].shape[-1]
    first = b.draw(st.integers(1, width - 1))
    even = f"{v}.chunk(2, dim=-1)"
    b.let(b.draw(st.sampled_from([even, f"{v}.split([{first}, {width - first}], dim=-1)"])), 2)


def cut(b: _Builder, v: str) -> None:
    """A slice along one dimension, a view."""
    t = b.values[v]
    dim = b.draw(st.integers(1, t.ndim - 1))
    start = b.draw(st.integers(0, t.shape[dim] - 1))
    stop = b.draw(st.integers(start + 1, t.shape[dim]))
    step = b.draw(st.sampled_from([1, 2]))
    index = ", ".join([":"] * dim + [f"{start}:{stop}" + (f":{step}" if step > 1 else "")])
    b.let(f"{v}[{index}]")


def transpose(b: _Builder, v: str) -> None:
    t = b.values[v]
    order = [0, *b.draw(st.permutations(range(1, t.ndim)))]
    b.let(b.draw(st.sampled_from([f"{v}.transpose(-2, -1)", f"{v}.permute({', '.join(map(str, order))})"])))


def rare_view(b: _Builder, v: str) -> None:
    """Views with unusual strides, offsets or element types."""
    t = b.values[v]
    forms = [
        f"{v}.diagonal(0, -2, -1)",
        f"{v}.unfold(1, 1, 1)",
        f"{v}.unbind(1)[-1]",
        f"{v}.narrow(-1, {t.shape[-1] - 1}, 1)",
        f"{v}.movedim(0, -1)",
        f"{v}.as_strided((2, {t.shape[-1] // 2}), ({t.stride(-1)}, {2 * t.stride(-1)}), {t.storage_offset()})",
        f"{v}.view({v}.dtype)",
    ]
    if t.dtype == torch.float32:
        forms.append(f"{v}.view(torch.int32).view(torch.float32)")
    if t.shape[1] >= 2:
        forms.append(f"{v}.unfold(1, 2, 1)")
    b.let(b.draw(st.sampled_from(forms)))


def index(b: _Builder, v: str) -> None:
    """Gather by a constant index, or choose by a mask."""
    rows = b.values[v].shape[1]
    forms = [f"torch.where({v} > 0, {v}, -0.5)", f"{v}[:, torch.tensor([{rows - 1}, 0])]"]
    picks = b.constant(torch.randint(rows, (rows,), generator=b.generator))
    forms += [f"{v}[:, {picks}]", f"{v}.index_select(1, {picks})"]
    b.let(b.draw(st.sampled_from(forms)))


def contiguous(b: _Builder, v: str) -> None:
    forms = ["{}.contiguous()", "{}.clone()"]
    if b.values[v].ndim == 4:
        forms.append("{}.contiguous(memory_format=torch.channels_last)")
    b.let(b.draw(st.sampled_from(forms)).format(v))


def flat_view(b: _Builder, v: str) -> None:
    """Contiguous memory seen flat, or with its last dimension halved."""
    shape = tuple(b.values[v].shape)
    forms = [f"{v}.view({shape[0]}, -1)", f"{v}.flatten(0, 1)"]
    if shape[-1] % 2 == 0 and len(shape) < 4:
        forms.append(f"{v}.unflatten(-1, (2, {shape[-1] // 2}))")
    b.let(b.draw(st.sampled_from(forms)))


def reshape(b: _Builder, v: str) -> None:
    """A view or a copy, as the strides have it."""
    shape = b.values[v].shape
    b.let(f"{v}.reshape({shape[0]}, {shape[-1]}, -1)")


def to_image(b: _Builder, v: str) -> None:
    batch, length, width = b.values[v].shape
    b.let(f"{v}.transpose(1, 2).reshape({batch}, {width}, 2, {length // 2})")


def to_tokens(b: _Builder, v: str) -> None:
    b.let(f"{v}.flatten(2).transpose(1, 2)")


def expand(b: _Builder, v: str) -> None:
    """One slice seen as many: several elements in the same memory."""
    shape = ", ".join(map(str, b.values[v].shape))
    b.let(f"{v}[:, :1].expand({shape})")


def reduce(b: _Builder, v: str) -> None:
    dim = b.draw(st.integers(-b.values[v].ndim, -1))
    forms = [f"{v}.mean({dim})", f"{v}.sum({dim})", f"{v}.mean({dim}, keepdim=True)", f"{v}.mean()", f"{v}.amax({dim})"]
    b.let(b.draw(st.sampled_from(forms)))


def broadcast(b: _Builder, v: str) -> None:
    """Per-batch statistics put back on every element, as time embeddings are."""
    ones = ", ".join(["-1", *["1"] * (b.values[v].ndim - 1)])
    b.let(f"{v} + {v}.flatten(1).mean(1).view({ones})")


def cast(b: _Builder, v: str) -> None:
    b.let(f"{v}.to({b.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))})")


def cast_round_trip(b: _Builder, v: str) -> None:
    """Work in another dtype and come back."""
    dtype = b.draw(st.sampled_from([torch.float64, torch.bfloat16, torch.float32]))
    b.let(f"F.silu({v}.to({dtype})).to({b.values[v].dtype})")


def dropout(b: _Builder, v: str) -> None:
    """Does nothing in eval mode, and gives its argument back."""
    b.let(f"{b.layer('drop', lambda: nn.Dropout(0.5))}({v})")


def factory(b: _Builder, v: str) -> None:
    t = b.values[v]
    shape = tuple(t.shape)
    forms = [
        f"torch.zeros({shape}, dtype={t.dtype})",
        f"torch.zeros_like({v})",
        f"{v} + torch.arange({shape[-1]}, dtype={t.dtype}) * 0.125",
        f"torch.full({shape}, 0.5) * {v}",
        f"{v} * torch.tensor(0.5)",
        f"torch.tensor([0.0] * {shape[-1]}, dtype={t.dtype}).add_({v}.mean()) + {v}",
    ]
    b.let(b.draw(st.sampled_from(forms)))


def constant(b: _Builder, v: str) -> None:
    """A tensor attribute that is neither parameter nor buffer."""
    b.let(f"{v} * {b.constant(b.random(b.values[v].shape[-1]))}")


def parameter(b: _Builder, v: str) -> None:
    """A bare parameter of the module itself."""
    name = b.fresh("scale")
    value = nn.Parameter(b.random(b.values[v].shape[-1]), requires_grad=False)
    b.module.register_parameter(name, value)
    b.own(value)
    b.let(f"{v} * (1 + self.{name})")


def buffer(b: _Builder, v: str) -> None:
    """A buffer that is only read."""
    b.let(f"{v} + {b.buffer('table', b.random(b.values[v].shape[-1]))}")


def counter(b: _Builder, v: str) -> None:
    """A buffer that counts calls, and an output that depends on it."""
    count = b.buffer("count", torch.zeros((), dtype=torch.int64))
    b.do(f"{count}.add_(1)")
    b.let(f"{v} + {count} * 0.25")


def running_mean(b: _Builder, v: str) -> None:
    """A buffer that is read, written, and read again."""
    t = b.values[v]
    state = b.buffer("state", b.random(t.shape[-1]))
    dims = tuple(range(t.ndim - 1))
    before = b.let(f"{v} - {state}")[0]
    b.do(f"{state}.mul_(0.75).add_({v}.mean({dims}), alpha=0.25)")
    b.let(f"{before} * {state}")


def cache(b: _Builder, v: str) -> None:
    """A buffer larger than what is written into a slice of it, and read whole."""
    t = b.values[v]
    rows = t.shape[1]
    memory = b.buffer("cache", b.random(t.shape[0], rows + 2, *t.shape[2:]).to(t.dtype))
    b.do(f"{memory}[:, 1:{rows + 1}].copy_({v})")
    b.let(f"{memory}.cumsum(1)[:, :{rows}]")


def buffer_alias(b: _Builder, v: str) -> None:
    """A name for a buffer taken before the buffer is written: it sees the write, and may be given back."""
    state = b.buffer("state", b.random(b.values[v].shape[-1]))
    alias = b.let(b.draw(st.sampled_from([state, f"{state}.view(-1)"])))[0]
    b.do(f"{state}.add_({v}.mean(), alpha=0.5)")
    b.let(f"{v} * torch.sigmoid({alias})")


def buffer_reassign(b: _Builder, v: str) -> None:
    """A buffer replaced by a new tensor instead of written in place."""
    state = b.buffer("state", b.random(b.values[v].shape[-1]))
    b.do(f"{state} = {state} * 0.5 + 0.25")
    b.let(f"{v} * {state}")


def write(b: _Builder, v: str) -> None:
    """In place on the whole value; aliases see it."""
    t = b.values[v]
    u = b.partner(v, lambda s: s.shape == t.shape and b.storage(s) != b.storage(t))
    forms = [
        f"{v}.add_({u}, alpha=0.5)",
        f"{v}.mul_(torch.sigmoid({u}))",
        f"{v}.masked_fill_({u} > 0.25, 0.125)",
        f"F.relu_({v})",
        f"F.silu({v}, inplace=True)",
        f"{v}.clamp_(-1.0, 1.0)",
        f"{v} += 0.5",
        f"{v}.copy_({u})",
        f"torch.mul({v}, 0.5, out={v})",
    ]
    if t.dtype == torch.float32:
        forms.append(f"{v}.view(torch.int32).bitwise_and_(-65536)")  # what bfloat16 would keep
    b.do(b.draw(st.sampled_from(forms)))


def write_through_view(b: _Builder, v: str) -> None:
    """In place on a part of the value, seen by every alias of it."""
    t = b.values[v]
    dim = b.draw(st.integers(1, t.ndim - 1))
    start = b.draw(st.integers(0, t.shape[dim] - 1))
    part = ", ".join([":"] * dim + [f"{start}:"])
    u = b.partner(v, lambda s: s.shape == t.shape and b.storage(s) != b.storage(t))
    source = f"{u}[{part}]" if u != v else "0.5"
    forms = [
        f"{v}[{part}] = {source}",
        f"{v}[{part}].add_({source})",
        f"{v}.transpose(-2, -1).mul_(0.5)",
        f"{v}[{part}].masked_fill_({v}[{part}] < 0, -0.125)",
        f"{v}.select({dim}, {start}).zero_()",
        f"{v}.select({dim}, {start}).copy_({v}.select({dim}, 0).clone())",
        f"{v}[{v} > 0.5] = 0.25",
    ]
    if u != v:
        forms.append(f"{v}[{part}].copy_({source})")
    b.do(b.draw(st.sampled_from(forms)))


def fill_slots(b: _Builder, v: str) -> None:
    """Fresh memory filled slice by slice, as `cat` is often replaced."""
    t = b.values[v]
    rows = t.shape[1]
    out = b.let(f"torch.empty({(t.shape[0], 2 * rows, *t.shape[2:])}, dtype={t.dtype}).zero_()")[0]
    b.do(f"{out}[:, :{rows}].copy_({v})")
    b.do(f"{out}[:, {rows}:] = {v} * 0.5")


@dataclass(frozen=True)
class Instruction:
    """One kind of instruction: what its first operand must be, and how it is written."""

    build: Callable[[_Builder, str], None]
    where: Predicate

    @property
    def name(self) -> str:
        """The builder's name."""
        return self.build.__name__


# Simple kinds first: failures shrink towards them.
INSTRUCTIONS: tuple[Instruction, ...] = (
    Instruction(activation, is_float),
    Instruction(linear, is_matrix),
    Instruction(add, is_float),
    Instruction(mul, is_float),
    Instruction(residual, is_matrix),
    Instruction(layer_norm, is_widest),
    Instruction(conv, is_image),
    Instruction(group_norm, is_poolable),
    Instruction(attention, is_tokens),
    Instruction(embedding, is_indices),
    Instruction(tied_head, has_head),
    Instruction(positions, is_matrix),
    Instruction(shared_linear, is_matrix),
    Instruction(weight_view, has_weight),
    Instruction(scalar_option, is_matrix),
    Instruction(conv_transpose, is_growable),
    Instruction(upsample, is_growable),
    Instruction(pool, is_poolable),
    Instruction(cat, is_joinable),
    Instruction(split, is_widest),
    Instruction(cut, is_matrix),
    Instruction(transpose, is_matrix),
    Instruction(rare_view, is_widest),
    Instruction(index, is_matrix),
    Instruction(contiguous, is_matrix),
    Instruction(flat_view, is_contiguous),
    Instruction(reshape, is_matrix),
    Instruction(to_image, is_square),
    Instruction(to_tokens, is_image),
    Instruction(expand, is_matrix),
    Instruction(reduce, is_matrix),
    Instruction(broadcast, is_matrix),
    Instruction(cast, is_float),
    Instruction(cast_round_trip, is_float),
    Instruction(dropout, is_float),
    Instruction(factory, is_matrix),
    Instruction(constant, is_matrix),
    Instruction(parameter, is_matrix),
    Instruction(buffer, is_matrix),
    Instruction(counter, is_float),
    Instruction(running_mean, is_matrix),
    Instruction(cache, is_matrix),
    Instruction(buffer_alias, is_matrix),
    Instruction(buffer_reassign, is_matrix),
    Instruction(write, is_writable),
    Instruction(write_through_view, is_writable),
    Instruction(fill_slots, is_joinable),
)


# Text and code --------------------------------------------------------------------------------------------------------

_GLOBALS: dict[str, Any] = {"torch": torch, "F": F}


@functools.lru_cache(maxsize=4096)
def _code(line: str) -> CodeType:
    return compile(line, "<generated>", "exec")


@functools.lru_cache(maxsize=1024)
def _function(source: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {}
    exec(compile(source, "<generated>", "exec"), _GLOBALS, scope)
    return scope["forward"]


def _type(t: Tensor | None) -> str:
    """`f32[2, 3]`."""
    return "None" if t is None else f"{SHORT.get(t.dtype, str(t.dtype))}{list(t.shape)}"
