"""An independent account of a program's needs: it runs the operators on real tensors and watches storages, nothing else."""

import inspect
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from passes.program import Program
from runtime.devices.accounting import StorageCounter, _LinearIsOneKernel


def least_bytes(module: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """max over operators of (live bytes + the weights that operator reads), weights rounded up to 64 B, state always there."""
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    leaves = iter(tree_leaves((bound.args, bound.kwargs)))
    env: dict[fx.Node, Any] = {}
    owner: dict[int, str] = {}
    uses = {node: len(node.users) for node in program.graph.nodes}
    state = sum(_aligned(w.nbytes) for w in program.weights.values() if w.state)
    counter = StorageCounter()
    most = 0
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                env[node] = _placeholder(node, program, tensors, leaves)
                if node.name in program.weights:
                    counter._sizes[env[node].untyped_storage()._cdata] = 0  # not an activation
                    owner[env[node].untyped_storage()._cdata] = node.name
                elif isinstance(env[node], torch.Tensor):
                    counter.count(env[node])
            elif node.op == "call_function":
                args_, kwargs_ = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                storages = {t.untyped_storage()._cdata for t in tree_leaves((args_, kwargs_)) if isinstance(t, torch.Tensor)}
                read = sum(
                    _aligned(program.weights[owner[s]].nbytes)
                    for s in storages
                    if s in owner and not program.weights[owner[s]].state
                )
                counter.peak_bytes = counter.live_bytes
                with counter, _LinearIsOneKernel(counter):
                    env[node] = node.target(*args_, **kwargs_)  # type: ignore[operator]
                del args_, kwargs_
                most = max(most, counter.peak_bytes + read + state)
                for used in {node, *node.all_input_nodes}:
                    uses[used] -= used is not node
                    if uses[used] == 0 and used.op == "call_function":
                        del env[used]
    counter.detach()
    return most


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _placeholder(node: fx.Node, program: Program, tensors: dict[str, torch.Tensor], leaves: Any) -> Any:
    if node.name in program.constants:
        return program.constants[node.name]
    if node.name in program.weights:
        own = tensors[program.weights[node.name].name]
        return own.detach().clone(memory_format=torch.preserve_format).requires_grad_(own.requires_grad)
    return next(leaves)
