"""`PipelinePlan.compare()`: the plan of a whole pipeline beside what today's switches would do with all of its calls.

As for one model nothing of it is measured, and what is not certain is taken to be cheap (`planner/baselines.py`). Sequential
and group offloading are applied to every component, as `enable_group_offload` of a pipeline does. With everything resident
nothing is copied: the weights are there before the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from planner.baselines import Baseline, offloads, pageable
from planner.bounds import physical_bound
from planner.compare import OURS, Comparison, Row
from planner.progress import working
from planner.solve.phases import Member
from runtime.errors import PlannerError

if TYPE_CHECKING:
    from planner.pipeline_plan import PipelinePlan


def compare_pipeline(plan: PipelinePlan) -> Comparison:
    """Simulates the policies, and plans the pipeline again for the peak of each; nothing is emitted for that.

    Raises:
        PlannerError: a component is planned in parts.
    """
    for key, reason in plan.opaque.items():
        raise PlannerError(
            f"{key} of {plan.title} is planned in parts ({reason}), and switches of today move whole modules: compare another "
            "component, p.parts[...].compare()"
        )
    budget, least = plan.budget_bytes, plan.minimum_bytes
    own_bound = plan.bound_at(plan.reserved_bytes).seconds
    rows = [Row(OURS, plan.reserved_bytes, plan.step_seconds, own_bound, True, plan.step_seconds)]
    with working(f"simulating what other policies would do with {plan.title}"):
        for found in pipeline_baselines(plan):
            ours = plan.replan(found.peak_bytes).step_seconds if found.peak_bytes >= least else None
            fits = found.peak_bytes <= budget
            rows.append(Row(found.policy, found.peak_bytes, found.step_seconds, found.bound_seconds, fits, ours, found.note))
    return Comparison(plan.title, plan.device, plan.machine.name, budget, least, 1, tuple(rows))


def pipeline_baselines(plan: PipelinePlan) -> Iterator[Baseline]:
    """All policies that know no budget."""
    members = plan.members
    compute = sum(each.calls * each.solver.problem.compute_seconds for each in members.values())
    yield _policy(plan, "everything resident", plan.unplanned_bytes, compute)
    yield _model_offload(plan, compute)
    each = {key: offloads(member.solver, plan.parts[key].target) for key, member in members.items()}
    for same in zip(*each.values(), strict=True):
        pairs = list(zip(members.values(), same, strict=True))
        peak = max(member.outside_bytes + found.peak_bytes for member, found in pairs)
        yield _policy(plan, same[0].policy, peak, sum(member.calls * found.step_seconds for member, found in pairs))


def _model_offload(plan: PipelinePlan, compute_seconds: float) -> Baseline:
    """`enable_model_cpu_offload`: a component that is called comes whole, from pageable memory, until another one is called."""
    weights: dict[str, dict[str, int]] = {}
    for key, member in plan.members.items():
        problem = member.solver.problem
        weights.setdefault(_component(key), {}).update(problem.program.bytes_by_name(problem.weight_bytes))
    slow = pageable(plan.machine)
    seconds = {name: sum(map(slow.copy_seconds, filter(None, each.values()))) for name, each in weights.items()}
    moves = [name for before, name in zip(("", *plan.called), plan.called, strict=False) if name != before]
    peak = max(
        member.outside_bytes + sum(weights[_component(key)].values()) + member.solver.problem.most_activation_bytes
        for key, member in plan.members.items()
    )
    note = f"its components come {len(moves)} times in one call"
    return _policy(plan, "model offload", peak, compute_seconds + sum(seconds[name] for name in moves), note)


def _policy(plan: PipelinePlan, name: str, peak_bytes: int, seconds: float, note: str = "") -> Baseline:
    bound = sum(member.calls * _bound_seconds(member, peak_bytes) for member in plan.members.values())
    return Baseline(name, peak_bytes, seconds, bound, note)


def _bound_seconds(member: Member, peak_bytes: int) -> float:
    return physical_bound(member.solver.problem, peak_bytes - member.outside_bytes).seconds


def _component(key: str) -> str:
    return key.partition(".")[0]
