"""What tests of host budgets share."""

from __future__ import annotations

from dataclasses import replace

from passes.program import Program


def changed(program: Program, **changes: object) -> Program:
    """With another layout of the host."""
    assert program.layout is not None
    assert program.layout.host is not None
    return replace(program, layout=replace(program.layout, host=replace(program.layout.host, **changes)))  # type: ignore[arg-type]
