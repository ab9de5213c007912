"""`vramplan frontier`: the step against the budget, as a table and an image."""

from __future__ import annotations

from argparse import Namespace

from planner.cli.commands import Answer, make_plan, target_of
from planner.frontier import POINTS, frontier_of
from planner.sizes import MAX_BYTES, parse_size
from runtime.errors import PlannerError


def frontier(arguments: Namespace) -> Answer:
    """Solves for all budgets.

    Raises:
        PlannerError: a budget that is no size, or a file that cannot be written; and as `plan()`.
    """
    budgets = None if arguments.budgets is None else [_size(text) for text in arguments.budgets.split(",")]
    if budgets is not None and arguments.points is not None:
        raise PlannerError("--budgets says which budgets, --points how many: give one of them")
    target = target_of(arguments)
    arguments.budget = str(MAX_BYTES)  # what is solved besides does not depend on it
    p = make_plan(target, arguments)
    points = POINTS if arguments.points is None else arguments.points
    found = frontier_of(p, budgets, points, compare=arguments.compare, marked=False)
    text, data = str(found), {"target": target.name, **found.to_json()}
    if arguments.plot is not None:
        found.plot(arguments.plot)
        text, data = f"{text}\n\ndrawn in {arguments.plot}", {**data, "file": arguments.plot}
    return Answer(text, data)


def _size(text: str) -> int:
    """Digits alone are bytes."""
    return int(text) if text.isascii() and text.isdigit() else parse_size(text, "--budgets")
