"""Instructions that compute: arithmetic, layers, attention, and weights that are shared, tied or used through views."""

import functools
import math

from hypothesis import strategies as st
from torch import nn

from tests.strategies.builder import VOCABULARY, Builder
from tests.strategies.preconditions import embeddings, weights


def activation(b: Builder, v: str) -> None:
    b.let(b.draw(st.sampled_from(["F.relu({})", "F.gelu({})", "F.silu({})", "torch.tanh({})"])).format(v))


def linear(b: Builder, v: str) -> None:
    t = b.values[v]
    b.let(f"{b.linear(t.shape[-1], None, t.dtype)}({v})")


def shared_linear(b: Builder, v: str) -> None:
    """The same square Linear three times, with activations between."""
    t = b.values[v]
    layer = b.linear(t.shape[-1], t.shape[-1], t.dtype)
    for _ in range(2):
        v = b.let(f"F.silu({layer}({v}))")[0]
    b.let(f"{layer}({v})")


def add(b: Builder, v: str) -> None:
    shape = b.values[v].shape
    b.let(f"{v} + {b.partner(v, lambda t: t.shape == shape)}")


def residual(b: Builder, v: str) -> None:
    """A skip connection to any older value: its features are projected when they do not fit."""
    t = b.values[v]
    u = b.partner(v, lambda s: s.ndim == t.ndim and s.shape[:-1] == t.shape[:-1])
    if b.values[u].shape == t.shape:
        b.let(f"torch.tanh({v} + {u})")
        return
    layer = b.linear(b.values[u].shape[-1], t.shape[-1], b.values[u].dtype)
    b.let(f"{v} + {layer}({u})")


def mul(b: Builder, v: str) -> None:
    shape = b.values[v].shape
    u = b.partner(v, lambda t: t.shape == shape or t.ndim == 0)
    b.let(f"{v} * {b.draw(st.sampled_from(['{}', 'torch.sigmoid({})', '{}.abs()'])).format(u)}")


def scalar_option(b: Builder, v: str) -> None:
    """Computation that depends on the Python scalars among the arguments."""
    forms = ["{0} * scale", "{0} + scale if flip else {0} - 1", "{0}.flip(-1) if flip else {0} * scale"]
    b.let(b.draw(st.sampled_from(forms)).format(v))


def layer_norm(b: Builder, v: str) -> None:
    t, affine = b.values[v], b.draw(st.booleans())
    b.let(f"{b.layer('norm', lambda: nn.LayerNorm(t.shape[-1], elementwise_affine=affine), t.dtype)}({v})")


def group_norm(b: Builder, v: str) -> None:
    t = b.values[v]
    groups = [g for g in (1, 2, 4) if t.shape[1] % g == 0 and t.numel() // g > 1] or [1]
    group = b.draw(st.sampled_from(groups))
    b.let(f"{b.layer('groupnorm', lambda: nn.GroupNorm(group, t.shape[1]), t.dtype)}({v})")


def conv(b: Builder, v: str) -> None:
    t, width = b.values[v], b.draw(st.sampled_from([4, 8, 16]))
    kernel = b.draw(st.sampled_from([1, 3]))
    make = functools.partial(nn.Conv2d, t.shape[1], width, kernel, padding=kernel // 2)
    b.let(f"{b.layer('conv', make, t.dtype)}({v})")


def conv_transpose(b: Builder, v: str) -> None:
    t = b.values[v]
    make = functools.partial(nn.ConvTranspose2d, t.shape[1], 4, 2, stride=2)
    b.let(f"{b.layer('up', make, t.dtype)}({v})")


def upsample(b: Builder, v: str) -> None:
    b.let(f'F.interpolate({v}, scale_factor=2.0, mode="nearest")')


def pool(b: Builder, v: str) -> None:
    b.let(f"F.avg_pool2d({v}, 2)")


def attention(b: Builder, v: str) -> None:
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


def embedding(b: Builder, v: str) -> None:
    layers = [n for n, m in b.module.layers.items() if isinstance(m, nn.Embedding) and m.num_embeddings == VOCABULARY]
    reuse = b.draw(st.booleans())
    if layers and reuse:
        b.let(f"self.layers.{layers[0]}({v})")
        return
    width = b.draw(st.sampled_from([4, 8, 16]))
    b.let(f"{b.layer('embed', lambda: nn.Embedding(VOCABULARY, width))}({v})")


def positions(b: Builder, v: str) -> None:
    """Learned positions, looked up with arange."""
    t = b.values[v]
    length, width = t.shape[-2:]
    table = b.layer("positions", lambda: nn.Embedding(length, width), t.dtype)
    b.let(f"{v} + {table}(torch.arange({length}))")


def tied_head(b: Builder, v: str) -> None:
    """An embedding's table used once more as the matrix of a head, directly or as a tied parameter of a Linear."""
    t = b.values[v]
    name = b.draw(st.sampled_from(embeddings(b, t.shape[-1])))
    table = b.module.get_parameter(f"{name.removeprefix('self.')}.weight")
    if b.draw(st.booleans()):
        b.let(f"F.linear({v}, {name}.weight.to({t.dtype}))")
        return
    head = b.layer("head", lambda: nn.Linear(table.shape[1], table.shape[0], bias=False), table.dtype)
    b.module.get_submodule(head.removeprefix("self.")).weight = table
    b.let(f"{head}({v}.to({table.dtype}))")


def weight_view(b: Builder, v: str) -> None:
    """A matrix used through a view: transposed, some of its rows, a column, or cast."""
    t = b.values[v]
    w = b.draw(st.sampled_from(weights(b)))
    rows, columns = b.module.get_parameter(w.removeprefix("self.")).shape
    cast = f".to({t.dtype})"
    forms = [f"{v}.mean() * {w}[:{max(1, rows // 2)}]", f"{v}[..., :1] + {w}[:, 0].sum()"]
    if t.shape[-1] == columns:
        forms += [f"F.linear({v}, {w}[:{max(1, rows - 1)}]{cast})", f"{v} @ {w}.t(){cast}", f"{v} * {w}[0]"]
    if t.shape[-1] == rows:
        forms += [f"F.linear({v}, {w}.t(){cast})", f"{v} + {w}[:, {columns - 1}]"]
    b.let(b.draw(st.sampled_from(forms)))
