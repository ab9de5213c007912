"""`vramplan compare`: a plan beside what the offloading switches of today would do."""

from __future__ import annotations

from argparse import Namespace

from planner.cli.commands import Answer, make_plan, target_of


def compare(arguments: Namespace) -> Answer:
    """Plans, then simulates all policies.

    Raises:
        PlannerError: the model can be planned in parts only; and as `plan()`.
    """
    target = target_of(arguments)
    found = make_plan(target, arguments).compare()
    return Answer(str(found), {"target": target.name, **found.to_json()})
