"""`vramplan compare`: a plan beside what the offloading switches of today would do."""

from __future__ import annotations

from argparse import Namespace

from planner.cli.commands import Answer, make_plan, quiet, target_of
from planner.cli.pipeline import make_pipeline_plan, names_pipeline, refuse_call


def compare(arguments: Namespace) -> Answer:
    """Plans, then simulates all policies.

    Raises:
        PlannerError: the model can be planned in parts only; and as `plan()`.
    """
    if names_pipeline(arguments):
        with quiet(arguments.debug):
            found = make_pipeline_plan(arguments).compare()
        return Answer(str(found), {"target": arguments.target, **found.to_json()})
    refuse_call(arguments)
    target = target_of(arguments)
    found = make_plan(target, arguments).compare()
    return Answer(str(found), {"target": target.name, **found.to_json()})
