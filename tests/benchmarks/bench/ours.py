"""Ours as a contender: planned, built, and asked what it measured."""

from __future__ import annotations

import time
from typing import Any

import torch

from planner import plan
from planner.sizes import parse_size
from tests.benchmarks.bench import checkpoint
from tests.benchmarks.bench.setting import Ready, Setting
from tests.benchmarks.bench.work import Work


def ours(work: Work, setting: Setting, casts: str | None = None) -> Ready:
    """Planned with operators' seconds measured where there is a device to measure; of a folder, the folder itself."""
    assert setting.budget is not None
    started = time.perf_counter()
    share = setting.share
    made: Any = _plan(work, setting, "1TB" if share is not None else setting.budget, casts)
    if share is not None:
        made = made.replan(max(int(share * made.unplanned_bytes), made.minimum_bytes))
    planned = time.perf_counter()
    if setting.kind == "cuda":  # measuring operators left workspaces of libraries, which the plan counts and calls make again
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    built = made.build()
    work.target = built
    said = {
        "plan_seconds": planned - started, "build_seconds": time.perf_counter() - planned, "budget_bytes": made.budget_bytes,
        "predicted_peak_bytes": made.peak_bytes, "predicted_reserved_bytes": made.reserved_bytes,
        "predicted_seconds": made.step_seconds, "bound_seconds": made.bound_seconds,
    }  # fmt: skip
    files = [] if work.folder is None else checkpoint.shards(work.folder)

    def report() -> dict[str, Any]:
        found = made.report()
        return {
            "device_peak_bytes": found.peak_bytes, "device_reserved_bytes": found.reserved_bytes,
            "copied_bytes": found.copied_bytes, "read_bytes": found.read_bytes, "link_fraction": found.link_fraction,
            "locked_bytes": found.locked_bytes,
        }  # fmt: skip

    return Ready(files=files, said=said, report=report)


def _plan(work: Work, setting: Setting, budget: str, casts: str | None) -> Any:
    device = "cuda" if setting.kind == "cuda" else setting.kind
    if work.whole:
        return plan(work.target, budget, call=work.kwargs, device=device, profile=setting.kind != "accounting")
    target = work.target if work.folder is None else work.folder
    return plan(
        target,
        budget,
        kwargs=work.kwargs,
        method=work.method,
        device=device,
        repeats=work.repeats,
        profile=setting.kind != "accounting",
        allow_cast=casts,
    )


def budget_bytes(budget: str | None) -> int | None:
    """Of a budget that is a size; None of a share, which only the plan knows."""
    return None if budget is None or budget.endswith("%") else parse_size(budget)
