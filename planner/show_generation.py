"""What `print(plan)` says of a plan of a generation: the whole call, then each phase."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.show import measured_times, ratio, wrap
from planner.sizes import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.generation import GenerationPlan


def describe_generation(plan: GenerationPlan) -> str:
    """The plan as text of at most 100 columns; the same plan always gives the same text."""
    return f"{plan.title}: {len(plan.phases)}"
