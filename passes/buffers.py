"""Memory for results that are written piece by piece: an operator that makes it, in a program on fakes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.fakes import FaithfulFakes


def empty_strided(graph: fx.Graph, name: str, shape: tuple[int, ...], strides: tuple[int, ...], like: torch.Tensor) -> fx.Node:
    """An uninitialised tensor of the dtype of `like`, a fake, at the point of the graph where nodes are inserted."""
    kwargs: dict[str, Any] = {"dtype": like.dtype, "device": torch.device("cpu")}
    node = graph.create_node(
        "call_function", torch.ops.aten.empty_strided.default, (list(shape), list(strides)), kwargs, name=name
    )
    with like.fake_mode, FaithfulFakes():  # type: ignore[attr-defined]
        node.meta["val"] = torch.empty_strided(shape, strides, dtype=like.dtype)
    return node
