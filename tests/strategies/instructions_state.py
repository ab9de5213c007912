"""Instructions with state: the module's own tensors, buffers that are written, and writes into intermediates."""

import torch
from hypothesis import strategies as st
from torch import nn

from tests.strategies.builder import Builder


def constant(b: Builder, v: str) -> None:
    """A tensor attribute that is neither parameter nor buffer."""
    b.let(f"{v} * {b.constant(b.random(b.values[v].shape[-1]))}")


def parameter(b: Builder, v: str) -> None:
    """A bare parameter of the module itself."""
    name = b.fresh("scale")
    value = nn.Parameter(b.random(b.values[v].shape[-1]), requires_grad=False)
    b.module.register_parameter(name, value)
    b.own(value)
    b.let(f"{v} * (1 + self.{name})")


def buffer(b: Builder, v: str) -> None:
    """A buffer that is only read."""
    b.let(f"{v} + {b.buffer('table', b.random(b.values[v].shape[-1]))}")


def counter(b: Builder, v: str) -> None:
    """A buffer that counts calls, and an output that depends on it."""
    count = b.buffer("count", torch.zeros((), dtype=torch.int64))
    b.do(f"{count}.add_(1)")
    b.let(f"{v} + {count} * 0.25")


def running_mean(b: Builder, v: str) -> None:
    """A buffer that is read, written, and read again."""
    t = b.values[v]
    state = b.buffer("state", b.random(t.shape[-1]))
    dims = tuple(range(t.ndim - 1))
    before = b.let(f"{v} - {state}")[0]
    b.do(f"{state}.mul_(0.75).add_({v}.mean({dims}), alpha=0.25)")
    b.let(f"{before} * {state}")


def cache(b: Builder, v: str) -> None:
    """A buffer larger than what is written into a slice of it, and read whole."""
    t = b.values[v]
    rows = t.shape[1]
    memory = b.buffer("cache", b.random(t.shape[0], rows + 2, *t.shape[2:]).to(t.dtype))
    b.do(f"{memory}[:, 1:{rows + 1}].copy_({v})")
    b.let(f"{memory}.cumsum(1)[:, :{rows}]")


def buffer_alias(b: Builder, v: str) -> None:
    """A name for a buffer taken before the buffer is written: it sees the write, and may be given back."""
    state = b.buffer("state", b.random(b.values[v].shape[-1]))
    alias = b.let(b.draw(st.sampled_from([state, f"{state}.view(-1)"])))[0]
    b.do(f"{state}.add_({v}.mean(), alpha=0.5)")
    b.let(f"{v} * torch.sigmoid({alias})")


def buffer_reassign(b: Builder, v: str) -> None:
    """A buffer replaced by a new tensor instead of written in place."""
    state = b.buffer("state", b.random(b.values[v].shape[-1]))
    b.do(f"{state} = {state} * 0.5 + 0.25")
    b.let(f"{v} * {state}")


def write(b: Builder, v: str) -> None:
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


def write_through_view(b: Builder, v: str) -> None:
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


def fill_slots(b: Builder, v: str) -> None:
    """Fresh memory filled slice by slice, as `cat` is often replaced."""
    t = b.values[v]
    rows = t.shape[1]
    out = b.let(f"torch.empty({(t.shape[0], 2 * rows, *t.shape[2:])}, dtype={t.dtype}).zero_()")[0]
    b.do(f"{out}[:, :{rows}].copy_({v})")
    b.do(f"{out}[:, {rows}:] = {v} * 0.5")
