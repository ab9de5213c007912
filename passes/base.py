"""What a pass is, and the driver that runs a list of them with the graph verified around every one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from passes.program import Program
from passes.verify import verify


class Pass(Protocol):
    """A frozen dataclass whose fields are its options; `apply` takes a program and returns another."""

    @property
    def name(self) -> str: ...

    def apply(self, program: Program) -> Program: ...


def run_passes(program: Program, passes: Sequence[Pass]) -> Program:
    """Applies the passes in order; a graph that is broken afterwards is blamed on the pass by name."""
    verify(program, "capture")
    for step in passes:
        program = step.apply(program)
        verify(program, step.name)
    return program
