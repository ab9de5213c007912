"""Inlines regions under `torch.vmap`, which the capture leaves as they were written, as the batched operators that they run.

before:  _vmap_increment_nesting(5); a = _add_batch_dim(i, 0, 1); b = ge(a, j); y = _remove_batch_dim(b, 1, 5, 0)
         _vmap_decrement_nesting()
after:   a = unsqueeze(i, 1); y = ge(a, j)

transformers makes some of its attention masks so. The batching rules are PyTorch's own: the region runs once on fakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch import predispatch
from torch.fx.experimental.proxy_tensor import make_fx

from passes.program import Program, tensors_of
from runtime.errors import CaptureError

_ENTER, _LEAVE = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting
_SETUP = predispatch.lazy_load_decompositions


@dataclass(frozen=True)
class InlineVmap:
    """Ensures: no call of functorch's machinery is left, where it was vmap's.

    Raises:
        CaptureError: a region makes tensors from Python data, or runs on symbolic sizes.
    """

    name: str = "inline_vmap"

    def apply(self, program: Program) -> Program:
        if not any(n.target in (_ENTER, _SETUP) for n in program.graph.nodes):
            return program
        graph = program.copy_graph()
        nodes = [n for n in graph.nodes if n.target is not _SETUP]
        for node in [n for n in graph.nodes if n.target is _SETUP]:
            graph.erase_node(node)
        start, depth = 0, 0
        for position, node in enumerate(nodes):
            if node.target is _ENTER:
                start, depth = (position if depth == 0 else start), depth + 1
            elif node.target is _LEAVE:
                depth -= 1
                if depth == 0:
                    _inline(program.name, graph, nodes[start : position + 1])
        return program.with_graph(graph)


def _inline(name: str, graph: fx.Graph, region: Sequence[fx.Node]) -> None:
    """Replaces the nodes of one region."""
    inside = set(region)
    inputs = list(dict.fromkeys(n for node in region for n in node.all_input_nodes if n not in inside))
    results = [node for node in region if any(user not in inside for user in node.users)]

    def run(*values: Any) -> list[Any]:
        known: dict[fx.Node, Any] = dict(zip(inputs, values, strict=True))
        for node in region:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
            target: Any = node.target
            known[node] = target(*args, **kwargs)
        return [known[node] for node in results]

    modes = [t.fake_mode for n in inputs for t in tensors_of(n) if hasattr(t, "fake_mode")]
    if not modes or len(modes) < len(inputs):
        raise CaptureError(f"{name} runs torch.vmap on something else than tensors ({region[0].name}); avoid it in this method")
    with modes[0], torch.no_grad():
        traced = make_fx(run)(*(n.meta["val"] for n in inputs)).graph
    memo: dict[fx.Node, Any] = {}
    given = iter(inputs)
    outputs: Any = ()
    with graph.inserting_before(region[0]):
        for node in traced.nodes:
            if node.op == "placeholder":
                memo[node] = next(given)
            elif node.op == "output":
                outputs = node.args[0]
            elif node.op == "get_attr":
                raise CaptureError(f"{name} makes a tensor inside of torch.vmap ({region[0].name}); make it before")
            else:
                memo[node] = graph.node_copy(node, lambda n: memo[n])
                memo[node].meta["stack_trace"] = region[0].meta.get("stack_trace")
                memo[node].meta["nn_module_stack"] = region[0].meta.get("nn_module_stack", {})
    for old, new in zip(results, outputs, strict=True):
        old.replace_all_uses_with(memo[new], lambda user: user not in inside)
    for node in reversed(region):
        graph.erase_node(node)
