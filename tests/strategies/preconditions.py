"""Preconditions: what an instruction's first operand must be."""

import torch
from torch import Tensor, nn

from tests.strategies.builder import MAX_ELEMENTS, Builder


def is_float(b: Builder, t: Tensor) -> bool:
    return t.is_floating_point()


def is_matrix(b: Builder, t: Tensor) -> bool:
    return t.is_floating_point() and t.ndim >= 2


def is_tokens(b: Builder, t: Tensor) -> bool:
    return t.is_floating_point() and t.ndim == 3


def is_image(b: Builder, t: Tensor) -> bool:
    return t.is_floating_point() and t.ndim == 4


def is_poolable(b: Builder, t: Tensor) -> bool:
    return is_image(b, t) and min(t.shape[2:]) >= 2


def is_growable(b: Builder, t: Tensor) -> bool:
    return is_image(b, t) and 4 * t.numel() <= MAX_ELEMENTS


def is_joinable(b: Builder, t: Tensor) -> bool:
    return is_matrix(b, t) and 2 * t.numel() <= MAX_ELEMENTS


def is_square(b: Builder, t: Tensor) -> bool:
    """Tokens that can be folded into an image two rows high."""
    return is_tokens(b, t) and t.shape[1] % 2 == 0


def is_indices(b: Builder, t: Tensor) -> bool:
    return t.dtype == torch.int64 and t.ndim == 2


def is_widest(b: Builder, t: Tensor) -> bool:
    """Wide enough to be cut along its last dimension."""
    return is_matrix(b, t) and t.shape[-1] >= 2


def is_contiguous(b: Builder, t: Tensor) -> bool:
    return is_matrix(b, t) and t.is_contiguous()


def is_writable(b: Builder, t: Tensor) -> bool:
    """An intermediate: not memory of an input, weight, constant or buffer, and no element twice in it."""
    if not is_matrix(b, t):
        return False
    reach = 0  # the last offset covered by the dimensions of smaller stride
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return b.storage(t) not in {b.storage(o) for o in b.owned}


def has_weight(b: Builder, t: Tensor) -> bool:
    return is_matrix(b, t) and bool(weights(b))


def has_head(b: Builder, t: Tensor) -> bool:
    return is_matrix(b, t) and bool(embeddings(b, t.shape[-1]))


def weights(b: Builder) -> list[str]:
    """How lines refer to the matrices that exist."""
    kinds = (nn.Linear, nn.Embedding)
    return [f"self.layers.{name}.weight" for name, m in b.module.layers.items() if isinstance(m, kinds)]


def embeddings(b: Builder, width: int) -> list[str]:
    """How lines refer to the embeddings of this width."""
    kept = {n: m for n, m in b.module.layers.items() if isinstance(m, nn.Embedding)}
    return [f"self.layers.{n}" for n, m in kept.items() if m.embedding_dim == width]
