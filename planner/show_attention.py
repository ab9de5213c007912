"""What `print(plan)` says of attention on CUDA: how many calls take which kernels, and why some take single operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx

from passes.attention_backend import CONDITIONS, attention_backend, why_not
from passes.loop import loop_of
from passes.op_call import OpCall
from passes.probe import call_of
from passes.program import Program, is_symbolic

if TYPE_CHECKING:
    from planner.plan_facts import PlanFacts

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def attention_rows(plan: PlanFacts) -> list[tuple[str, str]]:
    """A label and a text; nothing on other devices, where there is no such operator, and where sizes are symbols.

    What runs in tiles counts once, by its first tile.
    """
    capability = plan.machine.capability
    if plan.device.partition(":")[0] != "cuda" or capability is None:
        return []
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for node in _attentions(plan.problem.program):
        if is_symbolic(node) or any(map(is_symbolic, node.all_input_nodes)):
            continue
        found = call_of(node)
        call = OpCall(_ATTENTION, found.args, found.kwargs, found.outputs, capability)
        counts[attention_backend(call)] += 1
        if attention_backend(call) == "math":
            reasons[why_not(call)["efficient"]] += 1
    if not counts:
        return []
    text = ", ".join(f"{counts[backend]} {backend}" for backend in CONDITIONS if counts[backend])
    if reasons:
        text += f" (of the efficient kernel: {reasons.most_common(1)[0][0]})"
    return [("attention", f"{text}; by PyTorch's source, no run on a GPU has confirmed it")]


def _attentions(program: Program) -> Iterator[fx.Node]:
    for node in program.ops():
        loop = loop_of(node)
        inside = loop.runs[0].operators if loop is not None else (node,)
        yield from (n for n in inside if n.target is _ATTENTION)
