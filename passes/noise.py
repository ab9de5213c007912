"""How much noise in each weight shows in the result, estimated from the program's structure.

Errors of weights are small and independent, so their powers add up: the relative error of the result, squared, is the sum of
`gain * noise**2` over the weights, where noise is the relative error of a weight. A contraction adds the noise of its weight to
that of its input; any other operator passes the mean of its inputs' on, by their power where it adds them. Powers are assumed:
what a norm or a contraction gives has power 1, and powers of what is added add up. With them a branch of a residual network
counts by its share in the sum, and what has gone through many blocks is not much noisier than through one, as is found in
practice. Amplification in between is not seen: an estimate, to be held against a measurement (`Plan.validate`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from passes.castable import CONTRACTIONS
from passes.program import Program, tensors_of

aten = torch.ops.aten

_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor}
_NORMS = {
    aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.instance_norm.default,
    aten.batch_norm.default, aten.softmax.int, aten._softmax.default, aten.scaled_dot_product_attention.default,
}  # fmt: skip


def noise_gains(program: Program) -> dict[str, float]:
    """By placeholder of a weight: the share of its noise's power in that of the result (the mean over results)."""
    weights = _weights(program)
    powers = _powers(program)
    carried: dict[fx.Node, float] = {}
    given = [n for n in program.output.all_input_nodes if _is_float(n)]
    for node in given:
        carried[node] = carried.get(node, 0.0) + 1 / len(given)
    for node in reversed(list(program.ops())):
        power = carried.pop(node, 0.0)
        if not power:
            continue
        for argument, share in _shares(node, powers, weights):
            carried[argument] = carried.get(argument, 0.0) + power * share
    return {node.name: power for node, power in carried.items() if node.name in program.weights}


def relative_error(gains: Mapping[str, float], noises: Mapping[str, float]) -> float:
    """Of the result, where weights have these relative errors."""
    return float(sum(gains.get(key, 0.0) * noise**2 for key, noise in noises.items()) ** 0.5)


def _powers(program: Program) -> dict[fx.Node, float]:
    powers: dict[fx.Node, float] = {}
    for node in program.graph.nodes:
        inputs = [powers[n] for n in node.all_input_nodes if _is_float(n)]
        if node.op != "call_function" or not inputs or node.target in CONTRACTIONS or node.target in _NORMS:
            powers[node] = 1.0
        elif node.target in _SUMS and len(inputs) == 2:
            powers[node] = sum(inputs)
        else:
            powers[node] = max(inputs)
    return powers


def _shares(node: fx.Node, powers: Mapping[fx.Node, float], weights: set[fx.Node]) -> list[tuple[fx.Node, float]]:
    """Of the noise of each argument, how much is in the result: all of a weight's, and a mean of the others'."""
    own = [(n, 1.0) for n in node.all_input_nodes if n in weights]
    inputs = [n for n in node.all_input_nodes if _is_float(n) and n not in weights]
    if node.target in _SUMS:
        parts = [powers[n] for n in inputs]
    elif node.target in (aten.cat.default, aten.stack.default):
        parts = [float(_elements(n)) for n in inputs]
    else:
        parts = [1.0] * len(inputs)
    total = sum(parts) or 1.0
    return own + [(n, part / total) for n, part in zip(inputs, parts, strict=True)]


def _weights(program: Program) -> set[fx.Node]:
    """Placeholders of weights, and views of them alone."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in program.weights or (node.all_input_nodes and all(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def _elements(node: fx.Node) -> int:
    return sum(int(t.numel()) for t in tensors_of(node))


def _is_float(node: fx.Node) -> bool:
    return any(t.dtype.is_floating_point or t.is_complex() for t in tensors_of(node))
