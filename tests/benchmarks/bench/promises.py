"""What ours promises, checked in every run; a broken promise is in the table and in the exit code."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.bench.cases import Case

Row = dict[str, Any]
# Streaming alone gives the same bits; in half precision tiles sum in another order. What is wrong differs by more than this.
_TOLERANCE = 0.05
PROCESS_BYTES = 600_000_000  # what a process with PyTorch, diffusers and transformers has besides, mapped code included


def over_budget(row: Row) -> str:
    """What passed the budget, in words; "" where nothing did. On CUDA the budget is of what the allocator reserves."""
    budget = row.get("budget_bytes")
    most = max(row.get("device_reserved_bytes") or 0, row.get("device_peak_bytes") or 0)
    return f"took {most} B, more than its budget of {budget} B" if budget is not None and most > budget else ""


def broken(case: Case, kind: str, row: Row) -> str:
    """The first promise that a plan of ours did not keep, in words; "" where it kept them all, or where its budget was refused.

    Within the budget; predicted bytes are those measured, on a CPU at least; the result is unplanned's, but for casts; where
    weights are in files the whole process, planning included, holds no more than the budget besides Python and libraries.
    """
    if "failed" in row:
        return "" if row["failed"].startswith("InfeasibleBudget") else row["failed"]
    peak, predicted, found = row["device_peak_bytes"], row["predicted_peak_bytes"], row.get("difference")
    if over_budget(row):
        return over_budget(row)
    if kind != "cuda" and peak > predicted:
        return f"took {peak} B, predicted were {predicted} B"
    if row["method"] == "ours" and found is not None and found > _TOLERANCE:
        return f"differs from unplanned by {found:.2g} of the largest value"
    most = max(row["rss_bytes"], row["load_rss_bytes"])
    if case.cold and kind == "cpu" and most > row["budget_bytes"] + PROCESS_BYTES:
        return f"its process held {most} B, more than its budget of {row['budget_bytes']} B and {PROCESS_BYTES} B besides"
    return ""
