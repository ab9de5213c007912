"""Memory that is used again: the last rewriting of a program, after which less is live and nothing takes longer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import torch

from passes.base import run_passes
from passes.calibrate import calibrating
from passes.cat_in_place import CatInPlace, joins_in_place
from passes.loop import loop_of
from passes.mark_state import written_nodes
from passes.probe import Prober
from passes.program import Program
from passes.write_in_place import WriteInPlace, writable_in_place
from planner.machine import Machine
from planner.memory import MemoryModel
from runtime.layout import align


def reuse_memory(
    program: Program, apart: Collection[str], *, machine: Machine, memory: MemoryModel, keep: Callable[[str], bool]
) -> Program:
    """The program with elementwise operators in place and values joined part by part; itself where there is nothing to do.

    `apart` are operators that stay as they are. `keep` says of a weight, by the module's name, that it stays on the device.

    Raises:
        UnknownSize: an operator's bytes cannot be known.
    """
    names = tuple(name for name in writable_in_place(program) if name not in apart)
    if names:
        program = run_passes(program, (WriteInPlace(names),))
    if all(node.target is not torch.ops.aten.cat.default for node in program.ops()):
        return program
    weights = {
        key: align(weight.nbytes, memory.weight_alignment)
        for key, weight in program.weights.items()
        if not weight.state and not keep(weight.name)
    }
    with calibrating(memory.device) as calibrator:
        prober = Prober(memory.device, machine.capability, calibrator)
        joins = joins_in_place(program, prober, memory.round_activation, weights)
    return run_passes(program, (CatInPlace(joins),)) if joins else program


def reuses_of(program: Program) -> tuple[str, ...]:
    """The passes of `reuse_memory` that changed something."""
    loops = [loop for node in program.ops() if (loop := loop_of(node)) is not None]
    nodes = itertools.chain(program.ops(), *(run.operators for loop in loops for run in loop.runs))
    aliases = [node for node in nodes if node.target is torch.ops.aten.alias.default]
    written = any(written_nodes(user) for node in aliases for user in node.users)
    buffers = [node for node in aliases if str(node.args[0]) == f"{node.name}_buffer"]
    parts = [user for node in buffers for user in node.users if user.target is torch.ops.aten.slice.Tensor]
    joined = any(written_nodes(user) for part in parts for user in part.users)
    return (*(["write_in_place"] if written else []), *(["cat_in_place"] if joined else []))
