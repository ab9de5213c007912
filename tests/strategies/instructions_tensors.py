"""Instructions that rearrange: views, copies, reductions, casts and fresh tensors."""

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.strategies.builder import MAX_ELEMENTS, Builder


def cat(b: Builder, v: str) -> None:
    t = b.values[v]
    dim = b.draw(st.integers(1, t.ndim - 1))

    def fits(s: Tensor) -> bool:
        same = s.ndim == t.ndim and all(s.shape[d] == t.shape[d] for d in range(t.ndim) if d != dim)
        return same and s.numel() <= MAX_ELEMENTS // 2

    b.let(f"torch.cat([{v}, {b.partner(v, fits)}], dim={dim})")


def split(b: Builder, v: str) -> None:
    """Both parts are views of the whole."""
    width = b.values[v].shape[-1]
    first = b.draw(st.integers(1, width - 1))
    even = f"{v}.chunk(2, dim=-1)"
    b.let(b.draw(st.sampled_from([even, f"{v}.split([{first}, {width - first}], dim=-1)"])), 2)


def cut(b: Builder, v: str) -> None:
    """A slice along one dimension, a view."""
    t = b.values[v]
    dim = b.draw(st.integers(1, t.ndim - 1))
    start = b.draw(st.integers(0, t.shape[dim] - 1))
    stop = b.draw(st.integers(start + 1, t.shape[dim]))
    step = b.draw(st.sampled_from([1, 2]))
    index = ", ".join([":"] * dim + [f"{start}:{stop}" + (f":{step}" if step > 1 else "")])
    b.let(f"{v}[{index}]")


def transpose(b: Builder, v: str) -> None:
    t = b.values[v]
    order = [0, *b.draw(st.permutations(range(1, t.ndim)))]
    b.let(b.draw(st.sampled_from([f"{v}.transpose(-2, -1)", f"{v}.permute({', '.join(map(str, order))})"])))


def rare_view(b: Builder, v: str) -> None:
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


def index(b: Builder, v: str) -> None:
    """Gather by a constant index, or choose by a mask."""
    rows = b.values[v].shape[1]
    forms = [f"torch.where({v} > 0, {v}, -0.5)", f"{v}[:, torch.tensor([{rows - 1}, 0])]"]
    picks = b.constant(torch.randint(rows, (rows,), generator=b.generator))
    forms += [f"{v}[:, {picks}]", f"{v}.index_select(1, {picks})"]
    b.let(b.draw(st.sampled_from(forms)))


def contiguous(b: Builder, v: str) -> None:
    forms = ["{}.contiguous()", "{}.clone()"]
    if b.values[v].ndim == 4:
        forms.append("{}.contiguous(memory_format=torch.channels_last)")
    b.let(b.draw(st.sampled_from(forms)).format(v))


def flat_view(b: Builder, v: str) -> None:
    """Contiguous memory seen flat, or with its last dimension halved."""
    shape = tuple(b.values[v].shape)
    forms = [f"{v}.view({shape[0]}, -1)", f"{v}.flatten(0, 1)"]
    if shape[-1] % 2 == 0 and len(shape) < 4:
        forms.append(f"{v}.unflatten(-1, (2, {shape[-1] // 2}))")
    b.let(b.draw(st.sampled_from(forms)))


def reshape(b: Builder, v: str) -> None:
    """A view or a copy, as the strides have it."""
    shape = b.values[v].shape
    b.let(f"{v}.reshape({shape[0]}, {shape[-1]}, -1)")


def to_image(b: Builder, v: str) -> None:
    batch, length, width = b.values[v].shape
    b.let(f"{v}.transpose(1, 2).reshape({batch}, {width}, 2, {length // 2})")


def to_tokens(b: Builder, v: str) -> None:
    b.let(f"{v}.flatten(2).transpose(1, 2)")


def expand(b: Builder, v: str) -> None:
    """One slice seen as many: several elements in the same memory."""
    shape = ", ".join(map(str, b.values[v].shape))
    b.let(f"{v}[:, :1].expand({shape})")


def reduce(b: Builder, v: str) -> None:
    dim = b.draw(st.integers(-b.values[v].ndim, -1))
    forms = [f"{v}.mean({dim})", f"{v}.sum({dim})", f"{v}.mean({dim}, keepdim=True)", f"{v}.mean()", f"{v}.amax({dim})"]
    b.let(b.draw(st.sampled_from(forms)))


def broadcast(b: Builder, v: str) -> None:
    """Per-batch statistics put back on every element, as time embeddings are."""
    ones = ", ".join(["-1", *["1"] * (b.values[v].ndim - 1)])
    b.let(f"{v} + {v}.flatten(1).mean(1).view({ones})")


def cast(b: Builder, v: str) -> None:
    b.let(f"{v}.to({b.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))})")


def cast_round_trip(b: Builder, v: str) -> None:
    """Work in another dtype and come back."""
    dtype = b.draw(st.sampled_from([torch.float64, torch.bfloat16, torch.float32]))
    b.let(f"F.silu({v}.to({dtype})).to({b.values[v].dtype})")


def dropout(b: Builder, v: str) -> None:
    """Does nothing in eval mode, and gives its argument back."""
    b.let(f"{b.layer('drop', lambda: nn.Dropout(0.5))}({v})")


def factory(b: Builder, v: str) -> None:
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
