"""Which stretch of a program can run sample by sample, and in how many slices that is tried.

A loop of tiles ends at a norm over whole images, and between two such norms the values of all samples exist. Where every
operator of a stretch gives a sample of its result from that sample alone, the stretch can run once for every slice, without a
halo and without merging anything; each slice then has its own loops (`passes.unroll_slices`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from passes.base import run_passes
from passes.functionalise import Functionalise
from passes.gather_writes import GatherWrites
from passes.program import Program, tensors_of
from passes.regions import Calls, Tile
from passes.split_norms import can_split
from passes.tile_rules import Part, Untileable, tile
from passes.unroll_slices import UnrollSlices
from planner.solve.constraints import FREE, TileConstraint

# All slices together have at most so many operators: as many as are planned in a minute or two.
MOST_OPERATORS = 4_000
# A stretch of fewer, without a norm over whole images, is as well a loop.
_LOOP = 48


@dataclass(frozen=True)
class Slicing:
    """A stretch that can run sample by sample, with `operators` that do: `tile`, one slice for each of `samples`."""

    tile: Tile
    samples: int
    operators: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of slices that are tried: 2, 4, and so on up to one for each sample, or as many as there may be operators."""
        most = min(self.samples, MOST_OPERATORS // self.operators)
        doubled = [1 << power for power in range(1, most.bit_length()) if 1 << power < most]
        sizes = dict.fromkeys(-(-self.samples // count) for count in (*doubled, most) if count > 1)
        return tuple(-(-self.samples // size) for size in sizes)

    @property
    def too_long(self) -> str:
        """Why there are not as many slices as samples; empty where there are."""
        if self.operators * self.samples <= MOST_OPERATORS:
            return ""
        needed = f"{self.operators * self.samples:,} operators, and at most {MOST_OPERATORS:,} are planned so"
        return f"to run its {self.samples} samples one by one takes {needed}"

    def tiles(self) -> Iterator[Tile]:
        """With each of the counts."""
        return (replace(self.tile, count=count) for count in self.counts)


def slicing_of(program: Program, constraint: Callable[[fx.Node], TileConstraint]) -> Slicing | None:
    """The longest stretch from the first reader of an input on that can run sample by sample; None where loops do as much.

    Samples are along any one dimension of an input. An operator of which `constraint` says how it is tiled, or that it is not,
    ends the stretch. What the pass refuses (two results in one memory that is written later) is none.
    """
    program = run_passes(program, (GatherWrites(), Functionalise()))
    nodes, found = list(program.ops()), list[Slicing]()
    for name in program.inputs:
        seed = program.node(name)
        value = seed.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            scan = _Scan(seed, dim, constraint)
            stretch = scan.stretch(nodes) if size > 1 else []
            cut = [node for node in stretch if scan.cuts(node)]
            if len(cut) > _LOOP or any(map(can_split, cut)):
                made = Tile(stretch[0].name, stretch[-1].name, seed.name, dim, int(size))
                found.append(Slicing(made, int(size), len(cut)))
    longest = max(found, key=lambda each: each.operators, default=None)
    try:
        UnrollSlices((replace(longest.tile, count=2),) if longest is not None else ()).apply(program)
    except Untileable:
        return None
    return longest


class _Scan:
    """Follows the samples of one input through the program: `dims` says along which dimension each value has them."""

    def __init__(self, seed: fx.Node, dim: int, constraint: Callable[[fx.Node], TileConstraint]) -> None:
        self._samples = int(seed.meta["val"].shape[dim])
        self._dims = {seed: dim}
        self._calls, self._constraint = Calls(), constraint

    def stretch(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """The operators from the first that reads samples to the last before one that mixes them."""
        found: list[fx.Node] = []
        for node in nodes:
            read = any(n in self._dims for n in node.all_input_nodes)
            if not read and (not found or not _writes(node)):
                found += [node] if found else []
            elif self._constraint(node) == FREE and not _writes(node) and self._follow(node):
                found.append(node)
            else:
                ends_in_tuple = node.target is operator.getitem
                while found and ends_in_tuple:  # not between an operator and the members of its result
                    ends_in_tuple = found.pop().target is operator.getitem
                break
        return found

    def cuts(self, node: fx.Node) -> bool:
        """Whether an operator gives samples, and so runs once for each."""
        return node in self._dims

    def _follow(self, node: fx.Node) -> bool:
        """Whether each sample of a result comes from that sample alone, and along which dimension it is then."""
        if node.target is operator.getitem:
            self._dims[node] = self._dims[node.args[0]]  # type: ignore[index]
            return True
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        rank = max((t.dim() for t in tensors_of(node)), default=0)
        dim = next((dim for dim in range(rank) if self._is_along(node, dim)), None)
        if dim is not None:
            self._dims[node] = dim
        return dim is not None

    def _is_along(self, node: fx.Node, dim: int) -> bool:
        sizes = [int(t.shape[dim]) if dim < t.dim() else 0 for t in tensors_of(node)]
        if not sizes or any(size == 0 or size % self._samples for size in sizes):
            return False
        arguments = self._calls.arguments(node)
        for sample in {0, self._samples // 2, self._samples - 1}:
            try:
                needs = tile(self._calls.call(node), *(self._sample(dim, size, sample) for size in sizes)).needs
            except Untileable:
                return False
            for argument, need in zip(arguments, needs, strict=True):
                if need is None and argument in self._dims:
                    return False
                if need is not None and not self._is_sample(argument, need, sample):
                    return False
        return True

    def _sample(self, dim: int, size: int, sample: int) -> Part:
        unit = size // self._samples
        return Part(dim, sample * unit, (sample + 1) * unit)

    def _is_sample(self, argument: fx.Node, need: Part, sample: int) -> bool:
        """Whether of an argument just this sample is needed, or nothing; of what comes from elsewhere along any dimension."""
        if need.size == 0:
            return True
        size = int(argument.meta["val"].shape[need.dim])
        whole = size % self._samples == 0 and need == self._sample(need.dim, size, sample)
        return whole and self._dims.get(argument, need.dim) == need.dim


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
