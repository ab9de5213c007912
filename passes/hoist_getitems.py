"""Puts the members of a multi-output operator right after it, so that the tuple can go at once.

before:  s = split(x, 4); a = s[0]; y = gelu(a); b = s[1]
after:   s = split(x, 4); a = s[0]; b = s[1]; y = gelu(a)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from passes.program import Program


@dataclass(frozen=True)
class HoistGetitems:
    """Ensures: every `getitem` directly follows its operator or another member of it."""

    name: str = "hoist_getitems"

    def apply(self, program: Program) -> Program:
        graph = program.copy_graph()
        for node in list(graph.nodes):
            members = [user for user in node.users if user.target is operator.getitem]
            for member in reversed(members):
                node.append(member)
        return program.with_graph(graph)
