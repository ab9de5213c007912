"""Where convolutions could run in channels-last: the largest regions in which nothing has to be converted.

What keeps channels-last strides is tried on fakes, operator by operator. Fakes say what CPU kernels do; of CUDA's kernels only
those are taken that are known to keep them, which `group_norm` does not: it makes its argument contiguous (ATen/native/
group_norm.cpp, up to torch 2.13 at least), so that regions end there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from passes.channels_last import CONVOLUTIONS, ConvRegion, Walk, full_inputs, rank_of, written_storages
from passes.program import Program, is_symbolic, storage_id, tensors_of
from runtime.errors import PlannerError

aten = torch.ops.aten

_EVERYWHERE = {
    aten.batch_norm.default, aten.cat.default, aten.max_pool2d.default, aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default, aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default,
    aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default, aten.constant_pad_nd.default, aten.to.dtype,
    aten._to_copy.default,
}  # fmt: skip
_ON_CPU = _EVERYWHERE | {
    aten.group_norm.default, aten.instance_norm.default, aten.pad.default, aten.reflection_pad2d.default,
    aten.replication_pad2d.default, aten.upsample_bicubic2d.vec, aten.upsample_nearest3d.vec, aten.upsample_trilinear3d.vec,
    aten.max_pool3d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default, aten.constant_pad_nd.default,
}  # fmt: skip
# What cuDNN has kernels in channels-last for, and of images: ATen/native/cudnn/ConvShared.cpp.
_CUDA_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def conv_regions(program: Program, device: str = "cpu") -> tuple[ConvRegion, ...]:
    """The regions of a canonical program, in program order, each with a convolution or more; none where sizes are symbols.

    Args:
        program: canonical.
        device: "cpu", "cuda" or "accounting": whose kernels it will run.
    """
    if any(is_symbolic(node) for node in program.graph.nodes):
        return ()
    barred = {node.name for node in program.ops() if not _may_join(node, device)}
    while True:
        inside: set[str] = set()

        def wanted(node: fx.Node, inside: set[str] = inside, barred: frozenset[str] = frozenset(barred)) -> bool:
            begins = node.target in CONVOLUTIONS
            return node.name not in barred and (begins or any(n.name in inside for n in full_inputs(node)))

        walk = Walk(program, wanted, strict=False, joined=inside.add)
        try:
            walk.run()
            fresh = set(_misfits(program, inside))
            if not fresh:
                walk.check()
                return tuple(_components(walk))
        except PlannerError:
            return ()  # some operator behind a region cannot read what it would give
        barred |= fresh


def _may_join(node: fx.Node, device: str) -> bool:
    if not rank_of(node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if device == "cuda" and (rank_of(node) != 4 or node.meta["val"].dtype not in _CUDA_DTYPES):
        return False
    if node.target in CONVOLUTIONS:
        return CONVOLUTIONS[node.target] == rank_of(node)
    return node.target in (_EVERYWHERE if device == "cuda" else _ON_CPU) or torch.Tag.pointwise in node.target.tags


def _misfits(program: Program, inside: set[str]) -> Iterator[str]:
    """Operators that cannot be in a region, since not all that share their weight, or the memory that they write, are."""
    for node in program.graph.nodes:
        if node.name in program.weights:
            readers = {user.name for user in node.users}
            convolutions = {user.name for user in node.users if user.target in CONVOLUTIONS and user.args[1] is node}
            if convolutions & inside and not readers <= convolutions & inside:
                yield from convolutions & inside
    written = written_storages(program.graph.nodes)
    holders: dict[int, set[str]] = {}
    for node in program.graph.nodes:
        for storage in {storage_id(t) for t in tensors_of(node)} & written:
            holders.setdefault(storage, set()).add(node.name)
    for names in holders.values():
        if names & inside and not names <= inside:
            yield from names & inside


def _components(walk: Walk) -> Iterator[ConvRegion]:
    """The members by what they read of each other; those without convolution are none."""
    owner: dict[fx.Node, list[fx.Node]] = {}
    for node, read in walk.members.items():
        group = [node]
        for n in read:
            if owner[n] is not group:
                smaller, group = sorted((group, owner[n]), key=len)
                group += smaller
                for member in smaller:
                    owner[member] = group
        owner[node] = group
    order: dict[Any, int] = {node: i for i, node in enumerate(walk.graph.nodes)}
    groups = {id(group): sorted(group, key=order.__getitem__) for group in owner.values()}
    for group in sorted(groups.values(), key=lambda group: order[group[0]]):
        if any(node.target in CONVOLUTIONS for node in group):
            yield ConvRegion(tuple(node.name for node in group))
