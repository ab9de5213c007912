"""Memory that is used again: the last rewriting of a program, after which less is live and nothing takes longer."""

from __future__ import annotations

from passes.base import run_passes
from passes.program import Program
from passes.write_in_place import WriteInPlace, writable_in_place
from planner.machine import Machine
from planner.memory import MemoryModel


def reuse_memory(program: Program, machine: Machine, memory: MemoryModel) -> Program:
    """The program with elementwise operators in place and parts of joined values in the joined one; itself where there is nothing."""
    names = writable_in_place(program)
    if names:
        program = run_passes(program, (WriteInPlace(names),))
    return program
