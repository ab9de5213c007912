"""vramplan: PyTorch programs within a byte budget, proved, enforced and measured."""

from __future__ import annotations

from planner.api import plan
from planner.budget import Budget
from planner.machine import Machine
from planner.pipeline_plan import PipelinePlan
from planner.plan import Plan
from runtime.errors import (
    BudgetError,
    CaptureError,
    CheckError,
    CheckpointError,
    InfeasibleBudget,
    InputError,
    ModuleUnusable,
    PackageError,
    PlanFileError,
    PlannerError,
    UnknownSize,
)

__all__ = [
    "Budget",
    "BudgetError",
    "CaptureError",
    "CheckError",
    "CheckpointError",
    "InfeasibleBudget",
    "InputError",
    "Machine",
    "ModuleUnusable",
    "PackageError",
    "PipelinePlan",
    "Plan",
    "PlanFileError",
    "PlannerError",
    "UnknownSize",
    "plan",
]
